"""Ids of many lines at once, exactly those that the tokenizer would give line by line."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import MarianTokenizer

from tasks.cli.errors import DataError


class Ragged(NamedTuple):
    """Rows of different lengths, end to end: row n is the `lengths[n]` values after those of the rows before."""

    values: NDArray[np.int32]
    lengths: NDArray[np.int32]


class LineEncoder:
    """The ids of many lines of one side, exactly `MarianTokenizer`'s, by SentencePiece's batch encoder.

    Lines in which the tokenizer looks for more than pieces go through the tokenizer: those with a special
    token's text (`</s>`), with a language code in front (`>>de<<`), or with a character unknown to SentencePiece.
    """

    def __init__(self, tokenizer: MarianTokenizer, *, is_target: bool) -> None:
        if tokenizer.separate_vocabs:
            raise DataError("the tokenizer has separate vocabularies; a joint one is needed (train_tokenizer)")
        self.tokenizer, self.is_target = tokenizer, is_target
        self.processor = tokenizer.spm_target if is_target else tokenizer.spm_source
        pieces = [self.processor.id_to_piece(i) for i in range(self.processor.get_piece_size())]
        self.vocab_ids = np.array(tokenizer.convert_tokens_to_ids(pieces), dtype=np.int32)
        self.added_tokens = tuple(tokenizer.get_added_vocab())

    def __call__(self, lines: list[str], num_proc: int = 1) -> Ragged:
        """Encode, eos appended."""
        rows = self.processor.encode(lines, out_type=int, add_eos=True, num_threads=num_proc)
        row_lengths = np.fromiter(map(len, rows), np.int32, len(rows))
        ids = np.fromiter(chain.from_iterable(rows), np.int32, int(row_lengths.sum()))
        encoded = Ragged(self.vocab_ids[ids], row_lengths)
        is_unknown = ids == self.processor.unk_id()
        special = set(self._lines_beyond_pieces(lines))
        if is_unknown.any():
            special.update(np.repeat(np.arange(len(rows)), row_lengths)[is_unknown].tolist())
        return self._with_tokenized(encoded, lines, special) if special else encoded

    def _lines_beyond_pieces(self, lines: list[str]) -> list[int]:
        joined = "\n".join(lines)
        if not any(mark in joined for mark in (">>", *self.added_tokens)):  # the usual case, at memory speed
            return []
        return [
            n
            for n, line in enumerate(lines)
            if line.startswith(">>") or any(token in line for token in self.added_tokens)
        ]

    def _with_tokenized(self, encoded: Ragged, lines: list[str], which: set[int]) -> Ragged:
        rows = np.split(encoded.values, np.cumsum(encoded.lengths)[:-1])
        for n in which:
            side = {"text_target": lines[n]} if self.is_target else {"text": lines[n]}
            rows[n] = np.array(self.tokenizer(**side)["input_ids"], dtype=np.int32)
        return Ragged(np.concatenate(rows), np.array([len(row) for row in rows], dtype=np.int32))
