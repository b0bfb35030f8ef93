"""A `datasets` data set, from the hub or from a folder in any of the layouts that people have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from tasks.cli.errors import DataError, reason_of

_BUILDERS = ("csv", "json", "parquet", "arrow", "text", "xml", "hdf5", "lance", "webdataset", "pandas", "spark", "sql",
             "generator", "cache", "imagefolder", "audiofolder", "videofolder", "pdffolder", "niftifolder")  # fmt: skip


def load_data_set(name: str, config: str | None = None, split: str | None = None, *, called: str | None = None) -> Any:
    """Load a data set or one of its splits.

    Args:
        name: a hub id, a folder with data files (Parquet, CSV, JSON ...), or a folder that `save_to_disk` wrote.
        config: the hub's configuration; of a saved data set a folder below.
        split: by name; without it a `DatasetDict`, in which a data set that was saved alone is the split "train".
        called: how the user named it, for messages.

    Raises:
        DataError: it cannot be had (no network, no such folder, damaged files), or has no such split.
    """
    called = called or name
    if Path(name).is_file():
        raise DataError(f"{called} is a file; give its folder")
    folder = Path(name, config) if config else Path(name)
    if Path(name).is_dir():
        name = str(Path(name).resolve())  # `json` here is this folder, not the builder of that name
    elif name in _BUILDERS:
        raise DataError(
            f"{called} is no folder here, and names a file format: it would read all such files below the current "
            "folder; give the folder of the data"
        )
    try:
        if not any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
            return datasets.load_dataset(name, config, split=split)
        saved: Any = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises a dozen unrelated types, network errors among them
        found: BaseException = error
        while isinstance(found, DatasetGenerationError) and found.__cause__ is not None:  # that a file is at fault
            found = found.__cause__
        reason = reason_of(found).rstrip(".")
        raise DataError(
            f"cannot load {called}: {reason}. NAME must be a hub id that this machine can download or has in its "
            "cache, or a local folder"
        ) from error
    splits = saved if isinstance(saved, dict) else datasets.DatasetDict({"train": saved})
    if split is None:
        return splits
    if split not in splits:
        raise DataError(f"{called} has the splits {', '.join(splits)}, not {split!r}")
    return splits[split]


def is_chat(feature: Any) -> bool:
    """Whether a column holds chats: lists of messages, each with a role and a content."""
    message = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
    return isinstance(message, dict) and {"role", "content"} <= message.keys()


@contextmanager
def without_cache_files() -> Iterator[None]:
    """Inside, `map` and `filter` leave nothing beside the data: their files end with the process."""
    was_enabled = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if was_enabled:
            datasets.enable_caching()
