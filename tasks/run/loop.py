"""The services of a training loop: when to log, validate, save and stop, and what a run folder gets.

A run folder holds `config.json`, `metrics.jsonl` (one object a logged update), `checkpoints/`, and at the end
`results.json`, `curve.png` and `model/`. A task's loop asks `Run`, which knows no task.
"""

import json
import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from tqdm import tqdm

from seqba.groups import CopyGroup
from seqba.step import UpdateResult
from tasks.cli.errors import RunError, writing
from tasks.cli.files import write_json
from tasks.cli.log import progress_bar
from tasks.cli.software import software
from tasks.run.checkpoints import Saver, Stateful, how_to_go_on
from tasks.run.folder import RunFolder
from tasks.run.guards import NonFiniteError, has_finite_weights, on_any_rank, stop_signals
from tasks.run.log import draw_curve, read_metrics
from tasks.run.options import RunOptions
from tasks.run.progress import NOISES, Figures, Progress

logger = logging.getLogger(__name__)


class Run:
    """One training run and its folder.

    Args:
        folder: made where it does not exist.
        config: all options, JSON values; a resumed run must have the same, `may_differ` aside.
        group: this rank's part in the M copies.
        figures: what the task measures.

    Raises:
        RunError: the folder already holds a run and `resume` is off, is resumed with another configuration, or cannot
            be written into. Nothing is written into it before `attach`, so that a start refused later does not stand in
            the way of the next.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        options: RunOptions,
        config: Mapping[str, Any],
        *,
        group: CopyGroup,
        figures: Figures,
        may_differ: Collection[str] = (),
    ) -> None:
        self.accelerator, self.folder, self.options = accelerator, folder, options
        self.group, self.figures = group, figures
        self.progress = Progress()
        self.interrupted = False
        self.measures_noise = bool(config.get("noise_every"))
        self._pending: UpdateResult | None = None  # of the newest update; reading its tensors waits for the device
        self._bar: tqdm | None = None
        self._saved_update: int | None = None
        self._last_time = time.perf_counter()
        self._sample_ids: Sequence[int] = ()
        # what accelerate was configured to, where no precision was asked for: a resumed run must have it again
        config = {**config, "mixed_precision": accelerator.mixed_precision, "software": software()}
        self._files = RunFolder(folder, config, resume=options.resume, may_differ={*may_differ, "software"})
        self._open_folder()

    # ---- the folder and its checkpoints

    def writing(self, path: Path) -> AbstractContextManager[None]:
        """Around what writes `path` once updates were done: a full disk becomes a `RunError` that says how to go on."""
        return writing(path, remedy=how_to_go_on(self._files.checkpoints))

    def _open_folder(self) -> None:
        problem = None
        if self.accelerator.is_main_process:
            try:
                self._files.open()
            except RunError as error:
                problem = str(error)
        (problem,) = broadcast_object_list([problem])
        if problem is not None:
            raise RunError(problem)

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        carried: Mapping[str, Stateful] | None = None,
        **parts: Stateful,
    ) -> None:
        """Name what a checkpoint holds, and begin: at update 1, or after the newest good checkpoint.

        Args:
            model: unwrapped.
            optimizer: averages that it keeps of the weights are part of a checkpoint.
            carried: what holds tensors of each rank's own, such as hidden states.
            parts: what has a position that all ranks share.

        Raises:
            RunError: the run cannot be continued from what the folder holds.
        """
        parts = {"progress": self.progress, **parts}
        folder, keep = self._files.checkpoints, self.options.keep_checkpoints
        self._saver = Saver(
            self.accelerator,
            folder,
            keep,
            model=model,
            optimizer=optimizer,
            parts=parts,
            carried=carried or {},
            group=self.group,
        )
        if self.options.resume:
            self._resume()
        if self.accelerator.is_main_process:
            self._files.begin(self.progress.update)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        path, damaged = self._saver.resume()
        for text in damaged:
            logger.info("skipped a damaged checkpoint: %s", text)
        if path is None:
            if left := [name for name in ("results.json", "model") if (self.folder / name).exists()]:
                raise RunError(
                    f"{self.folder} holds {' and '.join(left)} of a finished run, and no checkpoint to go on from: "
                    "it would be begun again and written over; give another --output-dir"
                )
            logger.info("nothing to resume from: starting at update 1")
            return
        progress = self.progress
        if progress.update > self.options.max_updates:
            raise RunError(
                f"{path} has done {progress.update} updates, more than --max-updates {self.options.max_updates}; raise "
                "it"
            )
        if progress.best_update is not None and not self._saver.is_good(progress.best_update):
            gone = progress.best_update
            if progress.update == self.options.max_updates and (self.folder / "results.json").exists():
                raise RunError(
                    f"the best checkpoint, of update {gone}, is gone, and no update is left to find another: restore "
                    "it from a copy, or raise --max-updates"
                )
            logger.info("the best checkpoint, of update %d, is gone: the best from here on is kept", gone)
            progress.best_update = progress.best_value = None
        self._saved_update = progress.update
        logger.info("resumed at update %d from %s", progress.update, path)

    def save(self) -> None:
        """Write a checkpoint of the present update, unless it has one.

        Raises:
            NonFiniteError: a weight is nan or infinite; such a checkpoint would push a good one out.
            RunError: the disk is full; the earlier checkpoints are intact.
        """
        self._read_pending()
        if self._saved_update == self.progress.update:
            return
        if not has_finite_weights(self._saver.model):
            raise self._non_finite(f"the weights after update {self.progress.update} are not finite")
        best = self.progress.best_update
        self._saver.save(self.progress.update, pinned=() if best is None else (best,))
        self._saved_update = self.progress.update

    def load_best(self) -> None:
        """Put the model and the optimizer back to the update whose validation was best."""
        best = self.progress.best_update
        if best is not None and best != self.progress.update:
            self._saver.load(best)

    def start_trackers(self, project: str) -> None:
        """Start the tracker of `--report-to`; it gets all options as its configuration, and the folder's name."""
        config = {
            name: value if isinstance(value, (int, float, str, bool)) else str(value)
            for name, value in self._files.config.items()
        }
        with self.writing(self.folder):
            self.accelerator.init_trackers(project, config, {"wandb": {"name": self.folder.name}})

    # ---- the loop

    def updates(self) -> Iterator[int]:
        """The numbers of the updates still to do, until the last one, or until Ctrl-C or SIGTERM.

        A stop is honoured between updates: the loop ends, a checkpoint is saved, `interrupted` is set.
        """
        self._last_time = time.perf_counter()
        self._loop_start, self._targets_at_start = self._last_time, self.progress.targets
        self._bar = progress_bar(
            "update", self.options.max_updates, self.accelerator.is_main_process, initial=self.progress.update
        )
        with stop_signals() as stop, self._bar:
            while self.progress.update < self.options.max_updates:
                yield self.progress.update + 1
                self._bar.update(self.progress.update - self._bar.n)
                if on_any_rank(bool(stop), self.accelerator.device):
                    self.interrupted = True
                    break
            self._tick()
            self.save()
        if self.interrupted:
            self.accelerator.end_training()
            logger.info("stopped after update %d; the same command with --resume continues it", self.progress.update)

    def record(self, update: int, result: UpdateResult, sample_ids: Sequence[int]) -> None:
        """Count a finished update; `sample_ids` are the samples that this rank gave to it.

        Raises:
            NonFiniteError: an update's loss or gradient is nan or infinite. On an accelerator this is seen one
                update later, so that nothing waits for it; always before a checkpoint is written.
        """
        self._read_pending()
        self.progress.update, self._pending, self._sample_ids = update, result, sample_ids
        if self.accelerator.device.type == "cpu":
            self._read_pending()

    def is_due(self, every: int) -> bool:
        """Whether something with this cadence happens after the present update; always after the last one."""
        return self.progress.update % every == 0 or self.progress.update == self.options.max_updates

    @property
    def must_validate(self) -> bool:
        """Whether a validation is due after the present update."""
        return self.is_due(self.options.eval_every)

    def log(self, validation: Mapping[str, float] | None = None, **columns: Any) -> None:
        """Write a metrics row where one is due, and note a validation.

        Args:
            validation: its figures by name, `figures.metric` among them; None where there was none.
            columns: what else the row says, such as the learning rate.

        Raises:
            NonFiniteError: a figure of the validation is nan or infinite.
        """
        if validation is None and not self.is_due(self.options.log_every):
            return
        self._read_pending()
        self._tick()
        progress = self.progress
        row = progress.close_window(self.figures, {**columns, **progress.noises(self.measures_noise)})
        for name, value in (validation or {}).items():
            if not math.isfinite(value):
                raise self._non_finite(f"the validation's {name} after update {progress.update} is {value}")
            row[name] = value
        if validation is not None and self.figures.is_better(validation[self.figures.metric], progress.best_value):
            progress.best_value, progress.best_update = validation[self.figures.metric], progress.update
        if validation is not None:
            best = " (the best so far)" if progress.best_update == progress.update else ""
            logger.info("update %d: %s%s", progress.update, _words(validation), best)
        if self.accelerator.is_main_process:
            with self.writing(self._files.metrics_file), self._files.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
        self.accelerator.log({k: v for k, v in row.items() if k != "update" and v is not None}, step=row["update"])

    def save_if_due(self) -> None:
        """Save at the cadence, and whenever the validation is the best so far."""
        if self.is_due(self.options.save_every) or self.progress.best_update == self.progress.update:
            self.save()

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write `results.json` and `curve.png`."""
        self._tick()
        if self.accelerator.is_main_process:
            shared = {
                "updates": self.progress.update,
                "best_update": self.progress.best_update,
                self.figures.metric: self.progress.best_value,
                **self.progress.counts(self.figures),
                "num_copies": self.group.num_copies,
                "num_processes": self.accelerator.num_processes,
                "ranks_per_group": self.group.ranks_per_group,
                "num_threads": torch.get_num_threads(),
                "seconds": self.progress.seconds,
            }
            rows = read_metrics(self._files.metrics_file)
            with self.writing(self.folder):
                draw_curve(rows, self.folder / "curve.png", title=self.folder.name, figures=self.figures)
                write_json(self.folder / "results.json", {**shared, **results})
            if self.progress.best_update is not None:
                found = _words({self.figures.metric: self.progress.best_value})
                logger.info("best validation: %s, at update %d", found, self.progress.best_update)
        self.accelerator.end_training()

    # ---- inside

    def _read_pending(self) -> None:
        result, self._pending = self._pending, None
        if result is None:
            return
        loss, norm = float(result.loss), float(result.grad_norm)
        # with fp16 an infinite gradient is the loss scaler's business: it skips the step and scales down
        if not math.isfinite(loss) or (self.accelerator.scaler is None and not math.isfinite(norm)):
            raise self._non_finite(f"update {self.progress.update}: loss {loss}, gradient norm {norm}, not finite")
        samples, targets = int(result.num_samples), int(result.num_targets)
        self.progress.count(
            loss, norm, samples, targets, num_copies=self.group.num_copies, max_norm=self.options.max_norm
        )
        for name in NOISES if self.measures_noise else ():
            self.progress.note(name, getattr(result, name))
        self._show(loss)

    def _non_finite(self, what: str) -> NonFiniteError:
        """The error for `what`, with the samples of the newest update."""
        ids, rank = self._sample_ids, self.accelerator.process_index
        return NonFiniteError(what, sample_ids=ids, rank=rank, checkpoint=self._saver.newest())

    def _tick(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self._last_time
        self._last_time = now

    def _show(self, loss: float) -> None:
        """Refresh the progress bar's figures: the newest loss, targets a second (of all copies), samples, instances."""
        if self._bar is None:
            return
        elapsed = max(time.perf_counter() - self._loop_start, 1e-9)
        rate = (self.progress.targets - self._targets_at_start) / elapsed
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, {rate:,.0f} {self.figures.target}s/s with copies, "
            f"{self.progress.unique_samples:,} samples, {self.progress.seen_instances:,} with copies",
            refresh=False,
        )


def _words(figures: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Set the rate of the coming update: a schedule is a function of the update, and nobody else advances it."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
