"""The options of a language modelling run; presets are named values that any option overrides."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, get_args

from seqba.modules import MaskScope
from tasks.cli.errors import UserError
from tasks.cli.options import check_choices, check_least, check_not_blank, flag, option
from tasks.language_modelling.presets import DATA, PRESETS
from tasks.run.options import MAY_DIFFER, TrainingOptions, training_parser

_LEAST = {
    "embedding_size": 1, "hidden_size": 1, "num_layers": 1, "batch_size": 1, "bptt": 1, "nonmono": 1,
    "valid_batch_size": 1, "vocab_size": 3, "corpus_seed": 0,
}  # fmt: skip
_DROPOUTS = ("input_dropout", "hidden_dropout", "output_dropout", "embedding_dropout", "weight_dropout")


@dataclass(frozen=True)
class LanguageModelConfig:
    """Options of `scripts/train_ptb.py` beside those of every run; the defaults are the preset "generated".

    "awd-lstm-ptb" is the model and the training of Merity et al. 2018 on Penn Treebank, as the Batch Augmentation paper
    takes it (section 4.3, M = 10).
    """

    preset: str = option(
        "generated", "a named set of option values; an option that is given overrides it", choices=PRESETS
    )

    data: str | None = option(
        None,
        "folder with ptb.SPLIT.txt, SPLIT.txt or wiki.SPLIT.tokens for the splits train, valid and test (plain, .gz, "
        ".xz or .bz2), a folder of save_to_disk, or a hub id with its configuration, NAME:CONFIG",
        group="data",
    )
    corpus_seed: int = option(0, "seed of the generated corpus, its test sentences too")
    vocab_size: int | None = option(
        None,
        "largest vocabulary, <eos> and <unk> included; rarer words become <unk>; by default all words",
    )

    embedding_size: int = option(
        128, "width of the embeddings and of the last layer", group="model; the dropouts are the transform T"
    )
    hidden_size: int = option(256, "width of the other layers")
    num_layers: int = option(2, "LSTM layers")
    input_dropout: float = option(0.3, "probability of zeroing, on the embedded input; one mask a window")
    hidden_dropout: float = option(0.2, "probability of zeroing, between the layers; one mask a window")
    output_dropout: float = option(0.3, "probability of zeroing, on the last layer's output; one mask a window")
    embedding_dropout: float = option(0.1, "probability that a word of the vocabulary is zeroed")
    weight_dropout: float = option(0.3, "probability that a recurrent weight is zeroed")
    mask_scope: str = option(
        "per_copy",
        "masks of weights and of words: per_copy, each copy its own; shared, one for all copies of a pass",
        choices=get_args(MaskScope),
    )

    batch_size: int = option(20, "B, the parallel streams of a rank's batch, before repetition", group="optimisation")
    bptt: int = option(
        70, "usual length of a window in tokens; lengths vary at random around it, and the rate is scaled with them"
    )
    learning_rate: float = option(30.0, "learning rate of SGD for a window of --bptt time steps")
    weight_decay: float = option(1.2e-6, "L2 penalty of SGD")
    alpha: float = option(2.0, "weight of activation regularisation (AR)")
    beta: float = option(1.0, "weight of temporal activation regularisation (TAR)")
    nonmono: int = option(
        5, "average the weights (NT-ASGD) once a validation is worse than the best of those before the last so many"
    )
    valid_batch_size: int = option(10, "streams of a validation; the test text is always one")

    def __post_init__(self) -> None:
        check_least(self, _LEAST)
        for name in _DROPOUTS:
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{flag(name)} is a probability, from 0 to below 1, got {getattr(self, name)}")
        for name in ("weight_decay", "alpha", "beta"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{flag(name)} must be at least 0 and finite, got {getattr(self, name)}")
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(f"--learning-rate must be above 0 and finite, got {self.learning_rate}")
        check_choices(self)
        check_not_blank(self, "data")

    @property
    def text(self) -> str:
        """A short name of the text."""
        return "generated" if self.data is None else Path(self.data).name.replace(":", "-")


LanguageModelOptions: TypeAlias = TrainingOptions[LanguageModelConfig]


def run_folder(options: LanguageModelOptions) -> str:
    """The run folder, where it is not named one that says text, M and seed."""
    text, copies, run = options.config.text, options.copies, options.run
    return run.output_dir or f"runs/language-modelling-{text}-m{copies.ba_m}-seed{run.seed}"


MAY_DIFFER_HERE = (*MAY_DIFFER, "data", "valid_batch_size")  # the text is compared by content


def parse_config(argv: Sequence[str] | None = None) -> LanguageModelOptions:
    """Options from the command line (`--ba-m` and `--ba_m` alike), over those of `--preset`.

    Raises:
        UserError: a value out of range, an unknown preset, or one that needs data and has none.
    """
    parser, preset = training_parser(LanguageModelConfig, PRESETS, argv, "Train a language model.")
    parser.parse_known_options(argv)  # an unknown option is named first
    options = LanguageModelOptions(*parser.parse_args_into_dataclasses(argv))
    if options.config.data is None and preset in DATA:
        root = os.environ.get("SEQBA_DATA")
        if root is None:
            raise UserError(f"--preset {preset} needs --data, or $SEQBA_DATA for a folder that holds {DATA[preset]}/")
        return options.changed(data=str(Path(root, DATA[preset])))
    return options
