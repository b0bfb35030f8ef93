"""A bare PyTorch loop on the batches of a training run, to be timed beside it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from seqba.loss import count_targets
from tasks.benchmark.ratios import wait_for_device
from tasks.cli.machine import start_accelerator
from tasks.run.stream import SAMPLE_IDS
from tasks.translation.config import TranslationOptions
from tasks.translation.model import TranslationLoss
from tasks.translation.train import build, load_corpus, make_stream


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
