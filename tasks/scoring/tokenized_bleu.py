"""BLEU of tokenised, compound-split text, as older papers on English-German report it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version

from sacrebleu.metrics import BLEU
from sacremoses import MosesPunctNormalizer, MosesTokenizer  # type: ignore[import-untyped]

_COMPOUND = re.compile(r"(\S)-(\S)")


def tokenized_bleu(hypotheses: Sequence[str], references: Sequence[str], lang: str) -> float:
    """The BLEU (0 to 100) of tensor2tensor's `get_ende_bleu.sh`, which Vaswani et al. 2017 and later papers used.

    Moses' Unicode punctuation and tokenizer on both sides, hyphenated compounds split, then case-sensitive BLEU of the
    tokens without smoothing (`multi-bleu.perl`). For comparison with those papers only: splitting compounds gives
    matches that sacreBLEU does not count. The tokenizer is sacremoses, a port that differs from Moses' own in how it
    cuts the last full stop of rare sentences. Both sides are detokenised; `lang` is the target language.
    """
    split = CompoundTokenizer(lang)
    metric = BLEU(tokenize="none", smooth_method="none", force=True)
    return metric.corpus_score([split(x) for x in hypotheses], [[split(x) for x in references]]).score


def describe_tokenized_bleu(lang: str) -> str:
    """The description of the score, in place of a signature."""
    return (
        f"tok:moses-{lang} (sacremoses {version('sacremoses')}), compounds split at -, case:mixed, smooth:none; "
        "the figure of get_ende_bleu.sh"
    )


class CompoundTokenizer:
    """Moses tokens joined by spaces, with the parts of hyphenated compounds as tokens of their own.

    >>> CompoundTokenizer("de")("Das E-Mail-Konto, neu”.")
    'Das E ##AT##-##AT## Mail ##AT##-##AT## Konto , neu &quot; .'
    """

    def __init__(self, lang: str) -> None:
        self._normalize = MosesPunctNormalizer(lang).replace_unicode_punct
        self._tokenizer = MosesTokenizer(lang)

    def __call__(self, sentence: str) -> str:
        """Tokenise one sentence."""
        tokens: str = self._tokenizer.tokenize(self._normalize(sentence), return_str=True)
        return _COMPOUND.sub(r"\1 ##AT##-##AT## \2", tokens)
