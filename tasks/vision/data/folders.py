"""Folders of images, a folder a class."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from tasks.cli.errors import DataError
from tasks.vision.data.decode import decode_file
from tasks.vision.data.image_set import ImageSet

logger = logging.getLogger(__name__)

_SHOWN = 5  # names in a message


def class_folders(folder: Path) -> list[str]:
    """The names of the classes: folders that are not hidden, in order."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def read_folder(folder: Path, classes: Sequence[str], *, skip_corrupt: bool) -> ImageSet:
    """All images below a folder of classes, in the order of their names; they are decoded when they are asked for.

    Hidden files are passed over; what is no image by its name is counted and said.

    Args:
        folder: with a folder for each class, in which subfolders are looked through too.
        classes: names, whose places are the labels.
        skip_corrupt: decode everything now, and leave out what cannot be; else such a file ends the run that meets it.

    Raises:
        DataError: a class without images, or a folder that is none of `classes`.
    """
    if unknown := [name for name in class_folders(folder) if name not in classes]:
        raise DataError(f"{folder} has the class {unknown[0]!r}, which the training images do not have")
    files: list[Path] = []
    labels: list[int] = []
    others: list[Path] = []
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            raise DataError(f"{folder} has no folder {name!r}, a class of the training images")
        found = [path for path in sorted((folder / name).rglob("*")) if path.is_file() and _is_shown(path, folder)]
        images = [path for path in found if path.suffix.lower() in known]
        others += [path for path in found if path.suffix.lower() not in known]
        if not images:
            raise DataError(f"{folder / name} has no image; remove the folder, or put images of its class into it")
        files += images
        labels += [label] * len(images)
    if others:
        logger.info(f"{folder}: {len(others):,} files are no images by their names, and left out: {_some(others)}")
    names = [str(path.relative_to(folder)) for path in files]
    read = ImageSet(files, torch.tensor(labels), decode_file, names)
    if not skip_corrupt:
        return read
    good = read.decodable()
    if empty := sorted(set(range(len(classes))) - set(good.labels.tolist())):
        raise DataError(f"{folder / classes[empty[0]]} has no image that can be decoded")
    return good


def _is_shown(path: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _some(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths[:_SHOWN]) + (" ..." if paths[_SHOWN:] else "")
