"""A generated English-German parallel corpus, so that training runs with no data and no network.

A seeded grammar draws sentences in both languages at once: agreement, German gender and case, separable verbs,
verb-second and verb-final order, modals, the perfect, questions, relative clauses. It is small enough to learn in
minutes and compositional, so that a few thousand pairs leave room for regularisation to matter.
"""

from collections.abc import Sequence

from tasks.text.generated.lexicon import Pair
from tasks.text.generated.sentences import Speaker
from tasks.text.parallel import ParallelText

MAX_SENTENCES = 200_000  # drawn distinct for several seeds without slowing down; the grammar holds millions


def generate_corpus(*, train: int = 6_000, valid: int = 300, test: int = 300, seed: int = 0) -> dict[str, ParallelText]:
    """Draw a parallel corpus in three disjoint splits; no sentence of either language occurs twice in it.

    The test split is drawn first, then valid, then train: the first two do not change with the size of train, and a
    smaller train split is the beginning of a larger one. The text depends on nothing but the arguments.

    Args:
        train: sentence pairs to train on, at least 1.
        valid: sentence pairs to select on, at least 1.
        test: sentence pairs to report on, at least 1.
        seed: at least 0; another seed draws another corpus of the same grammar.

    Returns:
        The splits under "train", "valid" and "test".

    Raises:
        ValueError: a size or the seed is too small, or the sizes exceed `MAX_SENTENCES` together.

    >>> corpus = generate_corpus(train=2, valid=1, test=1)
    >>> len(corpus["train"].source), len(corpus["train"].target)
    (2, 2)
    """
    for split, size in (("train", train), ("valid", valid), ("test", test)):
        if size < 1:
            raise ValueError(f"{split} must be at least 1, got {size}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    total = train + valid + test
    if total > MAX_SENTENCES:
        raise ValueError(f"train + valid + test must be at most {MAX_SENTENCES}, got {total}")
    pairs = _distinct_pairs(Speaker(seed), total)
    return {
        "train": _text(pairs[test + valid :]),
        "valid": _text(pairs[test : test + valid]),
        "test": _text(pairs[:test]),
    }


def _distinct_pairs(speaker: Speaker, total: int) -> list[Pair]:
    """Pairs in the order drawn, each side new (membership only: the sets are never iterated over)."""
    sources: set[str] = set()
    targets: set[str] = set()
    pairs: list[Pair] = []
    while len(pairs) < total:
        pair = speaker.sentence()
        if pair.english not in sources and pair.german not in targets:
            sources.add(pair.english)
            targets.add(pair.german)
            pairs.append(pair)
    return pairs


def _text(pairs: Sequence[Pair]) -> ParallelText:
    return ParallelText([pair.english for pair in pairs], [pair.german for pair in pairs])
