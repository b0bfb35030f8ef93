"""Saving a run and continuing it: what a checkpoint holds beside the weights, and which one is taken."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from seqba.checkpoint import checkpoint_fault, find_checkpoint, full_state_dict, load_checkpoint, save_checkpoint
from seqba.draws.generators import rng_state, set_rng_state
from seqba.groups import CopyGroup
from tasks.cli.errors import RunError

logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """Anything whose position a checkpoint must hold, as JSON values or as tensors of each rank's own."""

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` needs to continue exactly."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken."""


@dataclass(frozen=True)
class SameData:
    """Refuses to resume on other data: its state is the data's fingerprint."""

    fingerprint: str

    def state_dict(self) -> dict[str, Any]:
        """The fingerprint."""
        return {"fingerprint": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError where the data is not what it was."""
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                "the data is not what the run was begun with; give that again, or another --output-dir for a new run"
            )


class Saver:
    """The checkpoints of one run in `folder`, of which the newest `keep` stay.

    A checkpoint holds the unwrapped model, its optimizer, the accelerator's loss scaler, the `parts` whose position
    all ranks share (JSON values), and `carried`: what holds tensors of each rank's own, such as `seqba.CarriedState`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        keep: int,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parts: Mapping[str, Stateful],
        carried: Mapping[str, Stateful],
        group: CopyGroup,
    ) -> None:
        self.group = group
        self.accelerator, self.folder, self.keep = accelerator, folder, keep
        self.model, self.optimizer, self.parts, self.carried = model, optimizer, dict(parts), carried
        if accelerator.scaler is not None:
            self.parts["scaler"] = accelerator.scaler

    @property
    def _group(self) -> str:
        """The ranks of a group carry other copies of the same batches."""
        return f"group{self.group.index}"

    def path(self, update: int) -> Path:
        """Where the checkpoint of an update is, if there is one."""
        return self.folder / f"update-{update:06d}"

    def is_good(self, update: int) -> bool:
        """Whether an update has an intact checkpoint."""
        return checkpoint_fault(self.path(update)) is None

    def newest(self) -> Path | None:
        """The newest intact checkpoint."""
        return find_checkpoint(self.folder)[0]

    def resume(self) -> tuple[Path | None, list[str]]:
        """Continue everything from the newest intact checkpoint; None is returned where nothing was ever saved.

        With it comes a sentence about each newer checkpoint that is damaged.

        Raises:
            RunError: no checkpoint is intact though there are some, or the newest is not of this run.
        """
        path, damaged = find_checkpoint(self.folder)
        if path is None and damaged:
            raise RunError(
                f"no checkpoint in {self.folder} is intact: {'; '.join(damaged)}. Restore one from a copy, or begin "
                "again in another --output-dir"
            )
        if path is not None:
            try:
                self._restore(path)
            except (ValueError, KeyError) as error:
                lack = "it lacks " if isinstance(error, KeyError) else ""
                raise RunError(f"{path} does not fit this run: {lack}{error}") from error
        return path, damaged

    def _restore(self, path: Path) -> None:
        checkpoint = load_checkpoint(path, model=self.model, optimizer=self.optimizer)
        before, now = len(checkpoint.rng), self.accelerator.num_processes
        for name, part in self.parts.items():
            if name not in checkpoint.counters:
                raise ValueError(f"it holds no state of {name!r}; resume with the version and options it was saved by")
            part.load_state_dict(checkpoint.counters[name])
        for name, state in self.carried.items():
            mine, device = f"{self._group}/{name}/", self.accelerator.device
            tensors = {key: x.to(device) for key, x in checkpoint.tensors.items() if key.startswith(mine)}
            state.load_state_dict({key.removeprefix(mine): x for key, x in tensors.items()})
        if before == now:
            set_rng_state(checkpoint.rng[self.accelerator.process_index])
            return
        logger.info(
            "note: saved by %d processes and resumed by %d: the data order goes on, but the result is not bitwise "
            "that of an undisturbed run: gradients are added up in another order, and copies draw other masks where "
            "they have no streams of their own (--reproducible-copies)",
            before,
            now,
        )

    def save(self, update: int, *, pinned: Collection[int]) -> None:
        """Write an update's checkpoint; all ranks call it, one writes. Those of `pinned` updates stay, however old.

        Raises:
            RunError: it could not be written (a full disk, most of all); the earlier ones are intact.
        """
        is_main = self.accelerator.is_main_process
        rng = gather_object([rng_state()])
        own = {
            f"{self._group}/{name}/{key}": x.detach().cpu().clone()
            for name, state in self.carried.items()
            for key, x in state.state_dict().items()
        }
        tensors = {key: x for of_rank in gather_object([own]) for key, x in of_rank.items()}
        model, optimizer = (full_state_dict(owner, keep=is_main) for owner in (self.model, self.optimizer))
        if is_main:
            counters = {name: part.state_dict() for name, part in self.parts.items()}
            content = {"counters": counters, "rng": rng, "tensors": tensors or None}
            try:
                save_checkpoint(
                    self.folder, update, model=model, optimizer=optimizer, **content, keep=self.keep, pinned=pinned
                )
            except OSError as error:
                reason = error.strerror if error.strerror and not error.filename else str(error)
                raise RunError(f"{reason}; {how_to_go_on(self.folder)}") from error
        self.accelerator.wait_for_everyone()

    def load(self, update: int) -> None:
        """Put the model and the optimizer back to an update, and nothing else; RunError where that cannot be."""
        try:
            load_checkpoint(self.path(update), model=self.model, optimizer=self.optimizer)
        except ValueError as error:
            raise RunError(f"{error}; the same command with --resume ends with the newest weights instead") from error


def how_to_go_on(checkpoints: Path) -> str:
    """The user's next step after the disk was full, as a half sentence."""
    return f"make room, then the same command with --resume goes on from the newest checkpoint in {checkpoints}"
