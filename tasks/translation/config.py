"""The options of a translation run, and the presets: named values that any option overrides."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tasks.cli.errors import UserError
from tasks.cli.options import OptionParser, check_choices, check_least, flag, option
from tasks.run.options import MAY_DIFFER, TrainingOptions, training_parser
from tasks.scoring.bleu import bleu_tokenizer
from tasks.text.hub import describe
from tasks.text.tokenizer import NORMALIZATIONS
from tasks.translation.presets import PRESETS, TEXTS, is_text_of_preset, text_of_preset

_LEAST = {
    "max_tokens": 1, "warmup_updates": 1, "num_proc": 1, "num_beams": 1, "num_layers": 1, "num_heads": 1,
    "ffn_width": 1, "width": 2, "max_length": 2, "vocab_size": 1, "corpus_seed": 0,
}  # fmt: skip

LR_DECAYS = ("inverse-sqrt", "linear", "cosine")


@dataclass(frozen=True)
class TranslationConfig:
    """Options of `scripts/train_wmt.py` beside those of every run; the defaults are the preset "generated".

    "transformer-base" is the architecture, schedule and batch of Vaswani et al. 2017 (table 3, base) as the Batch
    Augmentation paper trains it (section 4.3): 100 000 updates of 4 096 padded tokens a rank.
    """

    preset: str = option(
        "generated", "a named set of option values; an option that is given overrides it", choices=PRESETS
    )

    train_prefix: list[str] = option(
        [],
        "parallel training text: P for files P.en and P.de (plain, .gz, .xz or .bz2), or "
        "datasets:NAME:CONFIG:SPLIT for a data set of the hub or a folder; several are joined",
        group="data",
    )
    valid_prefix: str | None = option(None, "parallel text that chooses the best checkpoint")
    test_prefix: list[str] = option([], "parallel test text, translated and scored at the end, each by itself")
    data_dir: str | None = option(None, "folder of the text that a preset names; by default $SEQBA_DATA")
    source_lang: str = option("en", "ending of the source files")
    target_lang: str = option("de", "ending of the target files")
    corpus_seed: int = option(0, "seed of the generated corpus, its test sentences too")
    vocab_size: int = option(1_000, "pieces of the joint SentencePiece BPE vocabulary")
    normalization: str = option(
        "identity",
        "SentencePiece's rule for the text before it is cut into pieces; all but identity fold characters together (… "
        "to ..., full-width to plain), which no translation can then contain",
        choices=NORMALIZATIONS,
    )
    max_length: int = option(250, "longest sentence in pieces, eos included; longer pairs are dropped and counted")
    max_length_ratio: float | None = option(
        None, "drop training pairs whose longer side has over this many times the pieces of the shorter (9 if short)"
    )
    cache_dir: str = option("runs/cache", "folder for the trained vocabulary and the preprocessed text")
    num_proc: int = option(1, "threads that preprocess")

    width: int = option(192, "width of the model, D", group="model; the dropouts are the transform T")
    ffn_width: int = option(768, "width of the feed-forward layers")
    num_layers: int = option(2, "layers of the encoder, and of the decoder")
    num_heads: int = option(4, "heads of every attention layer, H")
    dropout: float = option(0.1, "probability of zeroing, on embeddings and residual branches")
    attention_dropout: float = option(0.1, "probability of zeroing, on attention weights")
    activation_dropout: float = option(0.1, "probability of zeroing, inside the feed-forward layers")

    max_tokens: int = option(
        512, "padded tokens in a batch, max(source, target) times pairs, before repetition", group="optimisation"
    )
    warmup_updates: int = option(150, "updates of linear warm-up")
    lr_scale: float = option(0.35, "the learning rate's peak is this times (width * warmup-updates)^-0.5")
    lr_decay: str = option(
        "inverse-sqrt",
        "fall of the rate after its peak; linear and cosine end at 0 at --max-updates",
        choices=LR_DECAYS,
    )
    label_smoothing: float = option(0.1, "probability mass spread evenly over the vocabulary")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, slower")

    num_beams: int = option(4, "beam width of the search for translations", group="decoding")
    length_penalty: float = option(0.6, "finished beams are ranked by log-probability / length^this")
    bleu_tokenize: str | None = option(None, "tokeniser of sacreBLEU (13a, char, zh ...); by default by the language")

    def __post_init__(self) -> None:
        check_least(self, _LEAST)
        if self.max_length_ratio is not None and not self.max_length_ratio >= 1:
            raise UserError(f"--max-length-ratio must be at least 1, got {self.max_length_ratio}")
        if not 0 < self.lr_scale < float("inf"):
            raise UserError(f"--lr-scale must be above 0 and finite, got {self.lr_scale}")
        for name in ("dropout", "attention_dropout", "activation_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{flag(name)} is a probability, from 0 to below 1, got {getattr(self, name)}")
        if not abs(self.length_penalty) < float("inf"):
            raise UserError(f"--length-penalty must be finite, got {self.length_penalty}")
        check_choices(self)
        bleu_tokenizer(self.target_lang, self.bleu_tokenize)
        if self.width % (2 * self.num_heads):
            raise UserError(f"--width must be a multiple of 2 * --num-heads = {2 * self.num_heads}, got {self.width}")
        named = [bool(self.train_prefix), self.valid_prefix is not None]
        if any([*named, bool(self.test_prefix)]) and not all(named):
            raise UserError("text of your own needs --train-prefix and --valid-prefix (and --test-prefix to be scored)")

    @property
    def is_generated(self) -> bool:
        """Whether the built-in corpus is used: no data is named."""
        return not self.train_prefix

    @property
    def text(self) -> str:
        """A short name of the training text."""
        if self.is_generated:
            return "generated"
        if is_text_of_preset(self.preset, self.train_prefix):
            return self.preset
        return describe(self.train_prefix[0]).replace(":", "-")


TranslationOptions: TypeAlias = TrainingOptions[TranslationConfig]


def run_folder(options: TranslationOptions) -> str:
    """The run folder, where it is not named one that says text, M and seed."""
    text, copies, run = options.config.text, options.copies, options.run
    return run.output_dir or f"runs/translation-{text}-m{copies.ba_m}-seed{run.seed}"


def may_differ(config: TranslationConfig) -> tuple[str, ...]:
    """The options that a resumed run may change: nothing that reaches the weights. (Text is compared by content.)"""
    own = ("cache_dir", "data_dir", "train_prefix", "valid_prefix", "test_prefix", "num_proc", "num_beams")
    names = (*MAY_DIFFER, *own, "length_penalty", "bleu_tokenize")
    if config.lr_decay == "inverse-sqrt":
        return names
    return tuple(name for name in names if name != "max_updates")  # the learning rate falls towards it


def parse_config(argv: Sequence[str] | None = None) -> TranslationOptions:
    """Options from the command line (`--ba-m` and `--ba_m` alike), over those of `--preset`.

    Raises:
        UserError: a value out of range, or an unknown preset; the message names the option.
    """
    parser, preset = training_parser(TranslationConfig, PRESETS, argv, "Train a translation model.")
    text = {} if OptionParser.peek(argv, "train_prefix") else TEXTS.get(preset, {})
    parser.set_defaults(**text)
    named = parser.parse_known_options(argv)  # --help ends here
    if text:
        parser.set_defaults(**text_of_preset(preset, named.data_dir or os.environ.get("SEQBA_DATA")))
    options = TranslationOptions(*parser.parse_args_into_dataclasses(argv))
    config, max_updates = options.config, options.run.max_updates
    if config.lr_decay != "inverse-sqrt" and config.warmup_updates >= max_updates:
        raise UserError(
            f"--warmup-updates {config.warmup_updates} must be below --max-updates {max_updates}: "
            f"--lr-decay {config.lr_decay} falls between them"
        )
    return options
