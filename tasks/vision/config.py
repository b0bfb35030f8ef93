"""The options of a vision run; presets are named values that any option overrides."""

from __future__ import annotations

import math
import os
from argparse import SUPPRESS, Action, ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from tasks.cli.errors import UserError
from tasks.cli.options import check_choices, check_least, check_not_blank, flag, option
from tasks.run.options import MAY_DIFFER, TrainingOptions, training_parser
from tasks.vision.presets import DATA, PRESETS, presets_table

AutoAugment = Literal["none", "autoaugment", "randaugment", "trivialaugment"]
Pipeline = Literal["auto", "device", "workers"]
ON_CORRUPT = ("refuse", "skip")

_LEAST = {
    "batch_size": 1, "image_size": 1, "corpus_seed": 0, "train_images": 1, "valid_images": 1, "crop_padding": 0,
    "cutout_size": 1, "ghost_batch_size": 0, "eval_batch_size": 1,
}  # fmt: skip
_AT_LEAST_0 = ("momentum", "weight_decay", "weight_decay_epochs", "mixup_alpha", "warmup_epochs", "learning_rate")


@dataclass(frozen=True)
class VisionConfig:
    """Options of `scripts/train_vision.py` beside those of every run; the defaults are the preset "generated".

    The other presets are rows of Table 2 and the shortened and large-batch regimes of Hoffer et al. 2020, each with its
    M. The batch counts images before they are repeated, and the rate does not depend on M unless --lr-power is set.
    """

    preset: str = option(
        "generated", "a named set of option values; an option that is given overrides it", choices=PRESETS
    )

    data: str | None = option(
        None,
        "folder of a CIFAR-10 or CIFAR-100 python archive, of class folders (train/CLASS/*, test/CLASS/*) or of "
        "save_to_disk, or a hub id with its configuration, NAME:CONFIG",
        group="data",
    )
    corpus_seed: int = option(0, "seed of the drawn images, the test images too")
    train_images: int | None = option(None, "train on so many images, the classes keep their shares; all by default")
    valid_images: int = option(1_000, "images held out of training where the data has no validation split")
    on_corrupt: str = option(
        "refuse", "an image that cannot be decoded ends the run, or is left out and counted", choices=ON_CORRUPT
    )

    network: str = option(
        "resnet8",
        "resnet8 (any 6n+2), vgg16-cifar, wrn28-10, densenet100-12, densenet-bc100-12, darts, amoebanet, mobilenet-v1, "
        "torchvision/NAME or timm/NAME",
        group="network",
    )
    ghost_batch_size: int | None = option(
        None,
        "batch norm in blocks of so many images, all of one copy; 0: a copy's whole batch is one; by default it stays "
        "as it is, over all rows of a pass",
    )

    image_size: int | None = option(
        None,
        "height and width that the network sees; by default those of the data",
        group="the transform T of the images",
    )
    crop_padding: int = option(4, "pad with so many black pixels and crop at random; 0 switches this off")
    random_resized_crop: bool = option(
        False, "cut out 8 to 100 per cent of an image's area at random, and resize it to --image-size"
    )
    flip: bool = option(True, "mirror each image left to right with probability 1/2")
    auto_augment: str = option("none", "a policy of torchvision's", choices=get_args(AutoAugment))
    cutout: bool = option(True, "Cutout: hide a square at a random place")
    cutout_size: int = option(16, "side of Cutout's square, in pixels")
    mixup_alpha: float = option(0.0, "mixup with proportions from Beta(a, a), drawn for each copy; 0 switches this off")
    manifold_mixup: bool = option(
        False, "with --mixup-alpha: mix the images, or what goes into the second or third stage of a ResNet, by chance"
    )
    pipeline: str = option(
        "auto",
        "where T runs: device, on whole batches of a data set that lies there as one tensor (crop with padding, flip "
        "and Cutout alone); workers, image by image; auto takes device where it can",
        choices=get_args(Pipeline),
    )

    batch_size: int = option(64, "B, unique images of a rank's batch, before repetition", group="optimisation")
    epochs: float | None = option(None, "stop after so many epochs, or after --max-updates, whichever comes first")
    learning_rate: float = option(0.1, "peak of the learning rate; it does not depend on M")
    lr_power: float = option(0.0, "multiply the rate by M to this power")
    lr_decay: str = option(
        "steps",
        "how the rate falls: steps, at --lr-drops; cosine, to 0 at the end of --epochs (of --max-updates without it)",
        choices=("steps", "cosine"),
    )
    lr_drops: list[float] = option([12.0, 17.0], "epochs after which the rate drops, with --lr-decay steps")
    lr_factors: list[float] = option([0.1], "factor of the rate at each of --lr-drops: one for all, or one for each")
    warmup_epochs: float = option(0.0, "epochs of linear warm-up")
    momentum: float = option(0.9, "momentum of SGD")
    weight_decay: float = option(1e-4, "L2 penalty of SGD")
    weight_decay_epochs: float | None = option(None, "no L2 penalty after so many epochs")
    decay_bias_and_norm: bool = option(False, "L2 penalty on biases and normalisation too")
    drop_path: float = option(
        0.0,
        "of darts and amoebanet: zero the outputs of operations, each image's by itself, with a probability that grows "
        "from 0 to this one at the end of --epochs (of --max-updates without it)",
    )
    label_smoothing: float = option(0.0, "probability spread over all classes")
    eval_batch_size: int = option(256, "images of a batch in validation and test")
    channels_last: bool = option(False, "channels-last memory format")
    compile: bool = option(False, "torch.compile the network")

    def __post_init__(self) -> None:
        check_least(self, _LEAST)
        for name in _AT_LEAST_0:
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{flag(name)} must be at least 0 and finite, got {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"--label-smoothing is a probability, from 0 to below 1, got {self.label_smoothing}")
        if not 0 <= self.drop_path < 1:
            raise UserError(f"--drop-path is a probability, from 0 to below 1, got {self.drop_path}")
        if self.drop_path and self.compile:
            raise UserError("--drop-path changes in every update, and --compile would compile each anew; drop one")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise UserError(f"--epochs must be above 0 and finite, got {self.epochs}")
        check_choices(self)
        check_not_blank(self, "data")
        if not all(map(math.isfinite, self.lr_drops)) or any(
            b <= a for a, b in zip([0.0, *self.lr_drops], self.lr_drops, strict=False)
        ):
            raise UserError(f"--lr-drops must rise, be above 0 and finite, got {' '.join(map(str, self.lr_drops))}")
        if len(self.lr_factors) not in (1, len(self.lr_drops)) or not all(0 < x <= 1 for x in self.lr_factors):
            raise UserError(
                f"--lr-factors must be one number for all of --lr-drops or {len(self.lr_drops)}, each above 0 and at "
                f"most 1, got {' '.join(map(str, self.lr_factors))}"
            )
        if not -10 <= self.lr_power <= 10:
            raise UserError(f"--lr-power must be from -10 to 10, got {self.lr_power}")
        if self.ghost_batch_size == 1:
            raise UserError("--ghost-batch-size must be at least 2, or 0 for a copy's whole batch, got 1")
        if self.mixup_alpha and self.batch_size < 2:
            raise UserError(
                "--mixup-alpha mixes each image with another one of its batch: --batch-size must be at least 2"
            )
        if self.manifold_mixup and not self.mixup_alpha:
            raise UserError("--manifold-mixup needs --mixup-alpha above 0")
        if self.manifold_mixup and self.compile:
            raise UserError("--manifold-mixup moves from layer to layer, which --compile does not see; drop one")
        if self.crop_padding and self.random_resized_crop:
            raise UserError("--crop-padding and --random-resized-crop are two ways to crop; switch one of them off")
        if self.random_resized_crop and self.image_size is None:
            raise UserError("--random-resized-crop needs --image-size, the size to which the crop is resized")

    @property
    def is_random(self) -> bool:
        """Whether T transforms images at random; dropout in the network is another part of it."""
        crops = self.crop_padding > 0 or self.random_resized_crop
        return crops or self.flip or self.cutout or self.auto_augment != "none" or self.mixup_alpha > 0

    @property
    def transform(self) -> str:
        """T in words."""
        parts = {
            f"crop with {self.crop_padding} pixels of padding": self.crop_padding > 0,
            f"random resized crop to {self.image_size}": self.random_resized_crop,
            "flip": self.flip,
            self.auto_augment: self.auto_augment != "none",
            f"Cutout {self.cutout_size}": self.cutout,
            f"{'manifold ' * self.manifold_mixup}mixup {self.mixup_alpha}": self.mixup_alpha > 0,
        }
        return ", ".join(part for part, is_on in parts.items() if is_on) or "the network's own dropout alone"


VisionOptions: TypeAlias = TrainingOptions[VisionConfig]


def may_differ(config: VisionConfig) -> tuple[str, ...]:
    """The options that a resumed run may change: nothing that reaches the weights. (Images are compared.)"""
    names = (*MAY_DIFFER, "data", "eval_batch_size", "on_corrupt")
    moves_to_the_end = config.lr_decay == "cosine" or config.drop_path > 0
    if not moves_to_the_end or config.epochs is not None:
        return names
    return tuple(name for name in names if name != "max_updates")


def run_folder(options: VisionOptions) -> str:
    """The run folder, where it is not named one that says network, data, M and seed."""
    config, copies, run = options.config, options.copies, options.run
    data = "generated" if config.data is None else Path(config.data).name.replace(":", "-")
    return run.output_dir or f"runs/vision-{config.network.replace('/', '-')}-{data}-m{copies.ba_m}-seed{run.seed}"


class _ListPresets(Action):
    def __call__(self, parser: ArgumentParser, *args: Any) -> None:
        print(presets_table())
        parser.exit()


def parse_config(argv: Sequence[str] | None = None) -> VisionOptions:
    """Options from the command line (`--ba-m` and `--ba_m` alike), over those of `--preset`.

    Raises:
        UserError: a value out of range, an unknown preset, or one that needs data and has none.
    """
    parser, preset = training_parser(VisionConfig, PRESETS, argv, "Train an image classifier.")
    parser.add_argument(
        "--list-presets", action=_ListPresets, nargs=0, default=SUPPRESS, help="show the presets, and leave"
    )
    parser.parse_known_options(argv)  # an unknown option is named first
    options = VisionOptions(*parser.parse_args_into_dataclasses(argv))
    if options.config.data is None and preset != "generated":
        root = os.environ.get("SEQBA_DATA")
        if preset not in DATA or root is None:
            held = f", or $SEQBA_DATA for a folder that holds {DATA[preset]}/" if preset in DATA else ""
            raise UserError(f"--preset {preset} needs --data{held}")
        return options.changed(data=str(Path(root, DATA[preset])))
    return options
