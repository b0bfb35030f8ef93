"""Scores of translations, each with what makes it comparable; systems compared by paired bootstrap."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric
from sacrebleu.significance import PairedTest, Result

from tasks.cli.errors import UserError
from tasks.scoring.tokenized_bleu import describe_tokenized_bleu, tokenized_bleu

DEFAULT_TOKENIZER = "13a"
BLEU_TOKENIZERS = (DEFAULT_TOKENIZER, "intl", "char", "zh", "ja-mecab", "ko-mecab", "none")
_OF_LANGUAGE = {"zh": ("zh",), "ja": ("ja-mecab", "char"), "ko": ("ko-mecab", "char"), "th": ("char",), "lo": ("char",)}
_SEED_VARIABLE = "SACREBLEU_SEED"  # sacreBLEU reads its seed there and nowhere else


@dataclass(frozen=True)
class BleuScore:
    """A BLEU (0 to 100) and everything that another number must share to be compared with it.

    `signature` is sacreBLEU's; `decoding` names the beam and the formula of the length penalty.
    """

    bleu: float
    signature: str
    decoding: str

    def __str__(self) -> str:
        return f"BLEU {self.bleu:.2f} ({self.signature}; {self.decoding})"


@dataclass(frozen=True)
class Score:
    """A corpus score, 0 to 100, and how it was computed."""

    metric: str
    value: float
    signature: str


@dataclass(frozen=True)
class PairedScore:
    """A system's score in a paired bootstrap: of the text, and over the resamples of its sentences.

    `mean` and `confidence`: 95 % of the resamples lie in mean +- confidence. `p_value` is the chance of a difference
    from the first system at least this large if both were equally good; None for the first system.
    """

    system: str
    metric: str
    value: float
    mean: float
    confidence: float
    p_value: float | None
    signature: str


def bleu_tokenizer(target_lang: str | None, asked: str | None = None) -> str:
    """sacreBLEU's tokeniser for a language: 13a, but for those that put no spaces between words.

    Of Japanese and Korean by MeCab where that is installed (`pip install sacrebleu[ja]`), else by characters.

    Args:
        target_lang: its code, such as de, zh_CN or jpn; None where it is not known.
        asked: the tokeniser that is wanted instead.

    Raises:
        UserError: it is unknown, or not installed.

    >>> bleu_tokenizer("zh_CN"), bleu_tokenizer("de"), bleu_tokenizer("de", "intl")
    ('zh', '13a', 'intl')
    """
    if asked is not None:
        if asked not in BLEU_TOKENIZERS:
            raise UserError(f"the BLEU tokeniser must be one of {', '.join(BLEU_TOKENIZERS)}, got {asked}")
        if not _is_installed(asked):
            raise UserError(f"the BLEU tokeniser {asked} is not installed (pip install 'sacrebleu[{asked[:2]}]')")
        return asked
    code = re.split("[-_]", (target_lang or "").lower())[0]
    two = {"zho": "zh", "cmn": "zh", "jpn": "ja", "jap": "ja", "kor": "ko", "tha": "th", "lao": "lo"}.get(code, code)
    return next(name for name in (*_OF_LANGUAGE.get(two, ()), DEFAULT_TOKENIZER) if _is_installed(name))


def _is_installed(tokenizer: str) -> bool:
    try:
        BLEU(tokenize=tokenizer)
    except (RuntimeError, ImportError):
        return False
    return True


def score_bleu(
    hypotheses: Sequence[str], references: Sequence[str], decoding: str, tokenizer: str = DEFAULT_TOKENIZER
) -> BleuScore:
    """Corpus BLEU of detokenised text, by sacreBLEU; its signature names the tokeniser.

    Raises:
        ValueError: the numbers of lines differ, or there are none.
    """
    score = _score(BLEU(tokenize=tokenizer), hypotheses, references)
    return BleuScore(score.value, score.signature, decoding)


def score_all(
    hypotheses: Sequence[str], references: Sequence[str], target_lang: str, tokenizer: str = DEFAULT_TOKENIZER
) -> list[Score]:
    """sacreBLEU's BLEU, chrF, and the tokenised BLEU of older papers (`tokenized_bleu`), in this order.

    Raises:
        ValueError: the numbers of lines differ, or there are none.
    """
    scores = [_score(metric, hypotheses, references) for metric in (BLEU(tokenize=tokenizer), CHRF())]
    tokenized = tokenized_bleu(hypotheses, references, target_lang)
    return [*scores, Score("tokenised BLEU", tokenized, describe_tokenized_bleu(target_lang))]


def paired_bootstrap(
    systems: Mapping[str, Sequence[str]],
    references: Sequence[str],
    *,
    num_samples: int,
    seed: int,
    tokenizer: str = DEFAULT_TOKENIZER,
) -> list[PairedScore]:
    """Compare every system with the first by paired bootstrap resampling (Koehn 2004): BLEU of all, then chrF.

    Systems are hypotheses by name. The seed is at least 1, as sacreBLEU takes 0 for no seed at all.

    Raises:
        ValueError: there are fewer than two systems, or the numbers of lines differ.
    """
    if len(systems) < 2 or seed < 1 or num_samples < 1:
        raise ValueError(
            f"{len(systems)} systems, seed {seed}, {num_samples} resamples: at least 2, 1 and 1 are needed"
        )
    for hypotheses in systems.values():
        _check_lines(hypotheses, references)
    with _sacrebleu_seed(seed):
        test = PairedTest(
            [(name, list(hypotheses)) for name, hypotheses in systems.items()],
            {"BLEU": BLEU(tokenize=tokenizer), "chrF": CHRF()},
            [list(references)],
            test_type="bs",
            n_samples=num_samples,
        )
        signatures, columns = test()
    names = columns.pop("System")
    return [
        PairedScore(
            name, metric, float(r.score), float(r.mean), float(r.ci), _p_value(r, results[0]), str(signatures[metric])
        )
        for metric, results in columns.items()
        for name, r in zip(names, results, strict=True)
    ]


def one_line_each(hypotheses: Sequence[str]) -> tuple[list[str], int]:
    r"""Translations as lines of a file: line ends inside one become spaces; and how many had any.

    >>> one_line_each(["a\nb", "c"])
    (['a b', 'c'], 1)
    """
    lines = [hypothesis.replace("\r\n", " ").replace("\n", " ").replace("\r", " ") for hypothesis in hypotheses]
    return lines, sum(line != hypothesis for line, hypothesis in zip(lines, hypotheses, strict=True))


def _p_value(result: Result, baseline: Result) -> float | None:
    """Equal scores do not differ: sacreBLEU counts strictly larger differences and gives them p = 1 / (n + 1)."""
    if result.p_value is None:
        return None
    return 1.0 if result.score == baseline.score else float(result.p_value)


def _score(metric: Metric, hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    _check_lines(hypotheses, references)
    score = metric.corpus_score(list(hypotheses), [list(references)])
    return Score(score.name, score.score, str(metric.get_signature()))


def _check_lines(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if len(hypotheses) != len(references) or not references:
        raise ValueError(f"{len(hypotheses)} hypotheses cannot be scored against {len(references)} references")


@contextmanager
def _sacrebleu_seed(seed: int) -> Iterator[None]:
    before = os.environ.get(_SEED_VARIABLE)
    os.environ[_SEED_VARIABLE] = str(seed)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SEED_VARIABLE]
        else:
            os.environ[_SEED_VARIABLE] = before
