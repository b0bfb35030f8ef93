"""Parallel text from a `datasets` data set, on the hub or in a folder, in the layout of the WMT data sets."""

from __future__ import annotations

from pathlib import Path

from tasks.text.data_sets import load_data_set
from tasks.text.parallel import DataError, ParallelText

SCHEME = "datasets:"
_COLUMN = "translation"  # one dictionary a pair: {"en": ..., "de": ...}


def is_dataset(source: str) -> bool:
    """Whether a text source names a data set, and not the prefix of two files.

    >>> is_dataset("datasets:wmt/wmt16:de-en:train"), is_dataset("corpus/train")
    (True, False)
    """
    return source.startswith(SCHEME)


def read_dataset(source: str, source_lang: str, target_lang: str) -> ParallelText:
    """Read one split of a translation data set.

    Args:
        source: `datasets:NAME:CONFIG:SPLIT`; NAME is a hub id, a folder with data files, or a folder that
            `save_to_disk` wrote; CONFIG may be empty. The split has a column `translation` of dictionaries
            from language to sentence, as `wmt/wmt16` has.
        source_lang, target_lang: keys of those dictionaries.

    Raises:
        DataError: the name is misspelt, the data set cannot be had (no network, no such split), or lacks a language.
    """
    name, config, split = _parts(source)
    data = load_data_set(name, config, split, called=source)
    if _COLUMN not in data.column_names:
        raise DataError(f"{source} has the columns {', '.join(data.column_names)}; parallel text needs {_COLUMN!r}")
    table = data.with_format("arrow")[:][_COLUMN].combine_chunks()
    langs = [field.name for field in table.type]
    sides = []
    for lang in (source_lang, target_lang):
        if lang not in langs:
            raise DataError(f"{source} has the languages {', '.join(langs)}, not {lang!r}")
        # a pair without a side is a blank one, which is dropped and counted with the others
        sides.append([sentence or "" for sentence in table.field(lang).to_pylist()])
    if not sides[0]:
        raise DataError(f"{source} is empty")
    return ParallelText(*([_one_line(x) for x in side] for side in sides))


def describe(source: str) -> str:
    """A short name of a text source: a prefix's last part, or `NAME:SPLIT` of a data set.

    >>> describe("corpus/train"), describe("datasets:wmt/wmt14:de-en:test")
    ('train', 'wmt14:test')
    """
    if not is_dataset(source):
        return Path(source).name
    name, _, split = _parts(source)
    return f"{Path(name).name}:{split}"


def _parts(source: str) -> tuple[str, str | None, str]:
    parts = source.removeprefix(SCHEME).rsplit(":", 2)
    if len(parts) != 3 or not parts[0] or not parts[2]:
        raise DataError(f"a data set is named datasets:NAME:CONFIG:SPLIT (CONFIG may be empty), got {source!r}")
    return parts[0], parts[1] or None, parts[2]


def _one_line(sentence: str) -> str:
    """A sentence is a line everywhere else: line ends inside it become spaces."""
    return " ".join(sentence.split("\n")) if "\n" in sentence else sentence
