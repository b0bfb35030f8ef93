"""Train an image classifier, M copies of every image in an update: the loop, top to bottom."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from seqba.groups import CopyGroup
from seqba.step import TrainStep, UpdateResult
from tasks.cli.machine import start_accelerator
from tasks.run.checkpoints import SameData
from tasks.run.guards import INTERRUPTED
from tasks.run.loop import Run, set_learning_rate
from tasks.run.progress import Figures
from tasks.run.stream import SAMPLE_IDS, BatchStream
from tasks.vision.config import MAY_DIFFER_HERE, VisionOptions, run_folder
from tasks.vision.data.sources import load_images
from tasks.vision.loss import VisionLoss, count_labels, summed_loss
from tasks.vision.networks import parameter_groups

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
        skip_corrupt=config.on_corrupt == "skip",
    )
    group = CopyGroup.of(accelerator, copies.ba_m)
    pipeline = make_pipeline(options, accelerator, images, group.copies)
    stream = make_stream(options, accelerator, pipeline, group)
    epoch = len(stream.sampler) // options.run.accumulation  # updates
    if config.epochs is not None:
        options = options.changed(max_updates=min(options.run.max_updates, max(1, round(config.epochs * epoch))))
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
    _describe(options, accelerator, images, epoch)
    with run.writing(folder):
        accelerator.init_trackers("vision", config=None)
    run.attach(model, optimizer, data=SameData(images.fingerprint), stream=stream, step=step)

    # ---- the loop
    rate = learning_rate(config, epoch, copies.ba_m)
    for update in run.updates():
        batches = stream.take(options.run.accumulation)
        sample_ids = [n for batch in batches for n in batch.pop(SAMPLE_IDS).tolist()]
        lr = set_learning_rate(optimizer, rate(update))
        set_weight_decay(optimizer, config, update, epoch)
        result = step(batches, update=update)
        run.record(update, result, sample_ids)
        validation = None
        if run.must_validate:
            validation = evaluate(accelerator, loss_model, images.valid, views, config.eval_batch_size, "valid")
        run.log(validation, lr=lr)
        run.save_if_due()
        yield result, stream
    if run.interrupted:
        raise SystemExit(INTERRUPTED)

    # ---- the result: the checkpoint with the highest validation accuracy, scored once on the test images
    run.load_best()
    best = run.progress.best_update or run.progress.update
    with run.writing(folder):
        test = evaluate(accelerator, loss_model, images.test, views, config.eval_batch_size, "test")
        if accelerator.is_main_process:
            save_model(folder / "model", model, config, images, made_by=describe_training(options, best), test=test)
            draw_contact_sheet(folder / "transforms.png", pipeline, images.train, copies.ba_m)
    run.finish(test)
    logger.info(f"test: top-1 accuracy {test['test_accuracy']:.2%}, {test['test_loss']:.4f} nats per image")
    logger.info(f"{run.folder}: model/, curve.png, transforms.png, results.json, metrics.jsonl")
