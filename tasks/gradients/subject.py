"""A run as what a look at its gradients asks of it: a model, batches, and the loss of rows of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tasks.cli.errors import UserError
from tasks.cli.machine import MachineOptions
from tasks.language_modelling import config as language_config
from tasks.language_modelling import loss as language_loss
from tasks.language_modelling import train as language_train
from tasks.run.options import BatchAugmentationArguments, RunOptions, TrainingOptions
from tasks.run.stream import SAMPLE_IDS, BatchStream
from tasks.translation import config as translation_config
from tasks.translation import model as translation_model
from tasks.translation import train as translation_train
from tasks.vision import config as vision_config
from tasks.vision import loss as vision_loss
from tasks.vision import train as vision_train
from tasks.vision.augment import Views

PLAIN = -1  # the view of an image without T


@dataclass(frozen=True)
class Subject:
    """A task's model, data and loss.

    Attributes:
        model: whose weights checkpoints hold; new ones, of the run's seed.
        loss_model: the same with its loss inside, which `loss_of` takes.
        stream: the run's own batches, from its first on.
        take: (batch, view) -> rows, each sample once; under T number `view`, which is PLAIN for none.
        loss_of: (loss_model, rows) -> nats, summed over the rows' targets.
        count: rows -> targets.
        row_loss: where rows are images: (logits (1, classes), label (1,)) -> nats; per-sample gradients are vectorised.
    """

    model: nn.Module
    loss_model: nn.Module
    stream: BatchStream
    take: Callable[[Any, int], dict[str, Any]]
    loss_of: Callable[[nn.Module, Any], Tensor]
    count: Callable[[Any], Tensor | int]
    row_loss: Callable[[Tensor, Tensor], Tensor] | None = None


def load_subject(folder: Path, accelerator: Accelerator, num_views: int) -> Subject:
    """The task, data and new model of a run folder of the three training scripts.

    Raises:
        UserError: it holds no such run, or its data cannot be read.
    """
    try:
        given = json.loads((folder / "config.json").read_text("utf-8"))
        kind = next(task for name, task in _TASKS.items() if name in given)
    except (OSError, ValueError, TypeError, StopIteration) as error:
        raise UserError(
            f"--run {folder} holds no config.json of train_wmt.py, train_ptb.py or train_vision.py; give a run folder"
        ) from error
    config_class, make = kind
    parts = (config_class, BatchAugmentationArguments, RunOptions, MachineOptions)
    values = [{x.name: given[x.name] for x in fields(part) if x.name in given} for part in parts]
    values[1] |= {"ba_m": num_views, "copies_per_pass": 1, "ranks_per_group": 1}
    values[2] |= {"accumulation": 1, "num_workers": 0}
    options: Any = TrainingOptions(*(part(**named) for part, named in zip(parts, values, strict=True)))
    return make(options, accelerator)


def _translation(options: Any, accelerator: Accelerator) -> Subject:
    corpus = translation_train.load_corpus(options.config, accelerator)
    model = translation_train.build(options.config, corpus, options.run.seed).to(accelerator.device)
    loss_model = translation_model.TranslationLoss(model, options.config.label_smoothing)
    stream = translation_train.make_stream(options, accelerator, corpus)
    return Subject(model, loss_model, stream, _same, translation_model.summed_loss, translation_model.count_labels)


def _language(options: Any, accelerator: Accelerator) -> Subject:
    config = options.config
    corpus = language_train.load_corpus(config.data, corpus_seed=config.corpus_seed, vocab_size=config.vocab_size)
    model = language_train.build(config, corpus, options.run.seed).to(accelerator.device)
    loss_model = language_loss.LanguageModelLoss(model, alpha=config.alpha, beta=config.beta)
    stream = language_train.make_stream(options, accelerator, corpus)
    # windows begin with the initial state: none was carried to them
    return Subject(model, loss_model, stream, _same, lambda m, rows: m(rows)[0], language_loss.count_labels)


def _vision(options: Any, accelerator: Accelerator) -> Subject:
    config = options.config
    images = vision_train.load_splits(config)
    views, group = Views.of(config, images), options.group(accelerator)
    pipeline = vision_train.make_pipeline(options, accelerator, images, views, group.copies)
    model = vision_train.build(config, len(images.classes), options.run.seed).to(accelerator.device)
    loss_model = vision_loss.VisionLoss(model, config.label_smoothing)

    def take(batch: Any, view: int) -> dict[str, Any]:
        if view != PLAIN:
            return pipeline.take_copies(batch, (view,))
        shown = [views.evaluation(images.train[n]["image"]) for n in batch["keys"][:, 2].tolist()]
        return {"images": views.normalize(torch.stack(shown).to(accelerator.device)), "labels": batch["labels"]}

    def row_loss(logits: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, label, label_smoothing=config.label_smoothing)

    stream = vision_train.make_stream(options, accelerator, pipeline, group)
    row = None if config.mixup_alpha else row_loss
    return Subject(model, loss_model, stream, take, vision_loss.summed_loss, vision_loss.count_labels, row)


def _same(batch: Any, view: int) -> dict[str, Any]:
    """T is inside the network."""
    return {name: x for name, x in batch.items() if name != SAMPLE_IDS}


# by an option that only this task has
_TASKS: dict[str, tuple[Any, Callable[[Any, Accelerator], Subject]]] = {
    "network": (vision_config.VisionConfig, _vision),
    "bptt": (language_config.LanguageModelConfig, _language),
    "warmup_updates": (translation_config.TranslationConfig, _translation),
}
