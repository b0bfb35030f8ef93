"""The updates of transformers' `Seq2SeqTrainer` on the same model, text, precision, threads and logging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from seqba.loss import count_targets
from tasks.benchmark.trainer import time_updates
from tasks.cli.machine import start_accelerator
from tasks.translation.config import TranslationOptions
from tasks.translation.data import lengths
from tasks.translation.train import build, load_corpus, make_stream

_WARM_UP = 2  # updates of every `train` call that are not timed


class Seq2SeqTrainerUpdates:
    """Updates of `Seq2SeqTrainer` with length-grouped batches of B samples.

    B is the number for which the mean padded tokens of an update are nearest to those of the training script's
    token budget; `padded_tokens` holds both means, the training script's first.
    """

    def __init__(self, options: TranslationOptions) -> None:
        accelerator = start_accelerator(options.machine, seed=options.run.seed)
        corpus = load_corpus(options.config, accelerator)
        self._options, self._corpus = options, corpus
        batches = list(make_stream(options, accelerator, corpus).sampler)
        sides = np.stack([lengths(corpus.train, side) for side in ("input_ids", "labels")], axis=1)
        self.batch_size, padded = _matching_batch_size(batches, sides, corpus.train_lengths.tolist())
        self.padded_tokens = (_padded(batches, sides), padded)
        self._model = build(options.config, corpus, options.run.seed)
        self.num_workers = 0

    def tune(self) -> None:
        """Take the number of loader workers with which it is fastest."""
        rates = {}
        for self.num_workers in (0, 1, 2):
            tokens, seconds = self.advance(8)
            rates[self.num_workers] = tokens / seconds
        self.num_workers = max(rates, key=rates.__getitem__)

    def advance(self, count: int) -> tuple[int, float]:
        """Do `count` updates; returns their target tokens and seconds, without what `train` does before them."""
        run = self._options.run
        trainer, seconds = time_updates(
            _Counting,
            count,
            self._options.machine,
            warm_up=_WARM_UP,
            settings={
                "per_device_train_batch_size": self.batch_size,
                "label_smoothing_factor": self._options.config.label_smoothing,
                "adam_beta2": 0.98,
                "adam_epsilon": 1e-9,
                "train_sampling_strategy": "group_by_length",
                "length_column_name": "length",
                "dataloader_num_workers": self.num_workers,
                "dataloader_persistent_workers": self.num_workers > 0,
                "logging_steps": run.log_every,
                "seed": run.seed,
                "gradient_accumulation_steps": run.accumulation,
            },
            model=self._model,
            train_dataset=self._corpus.train,
            data_collator=DataCollatorForSeq2Seq(self._corpus.tokenizer, model=self._model),
            processing_class=self._corpus.tokenizer,
        )
        return trainer.targets, seconds


class _Counting(Seq2SeqTrainer):
    """Counts the target tokens of the updates that are timed."""

    targets = 0

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if self.state.global_step >= _WARM_UP:
            self.targets += int(count_targets(inputs["labels"]))
        return super().training_step(model, inputs, *args, **kwargs)


def _padded(batches: Sequence[Sequence[int]], sides: np.ndarray) -> float:
    """Mean padded tokens of a batch, both sides."""
    return float(np.mean([len(batch) * sides[batch].max(axis=0).sum() for batch in batches]))


def _matching_batch_size(batches: Sequence[Sequence[int]], sides: np.ndarray, lengths: list[int]) -> tuple[int, float]:
    """The B whose batches' mean padded tokens are nearest, and that mean."""
    wanted, mean = _padded(batches, sides), round(len(lengths) / len(batches))
    found: dict[int, float] = {}
    for size in range(max(1, mean - 8), mean + 9):
        order = list(LengthGroupedSampler(size, lengths=lengths, generator=torch.Generator().manual_seed(0)))
        found[size] = _padded([order[i : i + size] for i in range(0, len(order), size)], sides)
    return min(found.items(), key=lambda item: abs(item[1] - wanted))
