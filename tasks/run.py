"""What every training script shares, once: the run folder and the services of the loop.

A run folder holds `config.json`, `metrics.jsonl` (one object a logged update), `checkpoints/`, and at the end
`results.json`, `curve.png` and `model/`. A task's loop asks `Run` when to log, validate, save and stop.
"""

import json
import math
import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from tqdm import tqdm

from seqba.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from seqba.random_state import rng_state, set_rng_state
from seqba.step import UpdateResult
from tasks.errors import UserError
from tasks.metrics import draw_curve, read_metrics, write_json, write_text

INTERRUPTED = 130  # the shell's exit code for a run ended by Ctrl-C


class RunError(UserError):
    """A run that cannot start or go on as asked; the message says what to change."""


class NonFiniteError(RunError):
    """The loss or the gradient is not finite; the last good checkpoint is kept."""


class Stateful(Protocol):
    """Anything whose position a checkpoint must hold; its state is made of JSON values."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue exactly."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken."""


@dataclass
class Progress:
    """The counters of a run; all of them live in its checkpoints.

    `unique_samples` counts samples met, `seen_instances` their copies, `target_tokens` the targets in the
    denominators (copies counted). The `window_*` sums belong to the metrics row that comes next.
    """

    update: int = 0
    unique_samples: int = 0
    seen_instances: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_update: int | None = None
    window_updates: int = 0
    window_loss: float = 0.0
    window_norm: float = 0.0
    window_clipped: int = 0


@dataclass
class _Pending:
    """An update whose tensors have not been read yet (reading them waits for the device)."""

    update: int
    result: UpdateResult
    sample_ids: Sequence[int]


@dataclass
class Cadence:
    """How often things happen, in updates."""

    max_updates: int
    log_every: int
    eval_every: int
    save_every: int
    keep: int = 2

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise RunError(f"{name} must be at least 1, got {value}")


@dataclass
class Run:
    """One training run and its folder.

    Args:
        accelerator: the run's Accelerator.
        folder: the run folder, made where it does not exist.
        config: all options, JSON values; a resumed run must have the same, `may_differ` aside.
        cadence: how often it logs, validates and saves.
        num_copies: M, for the count of instances seen.
        max_norm: the clipping threshold, for the clip fraction; None where nothing is clipped.
        resume: continue from the newest good checkpoint; where there is none, start at update 1 and say so.
        may_differ: names of options that a resumed run may change.

    Raises:
        RunError: the folder already holds a run and `resume` is off, or is resumed with another configuration.
    """

    accelerator: Accelerator
    folder: Path
    config: Mapping[str, Any]
    cadence: Cadence
    num_copies: int
    max_norm: float | None = None
    resume: bool = False
    may_differ: Collection[str] = ()
    progress: Progress = field(default_factory=Progress)
    interrupted: bool = False

    def __post_init__(self) -> None:
        self._pending: _Pending | None = None
        self._bar: tqdm | None = None
        self._parts: dict[str, Stateful] = {}
        self._saved_update: int | None = None
        self._last_time = time.perf_counter()
        self._open_folder()

    # ---- the folder

    @property
    def metrics_file(self) -> Path:
        """One JSON object a logged update."""
        return self.folder / "metrics.jsonl"

    def say(self, text: str) -> None:
        """A line for the user, from the first rank, without tearing the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stdout)

    def _open_folder(self) -> None:
        config_file = self.folder / "config.json"
        problem = None
        if self.accelerator.is_main_process:
            try:
                self._check_folder(config_file)
            except RunError as error:
                problem = str(error)
        (problem,) = broadcast_object_list([problem])
        if problem is not None:
            raise RunError(problem)
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(config_file, dict(self.config))
        self.accelerator.wait_for_everyone()

    def _check_folder(self, config_file: Path) -> None:
        if not self.resume:
            if config_file.exists():
                raise RunError(
                    f"{self.folder} already holds a run; continue it with --resume, or give another --output-dir"
                )
            return
        if not config_file.exists():
            return  # nothing was begun: --resume may stand in a job script from the first start on
        before = json.loads(config_file.read_text("utf-8"))
        now = json.loads(json.dumps(dict(self.config)))
        differing = [
            f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name) and name not in self.may_differ
        ]
        if differing:
            raise RunError(
                f"{self.folder} was begun with another configuration: {'; '.join(differing)}. Give the options it was "
                "begun with, or another --output-dir"
            )

    # ---- checkpoints

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer, **parts: Stateful) -> None:
        """Name what a checkpoint holds, and continue from the newest good one where the run is resumed."""
        self._model, self._optimizer, self._parts = model, optimizer, parts
        if self.accelerator.scaler is not None:
            self._parts = {**parts, "scaler": self.accelerator.scaler}
        if not self.resume:
            return
        path, damaged = find_checkpoint(self.folder / "checkpoints")
        for text in damaged:
            self.say(f"skipped a damaged checkpoint: {text}")
        if path is None:
            self.say("nothing to resume from: starting at update 1")
            self._cut_metrics(0)
            return
        try:
            self._restore(path)
        except (ValueError, KeyError) as error:
            raise RunError(f"{path} does not fit this run: {error}") from error
        self.say(f"resumed at update {self.progress.update} from {path}")

    def _restore(self, path: Path) -> None:
        checkpoint = load_checkpoint(path, model=self._model, optimizer=self._optimizer)
        if len(checkpoint.rng) != self.accelerator.num_processes:
            raise RunError(
                f"it was saved by {len(checkpoint.rng)} processes and is resumed by "
                f"{self.accelerator.num_processes}; resume with as many"
            )
        for name, part in self._parts.items():
            part.load_state_dict(checkpoint.counters[name])
        self.progress = progress = Progress(**checkpoint.counters["progress"])
        if progress.best_update is not None and not self._checkpoint(progress.best_update).is_dir():
            self.say(f"the best checkpoint, of update {progress.best_update}, is gone: the best from here on is kept")
            progress.best_update = progress.best_loss = None
        set_rng_state(checkpoint.rng[self.accelerator.process_index])
        self._saved_update = checkpoint.update
        self._cut_metrics(checkpoint.update)

    def _checkpoint(self, update: int) -> Path:
        return self.folder / "checkpoints" / f"update-{update:06d}"

    def save(self) -> None:
        """Write a checkpoint of the present update, unless it has one."""
        self._read_pending()
        if self._saved_update == self.progress.update:
            return
        rng = gather_object([rng_state()])
        if self.accelerator.is_main_process:
            self._write_checkpoint(rng)
        self._saved_update = self.progress.update
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, rng: list[dict[str, Any]]) -> None:
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        try:
            save_checkpoint(
                self.folder / "checkpoints",
                self.progress.update,
                model=self._model,
                optimizer=self._optimizer,
                counters={"progress": asdict(self.progress), **parts},
                rng=rng,
                keep=self.cadence.keep,
                pinned=() if self.progress.best_update is None else (self.progress.best_update,),
            )
        except OSError as error:  # a full disk, most of all; the earlier checkpoints are intact
            raise RunError(str(error)) from error

    def load_best(self) -> None:
        """Put the weights with the lowest validation loss into the model."""
        if self.progress.best_update is None or self.progress.best_update == self.progress.update:
            return
        load_checkpoint(self._checkpoint(self.progress.best_update), model=self._model)

    def _cut_metrics(self, update: int) -> None:
        """Drop what was logged after the checkpoint: those updates are done again."""
        if self.accelerator.is_main_process and self.metrics_file.exists():
            rows = [row for row in read_metrics(self.metrics_file) if row["update"] <= update]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_text(self.metrics_file, text)

    # ---- the loop

    def updates(self) -> Iterator[int]:
        """The numbers of the updates still to do, until the last one, or until Ctrl-C or SIGTERM.

        A stop is honoured between updates: the loop ends, a checkpoint is saved, `interrupted` is set.
        """
        self._last_time = time.perf_counter()
        self._loop_start, self._tokens_at_start = self._last_time, self.progress.target_tokens
        self._bar = tqdm(
            total=self.cadence.max_updates,
            initial=self.progress.update,
            unit="update",
            mininterval=0.2 if sys.stderr.isatty() else 10,  # seconds; a log file wants fewer lines
            disable=not self.accelerator.is_main_process,
        )
        with _stop_signals() as stop, self._bar:
            while self.progress.update < self.cadence.max_updates:
                yield self.progress.update + 1
                self._bar.update(self.progress.update - self._bar.n)
                if self._anywhere(bool(stop)):
                    self.interrupted = True
                    break
            self._tick()
            self.save()
        if self.interrupted:
            self.accelerator.end_training()
            self.say(f"stopped after update {self.progress.update}; the same command with --resume continues it")

    def record(self, update: int, result: UpdateResult, sample_ids: Sequence[int]) -> None:
        """Count a finished update; `sample_ids` are the samples that this rank gave to it.

        Raises:
            NonFiniteError: an update's loss or gradient is nan or infinite. On an accelerator this is seen one
                update later, so that nothing waits for it; always before a checkpoint is written.
        """
        self._read_pending()
        self.progress.update = update
        self._pending = _Pending(update, result, sample_ids)
        if self.accelerator.device.type == "cpu":
            self._read_pending()

    def is_due(self, every: int) -> bool:
        """Whether something with this cadence happens after the present update; always after the last one."""
        return self.progress.update % every == 0 or self.progress.update == self.cadence.max_updates

    def log(self, *, lr: float, valid_loss: float | None = None) -> None:
        """Write a metrics row where one is due, and note the validation loss (nats per target)."""
        if valid_loss is None and not self.is_due(self.cadence.log_every):
            return
        self._read_pending()
        self._tick()
        row = self._close_window(lr)
        if valid_loss is not None:
            if not math.isfinite(valid_loss):
                raise NonFiniteError(f"the validation loss after update {self.progress.update} is {valid_loss}")
            row["valid_loss"] = valid_loss
            if self.progress.best_loss is None or valid_loss < self.progress.best_loss:
                self.progress.best_loss, self.progress.best_update = valid_loss, self.progress.update
        if self.accelerator.is_main_process:
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        self.accelerator.log({k: v for k, v in row.items() if k != "update" and v is not None}, step=row["update"])

    def save_if_due(self) -> None:
        """Save at the cadence, and whenever the validation loss is the lowest so far."""
        if self.is_due(self.cadence.save_every) or self.progress.best_update == self.progress.update:
            self.save()

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write `results.json` and `curve.png`."""
        self._tick()
        if self.accelerator.is_main_process:
            shared = {
                "updates": self.progress.update,
                "best_update": self.progress.best_update,
                "valid_loss": self.progress.best_loss,
                "unique_samples": self.progress.unique_samples,
                "seen_instances": self.progress.seen_instances,
                "target_tokens": self.progress.target_tokens,
                "num_copies": self.num_copies,
                "num_processes": self.accelerator.num_processes,
                "num_threads": torch.get_num_threads(),
                "seconds": self.progress.seconds,
            }
            draw_curve(read_metrics(self.metrics_file), self.folder / "curve.png", title=str(self.folder.name))
            write_json(self.folder / "results.json", {**shared, **results})
        self.accelerator.end_training()

    # ---- inside

    def _read_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        loss, norm = float(pending.result.loss), float(pending.result.grad_norm)
        # with fp16 an infinite gradient is the loss scaler's business: it skips the step and scales down
        if not math.isfinite(loss) or (self.accelerator.scaler is None and not math.isfinite(norm)):
            raise NonFiniteError(self._describe_non_finite(pending, loss, norm))
        progress = self.progress
        samples = int(pending.result.num_samples)
        progress.unique_samples += samples
        progress.seen_instances += samples * self.num_copies
        progress.target_tokens += int(pending.result.num_targets)
        progress.window_updates += 1
        progress.window_loss += loss
        if math.isfinite(norm):  # where it is not, the scaler skipped the step
            progress.window_norm += norm
            progress.window_clipped += int(self.max_norm is not None and norm > self.max_norm)
        self._show(loss * self.accelerator.num_processes)

    def _describe_non_finite(self, pending: _Pending, loss: float, norm: float) -> str:
        path, _ = find_checkpoint(self.folder / "checkpoints")
        ids = ", ".join(map(str, pending.sample_ids[:16])) + (" ..." if len(pending.sample_ids) > 16 else "")
        return (
            f"update {pending.update}: loss {loss}, gradient norm {norm}, not finite; samples {ids} "
            f"(rank {self.accelerator.process_index}). The last good checkpoint is {path or 'none'}; look at these "
            "samples, lower the learning rate, clip the gradient, or train in fp32"
        )

    def _close_window(self, lr: float) -> dict[str, Any]:
        progress = self.progress
        count = max(progress.window_updates, 1)
        loss = torch.tensor(progress.window_loss / count, dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            loss = self.accelerator.reduce(loss.float().to(self.accelerator.device), "sum")
        row = {
            "update": progress.update,
            "loss": float(loss),
            "lr": lr,
            "grad_norm": progress.window_norm / count,
            "clip_fraction": progress.window_clipped / count,
            "unique_samples": progress.unique_samples,
            "seen_instances": progress.seen_instances,
            "target_tokens": progress.target_tokens,
            "seconds": round(progress.seconds, 3),
        }
        progress.window_updates = progress.window_clipped = 0
        progress.window_loss = progress.window_norm = 0.0
        return row

    def _tick(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self._last_time
        self._last_time = now

    def _anywhere(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        flags = torch.tensor(int(flag), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flags, "sum"))

    def _show(self, loss: float) -> None:
        """Refresh the progress bar's figures: the newest loss, targets a second, samples met and their copies."""
        if self._bar is None:
            return
        elapsed = max(time.perf_counter() - self._loop_start, 1e-9)
        rate = (self.progress.target_tokens - self._tokens_at_start) / elapsed
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, {rate:,.0f} tokens/s, {self.progress.unique_samples:,} unique, "
            f"{self.progress.seen_instances:,} seen",
            refresh=False,
        )


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
            raise ValueError("the text is not the one that the run was begun with; start a new run for it")


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C or SIGTERM arrives; a second Ctrl-C interrupts at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Set the rate of the coming update: a schedule is a function of the update, and nobody else advances it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
