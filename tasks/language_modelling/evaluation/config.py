"""The options of an evaluation: models, text, windows, comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.cli.errors import UserError
from tasks.cli.machine import MachineOptions, parse_with_machine
from tasks.cli.options import check_choices, check_least, check_not_blank, option
from tasks.language_modelling.evaluation.tokens import AUTO, LINE_ENDS
from tasks.language_modelling.text import SPLITS
from tasks.models.names import check_models

_LEAST = {"max_length": 1, "stride": 1, "batch_size": 1, "mc_dropout": 0, "resamples": 1, "seed": 0}


@dataclass(frozen=True)
class PerplexityConfig:
    """All options of `scripts/eval_ppl.py`."""

    model: list[str] = option(
        [], "model folders or hub ids, any causal model with its tokenizer; the first is the baseline"
    )

    data: str | None = option(
        None,
        "a text file (plain, .gz, .xz or .bz2); or a folder with ptb.SPLIT.txt, SPLIT.txt or wiki.SPLIT.tokens, a "
        "folder of save_to_disk, or a hub id with its configuration, NAME:CONFIG",
        group="text",
    )
    split: str | None = option(None, "of a --data that is no file; by default test", choices=SPLITS)
    line_end: str = option(
        AUTO,
        'the token of a line end: newline, the tokenizer\'s own of "\\n"; eos, its end-of-sequence token; auto, newline'
        " where the tokenizer gives it back when it decodes, else eos",
        choices=LINE_ENDS,
    )

    max_length: int | None = option(
        None,
        "tokens that a model reads at once; by default all its positions, or 4 096 where it carries a state over them",
        group="windows",
    )
    stride: int | None = option(
        None,
        "tokens from one window to the next, of models without a state: the smaller, the more context and work; by "
        "default --max-length, windows side by side",
    )
    batch_size: int | None = option(None, "windows of a batch, of models without a state; by default 8")
    mc_dropout: int = option(
        0, "N: the mean of N dropout masks' probabilities (N times the work), drawn anew in each window; 0 for none"
    )

    output_dir: str | None = option(None, "new folder for results.json", group="results")
    resamples: int = option(1_000, "resamples of the paired bootstrap between several models")
    seed: int = option(12_345, "seed of the bootstrap and of the masks of --mc-dropout")

    def __post_init__(self) -> None:
        check_least(self, _LEAST)
        check_models(self.model)
        if self.data is None:
            raise UserError("no text to score: give --data, a file or a folder of splits")
        check_choices(self)
        check_not_blank(self, "data")
        if self.max_length is not None and self.max_length >= 2**31:
            raise UserError(f"--max-length must be below 2^31, got {self.max_length}")
        if self.stride is not None and self.max_length is not None and self.stride > self.max_length:
            raise UserError(
                f"--stride {self.stride} is more than --max-length {self.max_length}: the tokens between two windows "
                "would not be scored"
            )


def parse_evaluation(argv: Sequence[str] | None = None) -> tuple[PerplexityConfig, MachineOptions]:
    """Options from the command line; see `parse_with_machine`."""
    return parse_with_machine(PerplexityConfig, argv, "Score a text by language models.")
