"""Train an image classifier, M copies of every image in an update: the loop, top to bottom."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from seqba.groups import CopyGroup
from seqba.modules import convert_ghost_batch_norm
from seqba.sampler import FixedBatchSampler
from seqba.schedule import step_decay
from seqba.step import TrainStep, UpdateResult
from tasks.cli.errors import DataError
from tasks.cli.machine import start_accelerator
from tasks.models.audit import refuse_identical_copies
from tasks.run.checkpoints import SameData
from tasks.run.guards import INTERRUPTED
from tasks.run.loop import Run, set_learning_rate
from tasks.run.progress import Figures
from tasks.run.stream import SAMPLE_IDS, BatchStream
from tasks.vision.config import MAY_DIFFER_HERE, VisionConfig, VisionOptions, run_folder
from tasks.vision.data.sources import ImageSplits, load_images
from tasks.vision.loss import VisionLoss, count_labels, summed_loss
from tasks.vision.networks import build_model, parameter_groups

logger = logging.getLogger(__name__)

FIGURES = Figures(
    target="label",
    loss="loss (nats per image)",
    training="training (under T, with label smoothing)",
    metric="valid_accuracy",
    higher_is_better=True,
)


def train(options: VisionOptions) -> None:
    """Train from images to a model folder with its top-1 accuracy on the test images.

    Raises:
        UserError: options, data or the run folder cannot be used, and nothing was trained; or a run ended in its midst,
            by a loss that is not finite or a disk that is full: its last good checkpoint is kept.
        SystemExit: the run was stopped by Ctrl-C or SIGTERM, after it was saved.
    """
    for _ in training(options):
        pass


def training(options: VisionOptions) -> Iterator[tuple[UpdateResult, BatchStream]]:
    """`train`, which hands back control after every update; closed early, it leaves an unfinished run."""
    config, copies = options.config, options.copies
    folder = Path(run_folder(options))
    accelerator = start_accelerator(
        options.machine, seed=options.run.seed, report_to=options.run.report_to, folder=folder
    )

    # ---- data and model
    images = load_images(
        config.data,
        seed=config.corpus_seed,
        train_images=config.train_images,
        valid_images=config.valid_images,
        on_corrupt=config.on_corrupt,
    )
    group = CopyGroup.of(accelerator, copies.ba_m)
    pipeline = make_pipeline(options, accelerator, images, group.copies)
    stream = make_stream(options, accelerator, pipeline, group)
    updates_an_epoch = len(stream.sampler) // options.run.accumulation
    options = end_of_run(options, updates_an_epoch)
    run = Run(
        accelerator,
        folder,
        options.run,
        options.as_json(),
        num_copies=copies.ba_m,
        figures=FIGURES,
        may_differ=MAY_DIFFER_HERE,
    )
    model = build(config, images, options.run.seed)
    loss_model = VisionLoss(model, config.label_smoothing)
    sgd = torch.optim.SGD(
        parameter_groups(loss_model, config.weight_decay, config.decay_bias_and_norm),
        lr=config.learning_rate,
        momentum=config.momentum,
    )
    wrapped, optimizer = accelerator.prepare(loss_model, sgd)
    step = TrainStep(
        accelerator,
        wrapped,
        optimizer,
        loss_fn=summed_loss,
        count_fn=count_labels,
        num_copies=copies.ba_m,
        copies_per_pass=copies.copies_per_pass,
        max_norm=options.run.max_norm,
        copy_seed=options.run.seed if copies.reproducible_copies else None,
        take_copies=pipeline.take_copies,
    )
    _describe(options, accelerator, images, updates_an_epoch)
    with run.writing(folder):
        accelerator.init_trackers("vision", config=None)
    run.attach(model, optimizer, data=SameData(images.fingerprint), stream=stream, step=step)

    # ---- the loop
    rate = learning_rate(config, updates_an_epoch, copies.ba_m)
    for update in run.updates():
        batches = stream.take(options.run.accumulation)
        sample_ids = [n for batch in batches for n in batch.pop(SAMPLE_IDS).tolist()]
        lr = set_learning_rate(optimizer, rate(update))
        set_weight_decay(optimizer, config, update, updates_an_epoch)
        result = step(batches, update=update)
        run.record(update, result, sample_ids)
        validation = evaluate(...) if run.must_validate else None
        run.log(validation, lr=lr)
        run.save_if_due()
        yield result, stream
    if run.interrupted:
        raise SystemExit(INTERRUPTED)
