"""Text in three splits: files of a folder, a data set, or the English side of the generated corpus."""

from __future__ import annotations

from pathlib import Path

from tasks.cli.errors import DataError
from tasks.text.data_sets import load_data_set
from tasks.text.generated.corpus import generate_corpus
from tasks.text.parallel import OPENERS, UNPACK, UNREAD, read_lines

SPLITS = ("train", "valid", "test")
_FILES = ("ptb.{}.txt", "{}.txt", "wiki.{}.tokens")  # Penn Treebank's, anybody's, WikiText's
_SPLIT_NAMES = {"valid": ("validation", "valid", "dev")}  # in data sets
_COLUMNS = ("text", "sentence")
_GENERATED = 20_000  # sentences


def read_split(source: str, split: str) -> list[str]:
    """Read the lines of a split.

    Args:
        source: a folder of files `ptb.SPLIT.txt`, `SPLIT.txt` or `wiki.SPLIT.tokens`, plain, `.gz`, `.xz` or `.bz2`;
            or a data set with a column `text` or `sentence`, as a folder that `save_to_disk` wrote, a folder of data
            files, or a hub id, with its configuration behind a colon (`Salesforce/wikitext:wikitext-2-v1`).
        split: `train`, `valid` or `test`.

    Raises:
        DataError: the split is missing, there several times, unreadable, or empty.
    """
    if Path(source).is_file():
        raise DataError(f"{source} is a file; give the folder of the three splits")
    names = [pattern.format(split) + packed for pattern in _FILES for packed in OPENERS]
    unread = [Path(source, pattern.format(split) + packed) for pattern in _FILES for packed in UNREAD]
    found = [path for name in names if (path := Path(source, name)).is_file()]
    if len(found) > 1:
        raise DataError(f"several files hold the split {split!r}, keep one: {', '.join(map(str, found))}")
    if found:
        return read_lines(found[0])
    if there := [path for path in unread if path.is_file()]:
        raise DataError(f"{there[0]} is not read; {UNPACK}")
    if any(_holds(Path(source), other) for other in SPLITS):
        raise DataError(f"{source} has no split {split!r}: looked for {', '.join(names)}")
    below = [path for path in Path(source).glob("*/") if any(_holds(path, other) for other in SPLITS)]
    if below:
        raise DataError(f"{source} holds no split itself; give {' or '.join(map(str, sorted(below)))}")
    return _read_data_set(source, split)


def generated_splits(seed: int) -> dict[str, list[str]]:
    """The English side of the built-in corpus, a sentence a line."""
    corpus = generate_corpus(train=_GENERATED, valid=500, test=500, seed=seed)
    return {split: corpus[split].source for split in SPLITS}


def _holds(folder: Path, split: str) -> bool:
    return any((folder / (pattern.format(split) + packed)).is_file() for pattern in _FILES for packed in OPENERS)


def _read_data_set(source: str, split: str) -> list[str]:
    name, _, config = (source, "", "") if Path(source).exists() else source.partition(":")
    splits = load_data_set(name, config or None, called=source)
    wanted = [own for own in _SPLIT_NAMES.get(split, (split,)) if own in splits]
    if not wanted:
        raise DataError(f"{source} has the splits {', '.join(splits)}, and none for {split!r}")
    data = splits[wanted[0]]
    columns = [column for column in _COLUMNS if column in data.column_names]
    if not columns:
        raise DataError(
            f"{source} has the columns {', '.join(data.column_names)}; a text needs one called {' or '.join(_COLUMNS)}"
        )
    if getattr(data.features[columns[0]], "dtype", None) not in ("string", "large_string"):
        raise DataError(f"{source}: the column {columns[0]!r} holds no text but {data.features[columns[0]]}")
    lines = [line for text in data[columns[0]] for line in (text or "").removesuffix("\n").split("\n")]
    if not lines:
        raise DataError(f"{source}: the split {wanted[0]!r} is empty")
    return lines
