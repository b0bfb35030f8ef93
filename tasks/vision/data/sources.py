"""One call for images of any source, in three splits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tasks.cli.errors import DataError
from tasks.vision.data.cifar import find_archive, read_archive
from tasks.vision.data.data_sets import read_data_set
from tasks.vision.data.drawn import CLASSES, draw_images
from tasks.vision.data.folders import class_folders, read_folder
from tasks.vision.data.image_set import ImageSet, fingerprint, stratified

logger = logging.getLogger(__name__)

_DRAWN = {"train": 400, "valid": 1_000, "test": 2_000}
_SPLITS: dict[str, Sequence[str]] = {
    "train": ("train",),
    "valid": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


@dataclass(frozen=True)
class ImageSplits:
    """Images of `classes` in three splits.

    `fingerprint` names the training and validation images: by content where they are one tensor, else by their files.
    """

    train: ImageSet
    valid: ImageSet
    test: ImageSet
    classes: Sequence[str]
    description: str

    @property
    def fingerprint(self) -> str:
        """Equal for equal training and validation images."""
        return fingerprint([self.train, self.valid])


def load_images(
    data: str | None,
    *,
    seed: int = 0,
    valid_images: int = 5_000,
    train_images: int | None = None,
    skip_corrupt: bool = False,
    in_memory: bool = False,
) -> ImageSplits:
    """Read images, or draw some.

    Args:
        data: a folder of a CIFAR archive; of class folders (`train/CLASS/*`, `test/CLASS/*` and, where there is one, a
            validation split; or `CLASS/*` alone, of which a fifth becomes the test images); of a data set that
            `save_to_disk` wrote; or a hub id, NAME:CONFIG. None for drawn images.
        seed: of drawn images, and of what is held out.
        valid_images: held out of the training images where there is no validation split, each class by its share.
        train_images: so many of the rest, each class by its share; None for all.
        skip_corrupt: decode every image at once, and leave out those that cannot be.
        in_memory: decode every image once, into one tensor a split; all must be of one size.

    Raises:
        DataError: a split or an image is missing or damaged, or there are fewer images than are asked for.
    """
    train, valid, test, classes = _read(data, seed, skip_corrupt)
    if valid is None:
        if len(train) <= valid_images:
            raise DataError(
                f"{data}: {len(train):,} training images, of which --valid-images {valid_images:,} cannot be held out; "
                "give fewer"
            )
        held_out, rest = stratified(train.labels, valid_images, seed)
        train, valid = train.subset(rest), train.subset(held_out)
    if train_images is not None:
        if train_images > len(train):
            raise DataError(f"--train-images {train_images:,} is more than the {len(train):,} images to train on")
        train = train.subset(stratified(train.labels, train_images, seed)[0])
    trained = torch.bincount(train.labels, minlength=len(classes))
    if missing := [name for name, count in zip(classes, trained.tolist(), strict=True) if not count]:
        raise DataError(
            f"{data or 'the drawn images'}: {len(missing)} classes have no image to train on, {missing[0]!r} for one; "
            "give more training images, or hold out fewer"
        )
    if in_memory:
        train, valid, test = (
            x.in_memory(split) for x, split in ((train, "training"), (valid, "validation"), (test, "test"))
        )
        sizes = {tuple(x.tensor.shape[2:]) for x in (train, valid, test) if x.tensor is not None and len(x)}
        if len(sizes) > 1:
            raise DataError(
                f"the splits have images of several sizes, {' and '.join(map(str, sizes))}; give --image-size"
            )
    name = f"drawn images of ten shapes, seed {seed}" if data is None else data
    counts = f"{len(train):,} training, {len(valid):,} validation and {len(test):,} test images"
    logger.info(f"{name}: {counts} of {len(classes)} classes")
    return ImageSplits(train, valid, test, classes, f"{name}: {counts}")


def _read(data: str | None, seed: int, skip_corrupt: bool) -> tuple[ImageSet, ImageSet | None, ImageSet, Sequence[str]]:
    if data is None:
        logger.info("no --data: drawn images")
        drawn = draw_images(sum(_DRAWN.values()), seed)
        train, valid, test = (drawn.subset(part) for part in torch.arange(len(drawn)).split(list(_DRAWN.values())))
        return train, valid, test, CLASSES
    if Path(data).is_file():
        raise DataError(f"{data} is a file; unpack it, and give the folder")
    if found := find_archive(data):
        train, test, names = read_archive(*found)
        return train, None, test, names
    folder = Path(data)
    if folder.is_dir() and not any((folder / file).exists() for file in ("dataset_dict.json", "state.json")):
        return _read_folders(folder, seed, skip_corrupt)
    read, classes = read_data_set(data, _SPLITS, skip_corrupt=skip_corrupt)
    return (*_with_test(read["train"], read["valid"], read["test"], seed), classes)


_LIKE_SPLITS = ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval")


def _read_folders(
    folder: Path, seed: int, skip_corrupt: bool
) -> tuple[ImageSet, ImageSet | None, ImageSet, Sequence[str]]:
    there = {split: [folder / name for name in names if (folder / name).is_dir()] for split, names in _SPLITS.items()}
    for split, found in there.items():
        if len(found) > 1:
            ignored = ", ".join(path.name for path in found[1:])
            logger.info(f"{folder}: {found[0].name} are the {split} images, and {ignored} is left out")
    if not there["train"]:
        classes = class_folders(folder)
        if splits := [name for name in classes if name.lower() in _LIKE_SPLITS]:
            raise DataError(
                f"{folder} has no folder train/, and {', '.join(splits)} would be taken for classes; call the folder "
                "of the training images train"
            )
        if len(classes) < 2:
            raise DataError(
                f"{folder} has neither train/CLASS/* nor CLASS/* with at least two classes, nor is it a CIFAR archive "
                "or a saved data set; an archive of images must be unpacked first"
            )
        return (*_with_test(read_folder(folder, classes, skip_corrupt=skip_corrupt), None, None, seed), classes)
    read_from = {path.name for found in there.values() for path in found}
    if others := [name for name in class_folders(folder) if name not in read_from]:
        logger.info(f"{folder}: the folders {', '.join(others)} are no split, and are left out")
    classes = class_folders(there["train"][0])
    if len(classes) < 2:
        raise DataError(f"{there['train'][0]} has {len(classes)} class folders; a classifier needs at least 2")
    read = {
        split: read_folder(found[0], classes, skip_corrupt=skip_corrupt) if found else None
        for split, found in there.items()
    }
    return (*_with_test(read["train"], read["valid"], read["test"], seed), classes)


def _with_test(
    train: ImageSet | None, valid: ImageSet | None, test: ImageSet | None, seed: int
) -> tuple[ImageSet, ImageSet | None, ImageSet]:
    """Three splits of what there is: of two, the other one is the test; of one, a fifth, each class by its share."""
    assert train is not None
    if test is not None:
        return train, valid, test
    if valid is not None:
        logger.info(
            "there is no test split: the validation split takes its place, and validation is held out of training"
        )
        return train, None, valid
    logger.info("there is neither a test nor a validation split: a fifth of the images, drawn by class, is the test")
    some, rest = stratified(train.labels, len(train) // 5, seed)
    return train.subset(rest), None, train.subset(some)
