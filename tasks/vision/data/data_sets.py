"""Images and their classes in a `datasets` data set."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from tasks.cli.errors import DataError
from tasks.text.data_sets import load_data_set
from tasks.vision.data.decode import decode_image
from tasks.vision.data.image_set import ImageSet

logger = logging.getLogger(__name__)

_LABELS = ("label", "labels", "fine_label", "class", "target")  # columns of classes, the first that there is
_HIDDEN = -1  # the label of images whose classes are kept secret


def read_data_set(
    data: str, names: dict[str, Sequence[str]], *, skip_corrupt: bool
) -> tuple[dict[str, ImageSet | None], list[str]]:
    """The splits of a data set, and its classes.

    Classes are those of a `ClassLabel`, else the numbers or names that the training images have. A split whose labels
    are hidden (-1) is left out, and said.

    Args:
        data: a folder of `save_to_disk`, or a hub id, NAME:CONFIG.
        names: split -> what the data set may call it.
        skip_corrupt: decode everything now, and leave out what cannot be.

    Raises:
        DataError: no training split, no column of images or of classes, or a label that is no class.
    """
    name, _, config = (data, "", "") if Path(data).exists() else data.partition(":")
    splits = load_data_set(name, config or None, called=data)
    there = {split: next((own for own in known if own in splits), None) for split, known in names.items()}
    if there["train"] is None:
        raise DataError(f"{data} has the splits {', '.join(splits)}, and none to train on")
    columns = splits[there["train"]].features
    image = next((column for column, kind in columns.items() if isinstance(kind, datasets.Image)), None)
    label = _label_column(columns)
    if image is None or label is None:
        raise DataError(
            f"{data} has the columns {', '.join(columns)}; it needs one of images and one of classes (a ClassLabel, or "
            f"numbers or names under {', '.join(_LABELS)})"
        )
    kind, trained = columns[label], splits[there["train"]][label]
    classes = list(range(kind.num_classes)) if isinstance(kind, datasets.ClassLabel) else sorted(set(trained) - {None})
    places = {value: place for place, value in enumerate(classes)}
    read: dict[str, ImageSet | None] = {}
    for split, own in there.items():
        labels = [] if own is None else splits[own][label]
        if split != "train" and labels and set(labels) <= {_HIDDEN, None}:
            logger.info(f"{data}: the labels of the split {own} are hidden, and it is left out")
            own = None
        if own is None:
            read[split] = None
            continue
        if wrong := [(row, value) for row, value in enumerate(labels) if value not in places]:
            raise DataError(
                f"{data}: row {wrong[0][0]} of the split {own} has the {label} {wrong[0][1]!r}, which is none of the "
                f"{len(classes)} classes ({len(wrong):,} such rows)"
            )
        rows = _Rows(splits[own].cast_column(image, datasets.Image(decode=False)), image, own)
        numbers = torch.tensor([places[value] for value in labels], dtype=torch.int64)
        known = [f"{own} {splits[own]._fingerprint} {i}" for i in range(len(labels))]
        images = ImageSet(rows, numbers, _decode, known)
        read[split] = images.decodable() if skip_corrupt else images
    return read, kind.names if isinstance(kind, datasets.ClassLabel) else [str(value) for value in classes]


def _label_column(columns: Any) -> str | None:
    typed = [column for column, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
    plain = [column for column in _LABELS if _is_plain(columns.get(column))]
    return next((column for column in _LABELS if column in typed), None) or next(iter([*typed, *plain]), None)


def _is_plain(kind: Any) -> bool:
    """Whether a column holds whole numbers or names."""
    return getattr(kind, "dtype", "").removeprefix("large_").removeprefix("u").rstrip("0123456789") in ("int", "string")


class _Rows:
    """Images by number: the place of each in its split, for messages, and its bytes or its file."""

    def __init__(self, rows: Any, column: str, split: str, numbers: Sequence[int] | None = None) -> None:
        self.rows, self.column, self.split = rows, column, split
        self.numbers = range(len(rows)) if numbers is None else numbers

    def __getitem__(self, index: int) -> tuple[str, Any]:
        number = self.numbers[index]
        return f"row {number} of the split {self.split}", self.rows[number][self.column]

    def select(self, indices: Sequence[int]) -> _Rows:
        """Some of them."""
        return _Rows(self.rows, self.column, self.split, [self.numbers[i] for i in indices])


def _decode(item: tuple[str, Any]) -> Tensor:
    where, stored = item
    if stored is None:
        raise DataError(f"{where} has no image")
    return decode_image(stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"]), where)
