"""Updates of a training script, to be timed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from seqba.step import UpdateResult
from tasks.benchmark.options import BenchmarkOptions
from tasks.benchmark.ratios import Row, compare, wait_for_device
from tasks.run.options import TrainingOptions
from tasks.run.stream import BatchStream

Training = Callable[[Any], Iterator[tuple[UpdateResult, BatchStream]]]


class OwnUpdates:
    """The updates of a task's `training(options)`, in a run folder that is thrown away."""

    def __init__(self, training: Training, options: TrainingOptions[Any]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._run = training(options.changed(output_dir=f"{self._folder.name}/run"))

    def advance(self, count: int) -> tuple[int, float]:
        """Do `count` updates; returns their targets, copies counted, and seconds, until the device is done."""
        start, total = time.perf_counter(), 0
        for _ in range(count):
            result, self.stream = next(self._run)
            total += int(result.num_targets)
        wait_for_device()
        return total, time.perf_counter() - start

    def close(self) -> None:
        """End the run and remove its folder."""
        self._run.close()  # type: ignore[attr-defined]
        self._folder.cleanup()


def fused_over_single(config: BenchmarkOptions, many: OwnUpdates, one: OwnUpdates, wanted: str) -> list[Row]:
    """One fused update of M copies against M updates of one, on the same batches."""
    num_copies = config.ba_m
    count = max(1, config.updates // num_copies)
    ratio = compare(lambda: many.advance(count), lambda: one.advance(count * num_copies), pairs=config.pairs, warm_up=1)
    many.close()
    one.close()
    return [ratio.row(f"an update with fused M={num_copies} over {num_copies} updates with M=1 of the same B", wanted)]


def share_waiting(config: BenchmarkOptions, runs: Sequence[tuple[int, OwnUpdates]], wanted: str) -> list[Row]:
    """The share of an update in which the loop waits for its batches, in one run for each M."""
    shares = []
    for num_copies, own in runs:
        own.advance(2)
        waited, taken = own.stream.seconds_waited, own.stream.batches_taken
        _, seconds = own.advance(config.updates)
        waited, taken = own.stream.seconds_waited - waited, own.stream.batches_taken - taken
        shares.append((num_copies, waited / seconds, 1e3 * waited / taken))
        own.close()
    figure = ", ".join(f"M={m}: {share:.2%}" for m, share, _ in shares)
    detail = ", ".join(f"M={m}: mean {ms:.2f} ms a batch" for m, _, ms in shares)
    return [Row("share of an update spent waiting for data", figure, wanted, detail)]
