"""From text to ids: read or generate the three splits, make the vocabulary, count what is special."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from tasks.language_modelling.text import SPLITS, generated_splits, read_split
from tasks.language_modelling.vocabulary import UNKNOWN, build_vocabulary, count_unknown, encode_lines

logger = logging.getLogger(__name__)

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Corpus:
    """A text in three splits, each one sequence of ids with <eos> at the end of every line.

    `description` says in a line what the text is, for the model card; `fingerprint` names the content of the training
    and validation text.
    """

    tokenizer: PreTrainedTokenizerFast
    train: Ids
    valid: Ids
    test: Ids
    description: str
    fingerprint: str


def load_corpus(data: str | None, *, corpus_seed: int = 0, vocab_size: int | None = None) -> Corpus:
    """Read the text `data` (see `read_split`) or generate it, and encode it with a vocabulary of its training words.

    Raises:
        DataError: a split is missing or cannot be read; or a word of it is outside of a vocabulary without <unk>.
    """
    if data is None:
        logger.info("no --data: training on the English side of the built-in generated corpus")
        texts = generated_splits(corpus_seed)
    else:
        texts = {split: read_split(data, split) for split in SPLITS}
    tokenizer = build_vocabulary(texts["train"], vocab_size)
    called = data or "the generated corpus"
    ids = {split: encode_lines(lines, tokenizer, f"{called}, {split}") for split, lines in texts.items()}
    for split, lines in texts.items():
        logger.info(f"{split} text: {_describe(lines, ids[split], tokenizer)}")
    digest = hashlib.blake2b(digest_size=16)
    for part in (ids["train"].tobytes(), ids["valid"].tobytes(), *map(str.encode, sorted(tokenizer.get_vocab()))):
        digest.update(part)
    name = f"the built-in generated corpus, English, seed {corpus_seed}" if data is None else data
    about = f"{name}: {len(ids['train']):,} training tokens, {len(tokenizer):,} words"
    return Corpus(tokenizer, ids["train"], ids["valid"], ids["test"], about, digest.hexdigest())


def _describe(lines: Sequence[str], ids: Ids, tokenizer: PreTrainedTokenizerFast) -> str:
    said = [f"{len(lines):,} lines, {len(ids):,} tokens with an <eos> each"]
    if empty := sum(not line.strip() for line in lines):
        said.append(f"{empty:,} lines empty but for it")
    if unknown := count_unknown(lines, tokenizer):
        said.append(f"{unknown:,} words outside of the vocabulary, read as {UNKNOWN}")
    return "; ".join(said)
