"""A vocabulary of words: whatever white space separates, and the two words of the literature, <unk> and <eos>."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from tasks.cli.errors import DataError

UNKNOWN, END = "<unk>", "<eos>"
_WHITE_SPACE = r"[\s\x1c-\x1f]+"  # what `str.split` takes for it
_CHUNK = 10_000  # lines encoded at once


def build_vocabulary(lines: Sequence[str], vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """Make a tokenizer of the words of a text, the most frequent first.

    <eos> stands for the end of a line. <unk> stands for all other words, where the text itself writes it (as Penn
    Treebank and WikiText do) or has more words than `vocab_size`; else no weight would ever be trained for it, and
    the vocabulary has none.

    Args:
        lines: of the training text.
        vocab_size: V, <eos> and <unk> included; None for as many as there are words.

    Raises:
        DataError: `vocab_size` is below 3, a line holds <eos>, or no line has a word.
    """
    if vocab_size is not None and vocab_size < 3:
        raise DataError(f"vocab_size must be at least 3, a word beside {END} and {UNKNOWN}, got {vocab_size}")
    counts = Counter(word for line in lines for word in line.split())
    if not any(character.isprintable() for word in counts for character in word):
        raise DataError("the training text has no word: its lines are blank, or hold characters without a width")
    special = [END]
    if counts.pop(UNKNOWN, 0) or (vocab_size is not None and len(counts) >= vocab_size):
        special.append(UNKNOWN)
    by_count = sorted(counts, key=lambda word: (-counts[word], word))
    words = [*special, *by_count[: None if vocab_size is None else vocab_size - len(special)]]
    unknown = UNKNOWN if UNKNOWN in special else None
    model = WordLevel({word: i for i, word in enumerate(words)}, **({"unk_token": unknown} if unknown else {}))
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Split(Regex(_WHITE_SPACE), "removed")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token=unknown)


def encode_lines(lines: Sequence[str], tokenizer: PreTrainedTokenizerFast, called: str) -> npt.NDArray[np.int32]:
    """The words of a text as one sequence of ids, with <eos> at the end of each line; `called` names the text.

    Raises:
        DataError: a line holds <eos>, <unk> inside of a word, or a word outside of a vocabulary that has no <unk>.
    """
    words = tokenizer.get_vocab()
    for number, line in enumerate(lines, start=1):
        if END in line or UNKNOWN in line:
            for word in line.split():
                if END in word or (UNKNOWN in word and word != UNKNOWN):
                    raise DataError(
                        f"{called}, line {number} holds {word!r}: {END} is added to every line, and {UNKNOWN} is a "
                        "word of its own; change the text"
                    )
        if tokenizer.unk_token is None and (outside := [word for word in line.split() if word not in words]):
            raise DataError(
                f"{called}, line {number}: {outside[0]!r} is not among the {len(words):,} words of the vocabulary, "
                f"which has no {UNKNOWN}; replace it, or train with --vocab-size below that number"
            )
    end = [tokenizer.eos_token_id]
    parts = []
    for start in range(0, len(lines), _CHUNK):
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(lines[start : start + _CHUNK], add_special_tokens=False)
        parts.append(np.concatenate([np.array(one.ids + end, np.int32) for one in encoded]))
    return np.concatenate(parts)


def count_unknown(lines: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> int:
    """How many words become <unk>, those that the text writes so aside."""
    words = tokenizer.get_vocab()
    return sum(word not in words for line in lines for word in line.split())
