"""The options of an evaluation: models, images, test-time augmentation, comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from tasks.cli.machine import MachineOptions, parse_with_machine
from tasks.cli.options import check_choices, check_least, check_not_blank, option
from tasks.models.names import check_models
from tasks.vision.config import ON_CORRUPT

Mean = Literal["probabilities", "logits"]
Split = Literal["train", "valid", "test"]

_LEAST = {
    "corpus_seed": 0, "valid_images": 1, "tta": 0, "crop_padding": 0, "batch_size": 1, "num_workers": 0,
    "resamples": 1, "seed": 0,
}  # fmt: skip


@dataclass(frozen=True)
class AccuracyConfig:
    """All options of `scripts/eval_vision.py`."""

    model: list[str] = option([], "folders of trained classifiers, runs/NAME/model; the first is the baseline")

    data: str | None = option(
        None,
        "as of train_vision.py: a folder of a CIFAR archive, of class folders or of save_to_disk, or a hub id; drawn "
        "images by default",
        group="images",
    )
    split: str = option("test", "which images are classified", choices=get_args(Split))
    corpus_seed: int = option(0, "seed of the drawn images and of what is held out, as the training had it")
    valid_images: int = option(1_000, "with --split valid or train: the images held out, as the training had it")
    on_corrupt: str = option(
        "refuse", "an image that cannot be decoded ends the run, or is left out and counted", choices=ON_CORRUPT
    )

    tta: int = option(
        0, "N: also classify by the mean over N random views of an image; 0 does not", group="test-time augmentation"
    )
    tta_mean: str = option("probabilities", "of the views' probabilities, or of their logits", choices=get_args(Mean))
    crop_padding: int = option(4, "pixels of padding of a view's random crop, of models that see whole images")
    flip: bool = option(True, "mirror each view left to right with probability 1/2")

    batch_size: int = option(256, "images of a batch", group="results")
    num_workers: int = option(0, "processes that decode images")
    output_dir: str | None = option(None, "new folder for results.json")
    resamples: int = option(1_000, "of the paired bootstrap between several models")
    seed: int = option(12_345, "of the bootstrap and of the views of --tta")

    def __post_init__(self) -> None:
        check_least(self, _LEAST)
        check_models(self.model)
        check_choices(self)
        check_not_blank(self, "data")


def parse_evaluation(argv: Sequence[str] | None = None) -> tuple[AccuracyConfig, MachineOptions]:
    """Options from the command line; see `parse_with_machine`."""
    return parse_with_machine(AccuracyConfig, argv, "Score images by trained classifiers.")
