"""Updates to be timed: the training script's own, and a bare PyTorch loop's on the same batches."""

from __future__ import annotations

import itertools
import tempfile
import time

import torch
from torch import Tensor

from seqba.loss import count_targets
from tasks.benchmark.ratios import wait_for_device
from tasks.cli.machine import start_accelerator
from tasks.run.stream import SAMPLE_IDS
from tasks.translation.config import TranslationOptions
from tasks.translation.model import TranslationLoss
from tasks.translation.train import build, load_corpus, make_stream, training


class OwnUpdates:
    """The updates of `scripts/train_wmt.py`, in a run folder that is thrown away."""

    def __init__(self, options: TranslationOptions) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._run = training(options.changed(output_dir=f"{self._folder.name}/run"))

    def advance(self, count: int) -> tuple[int, float]:
        """Do `count` updates; returns their target tokens, copies counted, and seconds, until the device is done."""
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


class BareUpdates:
    """A plain PyTorch loop on batches that are already tensors on the device: the same model, loss and optimizer."""

    def __init__(self, options: TranslationOptions, num_batches: int) -> None:
        self._accelerator = start_accelerator(options.machine, seed=options.run.seed)
        corpus = load_corpus(options.config, self._accelerator)
        self._batches = make_stream(options, self._accelerator, corpus).take(num_batches)
        for batch in self._batches:
            del batch[SAMPLE_IDS]
        self._turns = itertools.cycle(self._batches)
        model = build(options.config, corpus, options.run.seed).to(self._accelerator.device)
        self._model = TranslationLoss(model, options.config.label_smoothing).train()
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=1e-5, betas=(0.9, 0.98), eps=1e-9, fused=True)

    def advance(self, count: int) -> None:
        """Do `count` updates; the device has finished then."""
        for batch in itertools.islice(self._turns, count):
            self._update(batch)
        wait_for_device()

    def _update(self, batch: dict[str, Tensor]) -> None:
        with self._accelerator.autocast():
            loss = self._model(batch) / count_targets(batch["labels"])
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
