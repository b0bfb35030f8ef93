"""Train an image classifier, M copies of every image in an update: the loop, top to bottom."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from seqba.audit.state import undisturbed
from seqba.groups import CopyGroup
from seqba.modules import GhostBatchNorm2d, convert_ghost_batch_norm
from seqba.sampler import FixedBatchSampler
from seqba.schedule import cosine, step_decay
from seqba.step import TrainStep, UpdateResult
from seqba.transforms import Compose, Mixup
from tasks.cli.errors import DataError, UserError, reason_of
from tasks.cli.machine import start_accelerator
from tasks.cli.software import describe_machine
from tasks.models.audit import refuse_identical_copies
from tasks.run.checkpoints import SameData
from tasks.run.guards import INTERRUPTED
from tasks.run.loop import Run, set_learning_rate
from tasks.run.progress import Figures
from tasks.run.stream import SAMPLE_IDS, BatchStream
from tasks.vision.augment import Views, device_transform, why_not_on_device, worker_transform
from tasks.vision.config import VisionConfig, VisionOptions, may_differ, run_folder
from tasks.vision.contact_sheet import draw_contact_sheet
from tasks.vision.data import ImageSplits, load_images
from tasks.vision.evaluate import evaluate
from tasks.vision.loss import VisionLoss, count_labels, summed_loss
from tasks.vision.model_folder import Classifier, save_classifier
from tasks.vision.networks import build_model, parameter_groups
from tasks.vision.networks.cells import CellNetwork, set_drop_path
from tasks.vision.networks.manifold_mixup import mixing_layer, mixing_layers
from tasks.vision.pipelines import Batch, DevicePipeline, Pipeline, WorkerPipeline

logger = logging.getLogger(__name__)

FIGURES = Figures(
    target="label",
    loss="loss (nats per image)",
    training="training (under T, as it is minimised)",
    metric="valid_accuracy",
    higher_is_better=True,
)

_AUDITED = 4  # images on which the copies are compared


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
    config, copies, folder = options.config, options.copies, Path(run_folder(options))
    accelerator = start_accelerator(
        options.machine, seed=options.run.seed, report_to=options.run.report_to, folder=folder
    )

    group = options.group(accelerator)

    # ---- data and model
    images = load_splits(config)
    for split, held in (("validation", images.valid), ("test", images.test)):
        held.refuse_damaged(split, options.run.num_workers)
    views = Views.of(config, images)
    pipeline = make_pipeline(options, accelerator, images, views, group.copies)
    if copies.noise_every and isinstance(pipeline, WorkerPipeline) and len(group.copies) < 2:
        raise UserError(
            f"--noise-every {copies.noise_every} needs two copies on each rank where T runs in the loader: give --ba-m "
            "of at least 2 a rank, or --pipeline device"
        )
    stream = make_stream(options, accelerator, pipeline, group)
    epoch = len(stream.sampler) // options.run.accumulation  # updates
    end = options.run.max_updates  # where rate and drop path come to, though the run may stop before
    if config.epochs is not None:
        end = max(1, round(config.epochs * epoch))
        options = options.changed(max_updates=min(options.run.max_updates, end))
    model = build(config, len(images.classes), options.run.seed, copies.ba_m)
    layers = mixing_layers(model, config.network) if config.manifold_mixup else []
    loss_model = VisionLoss(model, config.label_smoothing, layers)
    sgd = torch.optim.SGD(
        parameter_groups(loss_model, config.weight_decay, config.decay_bias_and_norm),
        lr=config.learning_rate,
        momentum=config.momentum,
    )
    wrapped, optimizer = accelerator.prepare(loss_model, sgd)
    batch = pipeline.take_copies(pipeline.first(_AUDITED, epoch=0), group.copies[:1])
    rehearse(config, loss_model, batch)
    if copies.ba_m > 1 and not copies.allow_identical_copies and not config.is_random:
        refuse_identical_copies(loss_model, batch, lambda model, rows: model(rows)[0], "--flip")
    run = Run(
        accelerator,
        folder,
        options.run,
        options.as_json(),
        group=group,
        figures=FIGURES,
        may_differ=may_differ(config),
    )
    step = TrainStep(
        accelerator,
        wrapped,
        optimizer,
        loss_fn=summed_loss,
        count_fn=count_labels,
        num_copies=copies.ba_m,
        copies_per_pass=copies.copies_per_pass,
        ranks_per_group=group.ranks_per_group,
        reduce_every_pass=options.run.reduce_every_pass or None,
        max_norm=options.run.max_norm,
        copy_seed=options.run.seed if copies.reproducible_copies else None,
        noise_every=copies.noise_every,
        take_copies=pipeline.take_copies,
    )
    rate = learning_rate(config, epoch, copies.ba_m, end)
    _describe(options, accelerator, pipeline, epoch, rate(1))
    run.start_trackers("vision")
    run.attach(model, optimizer, data=SameData(images.fingerprint), stream=stream, step=step)
    if accelerator.is_main_process:
        with run.writing(folder):
            draw_contact_sheet(folder / "transforms.png", pipeline, views, group.copies)

    workers = options.run.num_workers

    # ---- the loop
    for update in run.updates():
        batches = stream.take(options.run.accumulation)
        sample_ids = [n for batch in batches for n in batch.pop(SAMPLE_IDS).tolist()]
        if layers:
            for batch in batches:
                batch["layer"] = mixing_layer(options.run.seed, update, len(layers))
        lr = set_learning_rate(optimizer, rate(update))
        if config.drop_path:
            set_drop_path(model, config.drop_path * update / end)
        if config.weight_decay_epochs is not None and update > config.weight_decay_epochs * epoch:
            for decayed in optimizer.param_groups:
                decayed["weight_decay"] = 0.0
        result = step(batches, update=update)
        run.record(update, result, sample_ids)
        validation = None
        if run.must_validate:
            validation = evaluate(
                accelerator, loss_model, images.valid, views, config.eval_batch_size, "valid", workers
            )
        run.log(validation, lr=lr)
        run.save_if_due()
        yield result, stream
    if run.interrupted:
        raise SystemExit(INTERRUPTED)

    # ---- the result: the checkpoint with the highest validation accuracy, scored once on the test images
    run.load_best()
    best = run.progress.best_update or run.progress.update
    with run.writing(folder):
        test = evaluate(accelerator, loss_model, images.test, views, config.eval_batch_size, "test", workers)
        score = f"top-1 accuracy {test['test_accuracy']:.2%}, {test['test_loss']:.4f} nats per image"
        if accelerator.is_main_process:
            made_by = {
                "data": images.description,
                "updates": f"{best:,} (the checkpoint with the highest validation accuracy)",
                **describe_training(options),
                **describe_machine(run.accelerator),
            }
            classifier = Classifier(config.network, model, images.classes, views)
            save_classifier(folder / "model", classifier, made_by=made_by, scores=[score])
    run.finish(test)
    logger.info(f"test: {score}, {len(images.test):,} images, each seen once")
    logger.info(f"{run.folder}: model/, curve.png, transforms.png, results.json, metrics.jsonl")


def load_splits(config: VisionConfig) -> ImageSplits:
    """Read or draw the images; a `DataError` says what cannot be read."""
    return load_images(
        config.data,
        seed=config.corpus_seed,
        train_images=config.train_images,
        valid_images=config.valid_images,
        skip_corrupt=config.on_corrupt == "skip",
        in_memory=config.image_size is None,
    )


def make_pipeline(
    options: VisionOptions, accelerator: Accelerator, images: ImageSplits, views: Views, copies: tuple[int, ...]
) -> Pipeline:
    """T on the device, where it and the data allow it, else in the loader.

    Raises:
        UserError: --pipeline device, and something keeps it from the device.
    """
    config, seed = options.config, options.run.seed
    mixup = Mixup(config.mixup_alpha) if config.mixup_alpha else None
    reason = why_not_on_device(config, images)
    if config.pipeline == "device" and reason is not None:
        raise UserError(f"--pipeline device is not possible: {reason}; leave it out, or give --pipeline workers")
    if reason is None and config.pipeline != "workers":
        return DevicePipeline(images.train, seed, mixup, accelerator.device, device_transform(config, views))
    finish = Compose([]) if config.cutout else views.normalize
    return WorkerPipeline(
        images.train, seed, mixup, accelerator.device, worker_transform(config, views), copies, finish
    )


def make_stream(options: VisionOptions, accelerator: Accelerator, pipeline: Pipeline, group: CopyGroup) -> BatchStream:
    """This rank's batches of B images; fewer images than a batch are a `DataError`."""
    config, run = options.config, options.run
    try:
        sampler = FixedBatchSampler(
            len(pipeline.images),
            config.batch_size,
            seed=run.seed,
            num_shards=group.num_groups,
            shard=group.index,
            batches_per_update=run.accumulation,
        )
    except ValueError:
        raise DataError(
            f"{len(pipeline.images):,} training images do not fill a batch of --batch-size {config.batch_size}"
        ) from None
    where: dict[str, Any] = {"device": accelerator.device, "seed": run.seed, "num_workers": run.num_workers}
    if isinstance(pipeline, WorkerPipeline) and (channel := options.channel(accelerator)) is not None:
        where |= {"transform": pipeline.decode, "channel": channel, "received": pipeline.receive}
        return BatchStream(pipeline.dataset, sampler, pipeline.collate_decoded, **where)
    return BatchStream(pipeline.dataset, sampler, pipeline.collate, **where, transform=pipeline.load)


def build(config: VisionConfig, num_classes: int, seed: int, num_copies: int = 1) -> nn.Module:
    """A network with new weights, equal on all ranks; the generators are seeded for the masks afterwards.

    Raises:
        UserError: there is no such network, or no batch norm or drop path in it where these are asked for.
    """
    torch.manual_seed(seed)
    model = build_model(config.network, num_classes)
    if config.drop_path:
        if not isinstance(model, CellNetwork):
            raise UserError(f"--drop-path {config.drop_path}: {config.network} has none, only darts and amoebanet have")
        set_drop_path(model, config.drop_path)  # for the audit of its copies; the loop sets each update's
    if config.ghost_batch_size is not None:
        convert_ghost_batch_norm(model, config.ghost_batch_size or None)
        if config.ghost_batch_size and not any(isinstance(x, GhostBatchNorm2d) for x in model.modules()):
            raise UserError(f"--ghost-batch-size: {config.network} has no batch norm over images; leave it out")
    elif num_copies > 1 and any(isinstance(x, nn.BatchNorm2d) for x in model.modules()):
        logger.info(
            "batch norm sees all copies of a pass together, so that the number of copies in a pass changes a run; "
            "--ghost-batch-size 0 normalises each copy by itself"
        )
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.compile:
        model.compile()
    set_seed(seed, device_specific=True)
    return model


def rehearse(config: VisionConfig, loss_model: VisionLoss, batch: Batch) -> None:
    """Run some images through the network, in both modes; it is as it was afterwards.

    Raises:
        UserError: it does not take them.
    """
    try:
        with undisturbed(loss_model):
            loss_model.train()(batch)
            loss_model.eval()(batch)
    except Exception as error:  # of any network, by any layer
        height, width = batch["images"].shape[2:]
        raise UserError(
            f"--network {config.network} does not take images of {height} x {width} pixels: {reason_of(error)}; give "
            "--image-size, or another network"
        ) from error


def learning_rate(config: VisionConfig, epoch: int, num_copies: int, end: int) -> Callable[[int], float]:
    """The rate of each update: drops after epochs of `epoch` updates or a cosine to `end`; M to the power asked for."""
    base, warmup = config.learning_rate * num_copies**config.lr_power, round(config.warmup_epochs * epoch)
    if config.lr_decay == "cosine":
        return partial(cosine, peak_lr=base, warmup_updates=warmup, total_updates=end)
    boundaries = [max(1, round(drop * epoch)) for drop in config.lr_drops]
    if len(set(boundaries)) < len(boundaries):
        raise UserError(
            f"--lr-drops {' '.join(map(str, config.lr_drops))}: two of them fall on one update, as an epoch has {epoch}"
        )
    factors = config.lr_factors if len(config.lr_factors) > 1 else config.lr_factors * len(config.lr_drops)
    return lambda update: step_decay(
        update,
        base_lr=base,
        boundaries=boundaries,
        factor=factors,
        warmup_updates=warmup,
    )


def describe_training(options: VisionOptions) -> dict[str, str]:
    """How a network was made, for its card."""
    config, copies = options.config, options.copies
    passes = f"copies per pass {copies.copies_per_pass}, reproducible copies {copies.reproducible_copies}"
    return {
        "copies of each image in an update, M": f"{copies.ba_m} ({passes})",
        "batch": f"{config.batch_size} images before repetition, times {options.run.accumulation} a rank",
        "the random transform T": config.transform,
    }


def _describe(
    options: VisionOptions, accelerator: Accelerator, pipeline: Pipeline, epoch: int, first_rate: float
) -> None:
    """Say what is trained, and what an update sees."""
    config, num_copies = options.config, options.copies.ba_m
    unique = config.batch_size * options.group(accelerator).num_groups * options.run.accumulation
    where = "on the device" if isinstance(pipeline, DevicePipeline) else f"in {options.run.num_workers} workers"
    logger.info(
        f"{config.network}, M = {num_copies}, {accelerator.num_processes} process(es), {torch.get_num_threads()} "
        f"threads on {accelerator.device}; T {where}: {config.transform}"
    )
    logger.info(
        f"an update has {unique:,} unique images, each {num_copies} times; {epoch:,} updates an epoch; "
        f"{len(pipeline.images) % config.batch_size} images of each are left out; {options.run.max_updates:,} updates"
    )
    power = f"times M to the power {config.lr_power}" if config.lr_power else "whatever M is"
    logger.info(f"the learning rate begins at {first_rate:g}, {power}")
