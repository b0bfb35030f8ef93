"""Score images by one or several classifiers and compare them: the whole of `eval_vision.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from tasks.cli.errors import UserError
from tasks.cli.machine import MachineOptions, start_accelerator
from tasks.models.names import short_names
from tasks.scoring.bootstrap import Difference, paired_bootstrap
from tasks.scoring.folder import keep_results, new_folder
from tasks.scoring.table import align
from tasks.vision.augment import worker_transform
from tasks.vision.config import VisionConfig
from tasks.vision.data import load_images
from tasks.vision.data.image_set import ImageSet
from tasks.vision.evaluate import SeenImages
from tasks.vision.evaluation.config import AccuracyConfig
from tasks.vision.model_folder import Classifier, load_classifier

Transform = Callable[[Tensor], Tensor]


def evaluate(config: AccuracyConfig, machine: MachineOptions) -> dict[str, Any]:
    """Run `config`: what can be wrong, damaged images too, is found before the first image is scored.

    Returns:
        What `results.json` holds: options, number of images, and by model its figures; and their comparison.

    Raises:
        UserError: images, models, the device or the output folder cannot be used.
    """
    folder = new_folder(config.output_dir)
    accelerator = start_accelerator(machine, seed=config.seed)
    paths = short_names(config.model)
    classifiers = {name: load_classifier(path) for name, path in paths.items()}
    splits = load_images(
        config.data,
        seed=config.corpus_seed,
        valid_images=0 if config.split == "test" else config.valid_images,
        skip_corrupt=config.on_corrupt == "skip",
        in_memory=any(one.views.size is None for one in classifiers.values()),
    )
    images: ImageSet = getattr(splits, config.split)
    images.refuse_damaged(config.split, config.num_workers)
    labels = {name: _labels(images, splits.classes, name, one) for name, one in classifiers.items()}
    transforms = {name: _view(config, one) for name, one in classifiers.items()}
    results: dict[str, Any] = {
        "options": {**asdict(config), **asdict(machine)}, "data": splits.description, "images": len(images),
        "models": {},
    }  # fmt: skip
    ways: dict[str, dict[str, Tensor]] = {}  # by way of reading: whether each image is classified right, by model
    for name, one in classifiers.items():
        start = time.perf_counter()
        nats, right = score(config, accelerator, one, transforms[name], images, labels[name])
        seconds = time.perf_counter() - start
        if not nats.isfinite().all():
            raise UserError(
                f"--model {name}: the loss of {int((~nats.isfinite().all(1)).sum()):,} of {len(images):,} images is no "
                "finite number; its weights are damaged, or --mixed-precision is too coarse for it"
            )
        results["models"][name] = {"model": paths[name], **_figures(nats, right), "seconds": seconds}
        for way, column in zip(("single", "tta"), right.unbind(1), strict=False):
            ways.setdefault(way, {})[name] = column
    accelerator.print(f"\n{format_figures(results['models'], config)}")
    if len(classifiers) > 1:
        results["paired_bootstrap"] = {}
        for way, columns in ways.items():
            compared = paired_bootstrap(
                {name: column.double().numpy() for name, column in columns.items()},
                torch.ones(len(images)).numpy(),
                num_samples=config.resamples,
                seed=config.seed,
            )
            results["paired_bootstrap"][way] = [asdict(difference) for difference in compared]
            accelerator.print(f"\n{format_bootstrap(way, next(iter(columns)), compared, config)}")
    keep_results(accelerator, folder, results)
    return results


@torch.inference_mode()
def score(
    config: AccuracyConfig,
    accelerator: Accelerator,
    classifier: Classifier,
    transform: Transform,
    images: ImageSet,
    labels: Tensor,
) -> tuple[Tensor, Tensor]:
    """Nats of every image's own class, and whether it comes first; of the plain view, and of the mean over N others.

    The views of an image are drawn by (seed, image, view): neither batches, workers nor ranks change them.

    Args:
        transform: image (3, H, W) uint8 -> a random view, drawing from torch's global generator.
        labels: (images,), as the classifier numbers its classes.

    Returns:
        Two tensors (images, 1), or (images, 2) with --tta; float64 and bool, on the CPU.
    """
    views, model = classifier.views, classifier.model.to(accelerator.device).eval()
    seen = SeenImages(images, views, transform, config.tta, config.seed)
    mine = range(accelerator.process_index, len(images), accelerator.num_processes)
    loader: DataLoader[Any] = DataLoader(Subset(seen, mine), config.batch_size, num_workers=config.num_workers)  # type: ignore[arg-type]
    rows = []
    for pixels, _ in loader:
        shown = pixels.to(accelerator.device)
        logits = []
        for view in shown.unbind(1):
            with accelerator.autocast():
                logits.append(model(views.normalize(view)).float())
        rows.append(torch.stack([logits[0].log_softmax(1), *_mean(logits[1:], config.tta_mean)], 1).cpu())
    model.to("cpu")
    found = torch.zeros(2, len(images), 1 + (config.tta > 0), dtype=torch.float64)
    if rows:
        log_probabilities, own = torch.cat(rows).double(), labels[list(mine)]
        nats = -log_probabilities.gather(2, own.view(-1, 1, 1).expand(-1, log_probabilities.shape[1], 1))[..., 0]
        found[:, list(mine)] = torch.stack([nats, (log_probabilities.argmax(2) == own[:, None]).double()])
    nats, right = accelerator.reduce(found.to(accelerator.device), "sum").cpu()
    return nats, right > 0


def relative_improvement(accuracy: float, better: float) -> float | None:
    """The share of errors that is gone, Table 4 of Hoffer et al. 2020; None where there was no error.

    >>> round(relative_improvement(0.9341, 0.9433), 4)
    0.1396
    """
    return None if accuracy == 1 else (better - accuracy) / (1 - accuracy)


def format_figures(models: Mapping[str, Mapping[str, Any]], config: AccuracyConfig) -> str:
    """A row a model, and below what the numbers are of."""
    head = [
        "model",
        "top-1",
        "nats/image",
        *(["TTA top-1", "TTA nats", "fewer errors"] if config.tta else []),
        "seconds",
    ]
    notes = ["top-1 and nats are of each image once, without a random transform"]
    if config.tta:
        notes.append(
            f"TTA: the mean of the {config.tta_mean} of {config.tta} random views, seed {config.seed}; fewer errors: "
            "the relative improvement of Table 4 (Hoffer et al. 2020)"
        )
    rows = []
    for name, one in models.items():
        rows.append([name, f"{one['accuracy']:.2%}", f"{one['loss']:.4f}"])
        if config.tta:
            gone = one["tta_improvement"]
            rows[-1] += [f"{one['tta_accuracy']:.2%}", f"{one['tta_loss']:.4f}", "-" if gone is None else f"{gone:.2%}"]
        rows[-1].append(f"{one['seconds']:.1f}")
    return "\n".join([align([head, *rows]), *notes])


def format_bootstrap(way: str, baseline: str, differences: Sequence[Difference], config: AccuracyConfig) -> str:
    """A row a model: accuracy, and how it differs from the first's."""
    rows = [["model", "TTA top-1" if way == "tta" else "top-1", f"minus {baseline}'s", "95 % from", "to", "p"]]
    for one in differences:
        rows.append(
            [one.model, f"{one.value:.2%}", *(f"{x:+.2%}" for x in (one.difference, one.low, one.high)),
             f"{one.p_value:.4f}"]
        )  # fmt: skip
    return f"{align(rows)}\npaired bootstrap over images, {config.resamples:,} resamples, seed {config.seed}"


def _figures(nats: Tensor, right: Tensor) -> dict[str, float | None]:
    loss, accuracy = nats.mean(0).tolist(), right.double().mean(0).tolist()
    figures: dict[str, float | None] = {"accuracy": accuracy[0], "loss": loss[0]}
    if len(accuracy) > 1:
        improvement = relative_improvement(accuracy[0], accuracy[1])
        figures |= {"tta_accuracy": accuracy[1], "tta_loss": loss[1], "tta_improvement": improvement}
    return figures


def _mean(logits: Sequence[Tensor], of: str) -> list[Tensor]:
    """Logarithms of the probabilities that the views give together; none without views."""
    if not logits:
        return []
    if of == "logits":
        return [torch.stack(list(logits)).mean(0).log_softmax(1)]
    views = torch.stack([view.log_softmax(1) for view in logits])
    return [views.logsumexp(0) - torch.tensor(float(len(logits))).log()]


def _view(config: AccuracyConfig, classifier: Classifier) -> Transform:
    """The random view: the crop that the model was trained with in kind, and a flip."""
    resized = classifier.views.resized is not None
    transform = VisionConfig(
        image_size=classifier.views.size,
        random_resized_crop=resized,
        crop_padding=0 if resized else config.crop_padding,
        flip=config.flip,
        cutout=False,
    )
    if config.tta and not transform.is_random:
        raise UserError(f"--tta {config.tta}: without --flip and --crop-padding all views are equal; give one of them")
    return worker_transform(transform, classifier.views)


def _labels(images: ImageSet, classes: Sequence[str], name: str, classifier: Classifier) -> Tensor:
    """The images' labels as the classifier numbers them."""
    if missing := [one for one in classes if one not in classifier.classes]:
        raise UserError(
            f"--model {name} does not know the class {missing[0]!r} of the images (one of {len(missing)}); it was "
            f"trained on {', '.join(map(repr, classifier.classes[:3]))} ..."
        )
    return torch.tensor([classifier.classes.index(one) for one in classes])[images.labels]
