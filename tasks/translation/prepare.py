"""From text to samples: read or generate, count what is dropped, train the vocabulary, encode."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from accelerate import Accelerator
from transformers import MarianTokenizer

from tasks.cli.errors import writing
from tasks.text.generated.corpus import generate_corpus
from tasks.text.hub import describe, is_dataset, read_dataset
from tasks.text.parallel import DataError, ParallelText, clean, describe_dropped, fingerprint, read_parallel
from tasks.text.tokenizer import load_tokenizer, train_tokenizer
from tasks.translation.config import TranslationConfig
from tasks.translation.data import TokenPairs, TranslationCollator, encode_pairs, lengths


@dataclass(frozen=True)
class Corpus:
    """A translation task, ready to train: encoded pairs, their lengths, and the test sets as text, by name.

    `description` says in a line what the data is, for the model card; `fingerprint` names the content of the
    training and validation text.
    """

    tokenizer: MarianTokenizer
    collate: TranslationCollator
    train_text: ParallelText
    train: TokenPairs
    train_lengths: npt.NDArray[np.int32]
    valid: TokenPairs
    valid_lengths: npt.NDArray[np.int32]
    tests: dict[str, ParallelText]
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
        train, valid, tests = _texts(config, say)
        for name, text in {"validation": valid, **tests}.items():
            if shared := _shared_sources(train, text):
                say(f"{name} text: {shared:,} of {len(text):,} source sentences are in the training text too")
        with writing(config.cache_dir, remedy="make room, or give another --cache-dir"):
            folder = train_tokenizer(train, config.vocab_size, config.cache_dir)
            tokenizer = load_tokenizer(folder)
            train_set, train_lengths = _encoded("training", train, tokenizer, config, say)
            valid_set, valid_lengths = _encoded("validation", valid, tokenizer, config, say)
    return Corpus(
        tokenizer=tokenizer,
        collate=TranslationCollator(tokenizer.pad_token_id, decoder_start_token_id=tokenizer.pad_token_id),
        train_text=train,
        train=train_set,
        train_lengths=train_lengths,
        valid=valid_set,
        valid_lengths=valid_lengths,
        tests=tests,
        description=_describe(config, len(train_set)),
        fingerprint=fingerprint(train) + fingerprint(valid),
    )


def _texts(
    config: TranslationConfig, say: Callable[[str], None]
) -> tuple[ParallelText, ParallelText, dict[str, ParallelText]]:
    if config.is_generated:
        corpus = generate_corpus(seed=config.corpus_seed)
        say("no data named: training on the built-in generated English-German corpus")
        return corpus["train"], corpus["valid"], {"generated": corpus["test"]}

    def read(name: str, sources: Sequence[str]) -> ParallelText:
        whole = read_sources(sources, config.source_lang, config.target_lang)
        with _about(f"{name} text from {', '.join(sources)}", remedy="a pair needs both sides"):
            text, dropped = clean(whole)
        say(f"{name} text: {len(text):,} pairs from {', '.join(sources)}; {describe_dropped(dropped)}")
        return text

    assert config.valid_prefix is not None
    # nothing of a test set is ever dropped
    tests = {
        name: read_sources([source], config.source_lang, config.target_lang)
        for name, source in unique_names(config.test_prefix).items()
    }
    return read("training", config.train_prefix), read("validation", [config.valid_prefix]), tests


def read_sources(sources: Sequence[str], source_lang: str, target_lang: str) -> ParallelText:
    """Read and join text sources, each a prefix of two files or a data set (`hub.read_dataset`).

    Raises:
        DataError: one of them cannot be read.
    """
    joined = ParallelText([], [])
    for source in sources:
        read = read_dataset(source, source_lang, target_lang) if is_dataset(source) else None
        text = read or read_parallel([source], source_lang, target_lang)
        joined.source.extend(text.source)
        joined.target.extend(text.target)
    return joined


def unique_names(sources: Sequence[str]) -> dict[str, str]:
    """Text sources by a short name each, by their full one where two short ones are equal.

    >>> unique_names(["a/test", "b/test", "b/valid"])
    {'a/test': 'a/test', 'b/test': 'b/test', 'valid': 'b/valid'}
    """
    short = [describe(source) for source in sources]
    return {name if short.count(name) == 1 else source: source for name, source in zip(short, sources, strict=True)}


def _shared_sources(train: ParallelText, other: ParallelText) -> int:
    """How many of the other text's source sentences stand in the training text too."""
    sources = set(other.source)
    known = sources.intersection(train.source)
    return sum(source in known for source in other.source)


def _encoded(
    name: str, text: ParallelText, tokenizer: MarianTokenizer, config: TranslationConfig, say: Callable[[str], None]
) -> tuple[TokenPairs, npt.NDArray[np.int32]]:
    max_ratio = config.max_length_ratio if name == "training" else None
    limits = f"--max-length {config.max_length}" + (f", --max-length-ratio {max_ratio}" if max_ratio else "")
    with _about(f"{name} text", remedy=f"raise {limits} (in pieces)"):
        dataset, dropped = encode_pairs(
            text,
            tokenizer,
            cache_dir=Path(config.cache_dir),
            num_proc=config.num_proc,
            max_length=config.max_length,
            max_ratio=max_ratio,
        )
    if any(dropped.values()):
        say(f"{name} text: {describe_dropped(dropped)} ({limits}, in pieces); {len(dataset):,} pairs are left")
    return TokenPairs(dataset), lengths(dataset)


@contextmanager
def _about(what: str, *, remedy: str) -> Iterator[None]:
    """Begin the message of a `DataError` with the text that it is about, and end it with what to do."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{what}: {error}; {remedy}") from error


def _describe(config: TranslationConfig, pairs: int) -> str:
    if config.is_generated:
        return f"the built-in generated corpus, seed {config.corpus_seed}, {pairs:,} training pairs"
    names = ", ".join(describe(source) for source in config.train_prefix)
    return f"{names}: {pairs:,} training pairs"
