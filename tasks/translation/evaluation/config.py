"""The options of an evaluation: models, test text, search, comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tasks.cli.errors import UserError
from tasks.cli.machine import MachineOptions, parse_with_machine
from tasks.cli.options import check_choices, check_least, option
from tasks.decoding.search import GNMT_RERANK, LENGTH_PENALTIES, POWER, Decoding
from tasks.models.names import check_models
from tasks.scoring.bleu import bleu_tokenizer

_LEAST = {"num_beams": 1, "mc_dropout": 0, "num_samples_bootstrap": 1, "seed": 1, "max_tokens": 1}


@dataclass(frozen=True)
class EvaluationConfig:
    """All options of `scripts/eval_bleu.py`."""

    model: list[str] = option(
        [], "model folders or hub ids, any encoder-decoder with its tokenizer; the first is the baseline"
    )

    source: str | None = option(None, "file of source sentences, one a line (plain, .gz, .xz or .bz2)", group="text")
    reference: str | None = option(None, "file of their reference translations, detokenised")
    test_prefix: list[str] = option(
        [], "test sets, each scored by itself: P for files P.en and P.de, or datasets:NAME:CONFIG:SPLIT"
    )
    source_lang: str = option("en", "ending of the source files of a --test-prefix")
    target_lang: str = option("de", "ending of the reference files, and the language of the Moses tokenizer")
    source_code: str | None = option(
        None, "the tokenizer's code of the source language, of multilingual models such as mBART (en_XX)"
    )
    target_code: str | None = option(None, "the tokenizer's code of the target language (de_DE)")
    source_prefix: str = option("", 'text put before every source, such as T5\'s "translate English to German: "')
    bleu_tokenize: str | None = option(None, "tokeniser of sacreBLEU (13a, char, zh ...); by default by the language")

    num_beams: int = option(4, "beam width; 1 is greedy", group="search")
    length_penalty: float = option(0.6, "a, the exponent of the length penalty; L counts pieces, eos included")
    length_penalty_kind: str = option(
        POWER,
        "power ranks beams by log-probability / L^a; gnmt-rerank takes the beams that this search finished and ranks "
        "them by log-probability / ((5+L)/6)^a",
        choices=LENGTH_PENALTIES,
    )
    mc_dropout: int = option(
        0,
        "N: every step takes the mean of N dropout masks' probabilities (N times the work); 0 decodes without dropout",
    )
    max_tokens: int | None = option(
        None, "padded source tokens of a batch, before beams; by default 1 024 on a processor, 8 192 elsewhere"
    )

    output_dir: str | None = option(
        None, "new folder for results.json and the translations, hyp.MODEL.TEST.txt", group="results"
    )
    num_samples_bootstrap: int = option(1_000, "resamples of the paired bootstrap between several models")
    seed: int = option(12_345, "seed of the bootstrap and of the masks of --mc-dropout")

    def __post_init__(self) -> None:
        check_least(self, _LEAST)
        check_models(self.model)
        self._check_search()
        self._check_text()
        bleu_tokenizer(self.target_lang, self.bleu_tokenize)

    @property
    def decoding(self) -> Decoding:
        """The search."""
        return Decoding(self.num_beams, self.length_penalty, self.length_penalty_kind, self.mc_dropout)

    def _check_search(self) -> None:
        if not math.isfinite(self.length_penalty):
            raise UserError(f"--length-penalty must be finite, got {self.length_penalty}")
        check_choices(self)
        if self.length_penalty_kind == GNMT_RERANK and self.num_beams == 1:
            raise UserError(
                f"--length-penalty-kind {GNMT_RERANK} ranks several beams: --num-beams must be at least 2, got 1"
            )

    def _check_text(self) -> None:
        if (self.source is None) != (self.reference is None):
            given, lacking = ("--source", "--reference") if self.reference is None else ("--reference", "--source")
            raise UserError(f"{given} needs {lacking}: a text is scored against its reference, line by line")
        if self.source is None and not self.test_prefix:
            raise UserError("no text to translate: give --test-prefix P, or --source FILE with --reference FILE")


def parse_evaluation(argv: Sequence[str] | None = None) -> tuple[EvaluationConfig, MachineOptions]:
    """Options from the command line; see `parse_with_machine`."""
    return parse_with_machine(EvaluationConfig, argv, "Translate test text and score it.")
