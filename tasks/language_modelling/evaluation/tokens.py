"""A text as the tokens that a model is scored on: all of it, line ends included, and what is special about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from tasks.cli.errors import DataError, UserError
from tasks.language_modelling.evaluation.text import Text

AUTO, NEWLINE, EOS = LINE_ENDS = ("auto", "newline", "eos")

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """A text's ids in order.

    Attributes:
        ids: (N,), the line ends among them.
        lines: (N,), the line that each token begins in.
        first: the id that the first token is predicted from.
        line_end: how a line end is written, as messages show it.
        unknown: tokens of words outside the vocabulary.
        dropped: characters that belong to no token, white space aside.
    """

    ids: Numbers
    lines: Numbers
    first: int
    line_end: str
    unknown: int
    dropped: int


def encode(text: Text, tokenizer: PreTrainedTokenizerBase, line_end: str = AUTO) -> Tokens:
    r"""Encode a text, with a line end after each line.

    Under `newline` the text is encoded in one piece, every line with its "\n"; a token that holds more than one line
    end belongs to the line that it begins in. (A tokenizer without character offsets encodes line by line.) Under `eos`
    lines are encoded one by one, and the end-of-sequence token follows each. `auto` is `newline` where the tokenizer
    decodes the token of "\n" to "\n". The first token is predicted from the tokenizer's bos, where it has one, else
    from a line end.

    Raises:
        UserError: the tokenizer has no such line end.
        DataError: a line holds the end-of-sequence token under `eos`, or a word outside a vocabulary that has no
            unknown token.
    """
    newline = _newline(tokenizer)
    if line_end == AUTO:
        line_end = EOS if newline is None else NEWLINE
    end = tokenizer.eos_token_id if line_end == EOS else newline
    if end is None:
        other = EOS if line_end == NEWLINE else NEWLINE
        fault = 'does not give "\\n" back' if line_end == NEWLINE else "has no end-of-sequence token"
        raise UserError(
            f"--line-end {line_end}: the model's {type(tokenizer).__name__} {fault}; give --line-end {other}"
        )
    pieces = [f"{line}\n" for line in text.lines] if line_end == NEWLINE else list(text.lines)
    in_one_piece = line_end == NEWLINE and tokenizer.is_fast
    if in_one_piece:
        pieces = ["".join(pieces)]
    encoded = _encode_all(pieces, text, tokenizer)
    rows, unknown = encoded["input_ids"], 0
    if tokenizer.unk_token_id is not None:
        written = sum(line.count(str(tokenizer.unk_token)) for line in text.lines)
        unknown = max(0, sum(row.count(tokenizer.unk_token_id) for row in rows) - written)
    dropped = _num_dropped(pieces, encoded)
    if dropped and tokenizer.unk_token_id is None:
        raise _outside(text, tokenizer)
    if line_end == EOS:
        for number, row in enumerate(rows, start=1):
            if end in row:
                raise DataError(
                    f"{text.called}, line {number} holds {tokenizer.eos_token!r}, which --line-end eos puts at the end "
                    "of every line; change the text, or give --line-end newline"
                )
        rows = [[*row, end] for row in rows]
    ids = np.concatenate([np.array(row, np.int64) for row in rows])
    if in_one_piece:
        starts = np.cumsum([0, *(len(line) + 1 for line in text.lines[:-1])])
        lines = np.searchsorted(starts, [start for start, _ in encoded["offset_mapping"][0]], side="right") - 1
    else:
        lines = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    first = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return Tokens(ids, lines, int(first), str(tokenizer.eos_token) if line_end == EOS else '"\\n"', unknown, dropped)


def _newline(tokenizer: PreTrainedTokenizerBase) -> int | None:
    r"""The last token of "\n", where the tokenizer keeps line ends at all."""
    try:
        ids = _call(tokenizer, ["\n"])["input_ids"][0]
    except Exception:  # of the tokenizers library: no unknown token
        return None
    if not ids or tokenizer.unk_token_id in ids:
        return None
    decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return int(ids[-1]) if decoded == "\n" else None


def _call(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Any:
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,  # about texts longer than a model takes
    )


def _encode_all(pieces: Sequence[str], text: Text, tokenizer: PreTrainedTokenizerBase) -> Any:
    """All pieces; a word that the tokenizers library refuses is named with its line."""
    try:
        return _call(tokenizer, pieces)
    except Exception as error:  # the library knows no type of its own
        raise _outside(text, tokenizer) from error


def _num_dropped(pieces: Sequence[str], encoded: Any) -> int:
    """How many characters belong to no token, white space aside; 0 where a tokenizer knows no offsets."""
    count = 0
    for piece, offsets in zip(pieces, encoded.get("offset_mapping", ()), strict=False):
        spans, size = np.array(offsets, np.int64).reshape(-1, 2), len(piece) + 1
        depth = np.cumsum(np.bincount(spans[:, 0], minlength=size) - np.bincount(spans[:, 1], minlength=size))
        count += sum(not piece[i].isspace() for i in np.flatnonzero(depth[:-1] == 0))
    return count


def _outside(text: Text, tokenizer: PreTrainedTokenizerBase) -> DataError:
    """The first word that the tokenizer refuses, or of which it drops a part."""
    words = ((number, word) for number, line in enumerate(text.lines, start=1) for word in line.split())
    number, word = next((place for place in words if not _is_kept(place[1], tokenizer)), (0, ""))
    place = f", line {number}: {word!r}" if number else ": a word"
    return DataError(
        f"{text.called}{place} is not in the vocabulary of the model's {type(tokenizer).__name__}, which has no "
        "unknown token; replace it"
    )


def _is_kept(word: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        return not _num_dropped([word], _call(tokenizer, [word]))
    except Exception:  # as in `_encode_all`
        return False
