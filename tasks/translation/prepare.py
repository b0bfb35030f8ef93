"""From text to samples: read or generate, count what is dropped, train the vocabulary, encode."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from accelerate import Accelerator
from datasets import Dataset
from transformers import MarianTokenizer

from tasks.cli.errors import DataError, writing
from tasks.text.generated.corpus import generate_corpus
from tasks.text.hub import describe, is_dataset, read_dataset
from tasks.text.parallel import ParallelText, clean, describe_dropped, fingerprint, read_parallel
from tasks.text.tokenizer import load_tokenizer, train_tokenizer
from tasks.translation.data import TranslationCollator, encode_pairs, lengths

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Texts:
    """The raw text of a translation task: test sets by name, and a line that says what the training text is."""

    train: ParallelText
    valid: ParallelText
    tests: dict[str, ParallelText]
    description: str


@dataclass(frozen=True)
class Corpus:
    """A translation task, ready to train: encoded pairs, their lengths, and the test sets as text, by name.

    `description` says in a line what the data is, for the model card; `fingerprint` names the content of the
    training and validation text.
    """

    tokenizer: MarianTokenizer
    collate: TranslationCollator
    train: Dataset
    train_lengths: npt.NDArray[np.int32]
    valid: Dataset
    valid_lengths: npt.NDArray[np.int32]
    tests: dict[str, ParallelText]
    description: str
    fingerprint: str


def generate_texts(seed: int) -> Texts:
    """The built-in corpus."""
    corpus = generate_corpus(seed=seed)
    logger.info("no data named: training on the built-in generated English-German corpus")
    tests = {"generated": corpus["test"]}
    return Texts(corpus["train"], corpus["valid"], tests, f"the built-in generated corpus, seed {seed}")


def read_texts(train: Sequence[str], valid: str, tests: Sequence[str], source_lang: str, target_lang: str) -> Texts:
    """Read the sources of every text, each a prefix of two files or a data set, and say what was dropped.

    Raises:
        DataError: a source cannot be read, or holds no pair with both sides.
    """

    def read(name: str, sources: Sequence[str]) -> ParallelText:
        whole = read_sources(sources, source_lang, target_lang)
        with _about(f"{name} text from {', '.join(sources)}", remedy="a pair needs both sides"):
            text, dropped = clean(whole)
        logger.info(f"{name} text: {len(text):,} pairs from {', '.join(sources)}; {describe_dropped(dropped)}")
        return text

    # nothing of a test set is ever dropped
    test_texts = {
        name: read_sources([source], source_lang, target_lang) for name, source in unique_names(tests).items()
    }
    return Texts(read("training", train), read("validation", [valid]), test_texts, ", ".join(map(describe, train)))


def prepare(
    read: Callable[[], Texts],
    accelerator: Accelerator,
    *,
    vocab_size: int,
    max_length: int,
    cache_dir: str,
    normalization: str = "identity",
    max_length_ratio: float | None = None,
    num_proc: int = 1,
) -> Corpus:
    """Make the corpus of a run from the text that `read` gives; the first rank works, the others use its cache.

    Pairs over `max_length` or `max_length_ratio` are dropped and counted, see `encode_pairs`.

    Raises:
        DataError: the text cannot be read or leaves nothing to train on.
    """
    with accelerator.main_process_first():
        texts = read()
        for name, text in {"validation": texts.valid, **texts.tests}.items():
            if shared := _shared_sources(texts.train, text):
                logger.info(f"{name} text: {shared:,} of {len(text):,} source sentences are in the training text too")
        with writing(cache_dir, remedy="make room, or give another --cache-dir"):
            tokenizer = load_tokenizer(train_tokenizer(texts.train, vocab_size, cache_dir, normalization=normalization))

            def encoded(
                name: str, text: ParallelText, max_ratio: float | None = None
            ) -> tuple[Dataset, npt.NDArray[np.int32]]:
                limits = f"--max-length {max_length}" + (f", --max-length-ratio {max_ratio}" if max_ratio else "")
                with _about(f"{name} text", remedy=f"raise {limits} (in pieces)"):
                    dataset, dropped = encode_pairs(
                        text,
                        tokenizer,
                        cache_dir=Path(cache_dir),
                        num_proc=num_proc,
                        max_length=max_length,
                        max_ratio=max_ratio,
                    )
                if any(dropped.values()):
                    counts = describe_dropped(dropped)
                    logger.info(f"{name} text: {counts} ({limits}, in pieces); {len(dataset):,} pairs are left")
                return dataset, lengths(dataset)

            train, train_lengths = encoded("training", texts.train, max_length_ratio)
            valid, valid_lengths = encoded("validation", texts.valid)
    return Corpus(
        tokenizer=tokenizer,
        collate=TranslationCollator(tokenizer.pad_token_id, decoder_start_token_id=tokenizer.pad_token_id),
        train=train,
        train_lengths=train_lengths,
        valid=valid,
        valid_lengths=valid_lengths,
        tests=texts.tests,
        description=f"{texts.description}: {len(train):,} training pairs",
        fingerprint=fingerprint(texts.train) + fingerprint(texts.valid),
    )


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


@contextmanager
def _about(what: str, *, remedy: str) -> Iterator[None]:
    """Begin the message of a `DataError` with the text that it is about, and end it with what to do."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{what}: {error}; {remedy}") from error
