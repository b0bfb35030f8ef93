"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) as they are published: folders of pickled arrays."""

from __future__ import annotations

import hashlib
import io
import lzma
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.cli.errors import DataError, reason_of
from tasks.vision.data.image_set import ImageSet

_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"), ("numpy", "ndarray"),
    ("numpy", "dtype"), ("_codecs", "encode"),
}  # fmt: skip


@dataclass(frozen=True)
class Archive:
    """One of the two: its folder, its files with their published md5, and where labels and their names are."""

    folder: str
    train: dict[str, str]
    test: dict[str, str]
    labels: str
    meta: str
    meta_md5: str
    names: str


ARCHIVES = (
    Archive(
        "cifar-10-batches-py",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        {"test_batch": "40351d587109b95175f43aff81a1287e"},
        "labels",
        "batches.meta",
        "5ff9c542aee3614f3951f8cda6e48888",
        "label_names",
    ),
    Archive(
        "cifar-100-python",
        {"train": "16019d7e3df5f24257cddd939b257f8d"},
        {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        "fine_labels",
        "meta",
        "7973b15100ade9c7d40fb424638fde48",
        "fine_label_names",
    ),
)


def find_archive(data: str) -> tuple[Archive, Path] | None:
    """The archive in a folder, or that the folder is; two of them are a `DataError`."""
    found = []
    for archive in ARCHIVES:
        for folder in (Path(data, archive.folder), Path(data)):
            members = [*archive.train, *archive.test]
            if any((folder / name).is_file() for member in members for name in (member, f"{member}.xz")):
                found.append((archive, folder))
                break
    if len(found) > 1:
        raise DataError(f"{data} holds two archives; give one of {' and '.join(str(folder) for _, folder in found)}")
    return found[0] if found else None


def read_archive(archive: Archive, folder: Path) -> tuple[ImageSet, ImageSet, list[str]]:
    """Training images, test images, and the classes' names.

    Members may be packed by xz. They are pickles, of which nothing but numpy's arrays is made.

    Raises:
        DataError: a member is missing, damaged, or not what was published.
    """
    train, test = (
        _join([_read_images(archive, folder, name, md5) for name, md5 in members.items()])
        for members in (archive.train, archive.test)
    )
    names = _unpickle(folder, archive.meta, archive.meta_md5)[archive.names]
    return train, test, [str(name) for name in names]


def _join(parts: list[tuple[np.ndarray, list[int]]]) -> ImageSet:
    images = torch.from_numpy(np.concatenate([images for images, _ in parts]))
    return ImageSet(images, torch.tensor([label for _, labels in parts for label in labels]))


def _read_images(archive: Archive, folder: Path, name: str, md5: str) -> tuple[np.ndarray, list[int]]:
    content = _unpickle(folder, name, md5)
    images, labels = content["data"], content[archive.labels]
    return images.reshape(-1, 3, 32, 32), labels


def _unpickle(folder: Path, name: str, md5: str) -> dict[str, Any]:
    """A member's content, which must have the published md5."""
    plain, packed = folder / name, folder / f"{name}.xz"
    path = plain if plain.is_file() else packed
    try:
        data = lzma.decompress(packed.read_bytes()) if path == packed else plain.read_bytes()
        content = _ArraysOnly(io.BytesIO(data), encoding="latin1").load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError("it holds no dictionary")
    except FileNotFoundError:
        raise DataError(f"{folder} has no {name} (nor {name}.xz)") from None
    except Exception as error:  # of a damaged pickle: nearly any
        reason = reason_of(error)
        raise DataError(f"{path} is no file of CIFAR, or damaged: {reason}") from error
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != md5:
        raise DataError(f"{folder / name} is not the published file: its md5 is {found}, not {md5}; get it anew")
    return content


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which no array needs")
        return super().find_class(module, name)
