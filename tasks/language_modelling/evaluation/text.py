"""The text of an evaluation, and what it has of each unit that figures are given by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tasks.cli.errors import DataError, UserError
from tasks.language_modelling.text import read_split
from tasks.text.parallel import read_lines


@dataclass(frozen=True)
class Text:
    """Lines without their ends, and how messages call them."""

    lines: Sequence[str]
    called: str

    @property
    def num_words(self) -> int:
        """What white space separates, and one more for each line end.

        So does the literature count for its word perplexities: Penn Treebank's test text has 82,430, with an <eos> each
        for its 3,761 lines.
        """
        return sum(len(line.split()) + 1 for line in self.lines)

    @property
    def line_bytes(self) -> npt.NDArray[np.int64]:
        r"""Bytes of each line, (lines,): those of its UTF-8, and one for the "\n" at its end."""
        return np.array([len(line.encode()) + 1 for line in self.lines], np.int64)


def read_text(data: str, split: str | None) -> Text:
    """Read a file, as `tasks.text.parallel.read_lines`, or a split (`test` by default), as `read_split`.

    Raises:
        DataError: theirs, or no line holds a word.
        UserError: a file and a split are given.
    """
    if Path(data).is_file():
        if split is not None:
            raise UserError(
                f"--data {data} is a file, which has no splits; leave --split {split} out, or give a folder"
            )
        text = Text(read_lines(data), data)
    else:
        split = split or "test"
        text = Text(read_split(data, split), f"{data}, {split}")
    if not any(line.strip() for line in text.lines):
        raise DataError(f"{text.called}: {len(text.lines):,} lines, and no word in any; there is nothing to score")
    return text
