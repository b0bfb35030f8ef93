"""Local parallel text: read it strictly, drop unusable pairs by stated reason, and name it by its content."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tasks.cli.errors import DataError as DataError

OPENERS: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
UNREAD, UNPACK = (".zst", ".zip", ".lz4", ".7z"), "unpack it, or pack it as .gz, .xz or .bz2"
DROP_REASONS = ("empty", "too_long", "length_ratio")  # the keys of every count of dropped pairs
_UTF8_BOM = b"\xef\xbb\xbf"
_HASHED_LINES = 10_000  # a pass of `fingerprint`; part of its definition


@dataclass(frozen=True)
class ParallelText:
    """Sentence pairs: line n of `target` translates line n of `source`."""

    source: list[str]
    target: list[str]

    def __post_init__(self) -> None:
        if len(self.source) != len(self.target):
            raise DataError(
                f"parallel text needs as many targets as sources, got {len(self.source)} and {len(self.target)}"
            )

    def __len__(self) -> int:
        return len(self.source)


def read_parallel(prefixes: Sequence[str | Path], source_lang: str, target_lang: str) -> ParallelText:
    """Read and join the pairs of every prefix P from `P.<source_lang>` and `P.<target_lang>`.

    A file may be plain, `.gz`, `.xz` or `.bz2`. Lines end at `\\n` and nowhere else (`read_lines`). Pairs with a
    blank side are kept: `clean` drops and counts them.

    Raises:
        DataError: a side has no file or several, a file is unreadable or empty, or the sides of a prefix
            have different numbers of lines.
    """
    if source_lang == target_lang:
        raise DataError(
            f"source and target language are both {source_lang!r}; give another --source-lang or --target-lang"
        )
    if isinstance(prefixes, (str, Path)):
        prefixes = [prefixes]
    if not prefixes:
        raise DataError("no prefix of parallel text was given")
    text = ParallelText([], [])
    for prefix in prefixes:
        source_path, target_path = (_find_file(prefix, lang) for lang in (source_lang, target_lang))
        source, target = read_lines(source_path), read_lines(target_path)
        if len(source) != len(target):
            raise DataError(
                f"the sides differ in length: {source_path} has {len(source)} lines, {target_path} has {len(target)}; "
                "line n of one must translate line n of the other"
            )
        text.source.extend(source)
        text.target.extend(target)
    return text


def read_lines(path: str | Path) -> list[str]:
    """Read the lines of a UTF-8 text file, plain, `.gz`, `.xz` or `.bz2` by its name.

    Lines end at `\\n` only: U+0085 and U+2028 occur inside real sentences, and `str.splitlines` would cut
    there, so that one side of a parallel text slips against the other. A carriage return before the line
    end and a byte order mark at the start are removed; nothing else is.

    Raises:
        DataError: the file is missing, damaged, empty or not UTF-8 (named with its line, counted from 1).
    """
    path = Path(path)
    try:
        with _open_binary(path) as file:
            lines = list(_decoded_lines(file, path))
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; copy or pack it again") from error
    if not lines:
        raise DataError(f"{path} is empty; it needs a sentence a line")
    if len(lines) == 1 and "\r" in lines[0].rstrip("\r"):
        raise DataError(f"{path}: its lines end in carriage returns alone; convert them to line feeds")
    return lines


def clean(text: ParallelText) -> tuple[ParallelText, dict[str, int]]:
    """Drop the pairs that have a blank side; returns the rest and how many were dropped, by reason.

    Limits on lengths count pieces, so they act after the tokenizer (`data.encode_pairs`); the counts have
    the same keys there.

    Raises:
        DataError: no pair is left.

    >>> clean(ParallelText(["a dog", " "], ["ein Hund", "eine Katze"]))[1]
    {'empty': 1, 'too_long': 0, 'length_ratio': 0}
    """
    kept = [(s, t) for s, t in zip(text.source, text.target, strict=True) if s.strip() and t.strip()]
    dropped = dict.fromkeys(DROP_REASONS, 0) | {"empty": len(text) - len(kept)}
    if not kept:
        raise DataError(f"no pair is left of {len(text)}: {describe_dropped(dropped)}")
    if len(kept) == len(text):
        return text, dropped
    return ParallelText([s for s, _ in kept], [t for _, t in kept]), dropped


def describe_dropped(counts: dict[str, int]) -> str:
    """Say counts of dropped pairs in words, for messages and logs.

    >>> describe_dropped({"empty": 2, "too_long": 0, "length_ratio": 1})
    'dropped 2 empty, 1 length_ratio'
    >>> describe_dropped({"empty": 0})
    'dropped none'
    """
    said = [f"{counts[reason]} {reason}" for reason in DROP_REASONS if counts.get(reason)]
    return f"dropped {', '.join(said) or 'none'}"


def fingerprint(text: ParallelText) -> str:
    """Name a text by its content: equal pairs in equal order, and only they, have equal fingerprints.

    Stable over processes, machines and versions, so caches can be keyed by it.

    >>> fingerprint(ParallelText(["a"], ["b"])) == fingerprint(ParallelText(["b"], ["a"]))
    False
    """
    digest = hashlib.blake2b(digest_size=16)
    for side in (text.source, text.target):
        digest.update(len(side).to_bytes(8, "little"))
        for start in range(0, len(side), _HASHED_LINES):
            lines = side[start : start + _HASHED_LINES]
            # with the lengths, the joined characters say where each line ends
            digest.update(np.array([len(line) for line in lines], dtype="<i8").tobytes())
            digest.update("".join(lines).encode())
    return digest.hexdigest()


def _find_file(prefix: str | Path, lang: str) -> Path:
    """The one file of a prefix and language, whichever way it is packed."""
    wanted = [Path(f"{prefix}.{lang}{packed}") for packed in OPENERS]
    found = [path for path in wanted if path.is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"several files for {prefix} in {lang!r}, keep one: {', '.join(map(str, found))}")
    if folders := [path for path in wanted if path.is_dir()]:
        raise DataError(f"{folders[0]} is a folder; the {lang!r} side of {prefix} must be a file of a sentence a line")
    raise DataError(
        f"no file for {prefix} in {lang!r}: looked for {', '.join(map(str, wanted))}; "
        f"{_languages_present(Path(prefix))}"
    )


def _languages_present(prefix: Path) -> str:
    """What a user who misspelt a language or a prefix needs to see."""
    if not prefix.parent.is_dir():
        return f"there is no folder {prefix.parent}"
    names = (path.name for path in prefix.parent.iterdir() if path.name.startswith(f"{prefix.name}."))
    rests = [name.removeprefix(f"{prefix.name}.") for name in names]
    if unread := [rest for rest in rests if rest.endswith(UNREAD)]:
        return f"{prefix}.{unread[0]} is there, and is not read; {UNPACK}"
    plain = {rest.removesuffix(packed) for packed in filter(None, OPENERS) for rest in rests if rest.endswith(packed)}
    langs = sorted(rest for rest in {*rests, *plain} if rest and "." not in rest)
    return f"this prefix has {', '.join(langs)}" if langs else "this prefix has no language at all"


def _open_binary(path: Path) -> BinaryIO:
    packed = path.suffix if path.suffix in OPENERS else ""
    if path.suffix in UNREAD:
        raise DataError(f"{path}: {path.suffix} is not read; {UNPACK}")
    file = OPENERS[packed](path, "rb")
    return io.BufferedReader(file) if packed else file  # reading lines straight from a decompressor is slow


def _decoded_lines(file: BinaryIO, path: Path) -> Iterator[str]:
    """Lines without their ends; a binary file is iterated by `\\n` alone."""
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(_UTF8_BOM)
            if not line:  # nothing but the mark
                return
        try:
            yield line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number}: not valid UTF-8 ({error.reason}); convert the file") from error
