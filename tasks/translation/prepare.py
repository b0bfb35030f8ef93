"""From text to samples: read or generate, count what is dropped, train the vocabulary, encode."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from accelerate import Accelerator
from transformers import MarianTokenizer

from tasks.translation.config import TranslationConfig
from tasks.translation.corpus import generate_corpus
from tasks.translation.data import TokenPairs, TranslationCollator, encode_pairs, lengths
from tasks.translation.text import ParallelText, clean, describe_dropped, fingerprint, read_parallel
from tasks.translation.tokenizer import load_tokenizer, train_tokenizer


@dataclass(frozen=True)
class Corpus:
    """A translation task, ready to train: encoded pairs, their lengths, and the test text as text.

    `description` says in a line what the data is, for the model card; `fingerprint` names the content of the
    training and validation text.
    """

    tokenizer: MarianTokenizer
    collate: TranslationCollator
    train: TokenPairs
    train_lengths: npt.NDArray[np.int32]
    valid: TokenPairs
    valid_lengths: npt.NDArray[np.int32]
    test: ParallelText | None
    description: str
    fingerprint: str


def prepare(config: TranslationConfig, accelerator: Accelerator, *, say: Callable[[str], None]) -> Corpus:
    """Make the corpus of a run; the first rank works, the others find its results in the cache.

    Args:
        config: names the data, the vocabulary's size, the longest sentence.
        accelerator: whose first rank goes first.
        say: is told how many pairs were read and dropped, and why.

    Raises:
        DataError: the text cannot be read or leaves nothing to train on.
    """
    with accelerator.main_process_first():
        train, valid, test = _texts(config, say)
        folder = train_tokenizer(train, config.vocab_size, config.cache_dir)
        tokenizer = load_tokenizer(folder)
        train_set, train_lengths = _encoded("training", train, tokenizer, config, say)
        valid_set, valid_lengths = _encoded("validation", valid, tokenizer, config, say)
    return Corpus(
        tokenizer=tokenizer,
        collate=TranslationCollator(tokenizer.pad_token_id, decoder_start_token_id=tokenizer.pad_token_id),
        train=train_set,
        train_lengths=train_lengths,
        valid=valid_set,
        valid_lengths=valid_lengths,
        test=test,
        description=_describe(config, len(train_set)),
        fingerprint=fingerprint(train) + fingerprint(valid),
    )


def _texts(
    config: TranslationConfig, say: Callable[[str], None]
) -> tuple[ParallelText, ParallelText, ParallelText | None]:
    if config.is_generated:
        corpus = generate_corpus(seed=config.corpus_seed)
        say("no data named: training on the built-in generated English-German corpus")
        return corpus["train"], corpus["valid"], corpus["test"]

    def read(name: str, prefixes: Sequence[str]) -> ParallelText:
        text, dropped = clean(read_parallel(prefixes, config.source_lang, config.target_lang))
        say(f"{name} text: {len(text):,} pairs from {', '.join(prefixes)}; {describe_dropped(dropped)}")
        return text

    assert config.valid_prefix is not None
    test = None
    if config.test_prefix:  # nothing of a test set is ever dropped
        test = read_parallel(config.test_prefix, config.source_lang, config.target_lang)
    return read("training", config.train_prefix), read("validation", [config.valid_prefix]), test


def _encoded(
    name: str, text: ParallelText, tokenizer: MarianTokenizer, config: TranslationConfig, say: Callable[[str], None]
) -> tuple[TokenPairs, npt.NDArray[np.int32]]:
    dataset, dropped = encode_pairs(
        text,
        tokenizer,
        cache_dir=Path(config.cache_dir),
        num_proc=config.num_proc,
        max_length=config.max_length,
        too_long="drop",
    )
    if any(dropped.values()):
        say(f"{name} text: {describe_dropped(dropped)} (over --max-length {config.max_length} pieces)")
    return TokenPairs(dataset), lengths(dataset)


def _describe(config: TranslationConfig, pairs: int) -> str:
    if config.is_generated:
        return f"the built-in generated corpus, seed {config.corpus_seed}, {pairs:,} training pairs"
    names = ", ".join(Path(prefix).name for prefix in config.train_prefix)
    return f"{names}: {pairs:,} training pairs"
