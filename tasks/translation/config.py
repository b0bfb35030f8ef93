"""The options of a translation run, and the presets: named values that any option overrides."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tasks.cli.errors import UserError
from tasks.cli.options import OptionParser, check_least, flag, option
from tasks.text.hub import describe
from tasks.translation.presets import PRESETS, TEXTS, is_text_of_preset, text_of_preset

_LEAST = {
    "ba_m": 1, "max_tokens": 1, "accumulation": 1, "max_updates": 1, "warmup_updates": 1, "num_proc": 1, "num_beams": 1,
    "log_every": 1, "eval_every": 1, "save_every": 1, "keep_checkpoints": 1, "num_layers": 1, "num_heads": 1,
    "ffn_width": 1, "width": 2, "max_length": 2, "vocab_size": 1, "seed": 0, "corpus_seed": 0, "num_workers": 0,
}  # fmt: skip

PRECISIONS = ("no", "bf16", "fp16")
LR_DECAYS = ("inverse-sqrt", "linear", "cosine")


@dataclass(frozen=True)
class TranslationConfig:
    """All options of `scripts/train_wmt.py`; its defaults are the preset "generated", for the built-in corpus.

    "transformer-base" is the architecture, schedule and batch of Vaswani et al. 2017 (table 3, base) as the Batch
    Augmentation paper trains it (section 4.3): 100 000 updates of 4 096 padded tokens a rank.
    """

    preset: str = option("generated", "named values for all other options; an option that is given overrides it")

    # Batch Augmentation
    ba_m: int = option(1, "M, the paper's number of copies: how often each sentence pair stands in an update")
    copies_per_pass: str = option(
        "auto", "copies in one forward and backward pass, 1 to M; auto starts at M and halves when memory runs out"
    )
    reproducible_copies: bool = option(
        False, "draw each copy's masks from (seed, update, batch, copy), so that no plan or rank changes them"
    )
    allow_identical_copies: bool = option(False, "train with M > 1 although nothing random is between the copies")

    # data
    train_prefix: list[str] = field(
        default_factory=list,
        metadata={
            "help": "parallel training text: P for files P.en and P.de (plain, .gz or .xz), or "
            "datasets:NAME:CONFIG:SPLIT for a data set of the hub or a folder; several are joined"
        },
    )
    valid_prefix: str | None = option(None, "parallel text that chooses the best checkpoint")
    test_prefix: list[str] = field(
        default_factory=list,
        metadata={"help": "parallel test text, translated and scored at the end, each by itself"},
    )
    data_dir: str | None = option(None, "folder of the text that a preset names; by default $SEQBA_DATA")
    source_lang: str = option("en", "ending of the source files")
    target_lang: str = option("de", "ending of the target files")
    vocab_size: int = option(1_000, "pieces of the joint SentencePiece BPE vocabulary")
    max_length: int = option(250, "longest sentence in pieces, eos included; longer pairs are dropped and counted")
    max_length_ratio: float | None = option(
        None, "drop training pairs whose longer side has over this many times the pieces of the shorter (9 if short)"
    )
    cache_dir: str = option("runs/cache", "folder for the trained vocabulary and the preprocessed text")
    num_proc: int = option(1, "threads that preprocess")
    num_workers: int = option(0, "processes that collate batches; 0 collates in the training process")

    # model: MarianConfig as a Transformer; the four dropouts are the transform T
    width: int = option(192, "width of the model, D")
    ffn_width: int = option(768, "width of the feed-forward layers")
    num_layers: int = option(2, "layers of the encoder, and of the decoder")
    num_heads: int = option(4, "heads of every attention layer, H")
    dropout: float = option(0.1, "probability of zeroing, on embeddings and residual branches")
    attention_dropout: float = option(0.1, "probability of zeroing, on attention weights")
    activation_dropout: float = option(0.1, "probability of zeroing, inside the feed-forward layers")

    # optimisation
    max_tokens: int = option(512, "padded tokens in a batch, max(source, target) times pairs, before repetition")
    accumulation: int = option(1, "batches of a rank in one update")
    max_updates: int = option(800, "updates (optimizer steps)")
    warmup_updates: int = option(150, "updates of linear warm-up")
    lr_scale: float = option(0.35, "the learning rate's peak is this times (width * warmup-updates)^-0.5")
    lr_decay: str = option(
        "inverse-sqrt", "fall of the rate after its peak: inverse-sqrt, or linear or cosine to 0 at max-updates"
    )
    label_smoothing: float = option(0.1, "probability mass spread evenly over the vocabulary")
    max_norm: float | None = option(None, "clip the gradient to this L2 norm; not clipped by default")
    mixed_precision: str | None = option(None, "no, bf16 or fp16; by default what accelerate is configured to")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, slower")
    cpu: bool = option(False, "train on the processor even where an accelerator is at hand")

    # the run
    output_dir: str | None = option(None, "the run folder; by default runs/translation-TEXT-mM-seedSEED")
    seed: int = option(0, "seed of the weights, the data order and the masks")
    corpus_seed: int = option(0, "seed of the generated corpus, its test sentences too")
    resume: bool = option(False, "continue the run in --output-dir from its newest good checkpoint, exactly")
    log_every: int = option(25, "updates between rows of metrics.jsonl")
    eval_every: int = option(100, "updates between validations")
    save_every: int = option(100, "updates between checkpoints")
    keep_checkpoints: int = option(2, "newest checkpoints that are kept, beside the best")
    report_to: str | None = option(None, "a tracker that accelerate knows, such as tensorboard")

    # decoding
    num_beams: int = option(4, "beam width of the search for translations")
    length_penalty: float = option(0.6, "finished beams are ranked by log-probability / length^this")

    def __post_init__(self) -> None:
        check_least(self, _LEAST)
        if self.max_length_ratio is not None and not self.max_length_ratio >= 1:
            raise UserError(f"--max-length-ratio must be at least 1, got {self.max_length_ratio}")
        for name in ("lr_scale", "max_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"{flag(name)} must be above 0 and finite, got {value}")
        for name in ("dropout", "attention_dropout", "activation_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{flag(name)} is a probability, from 0 to below 1, got {getattr(self, name)}")
        if not abs(self.length_penalty) < float("inf"):
            raise UserError(f"--length-penalty must be finite, got {self.length_penalty}")
        if self.mixed_precision not in (None, *PRECISIONS):
            raise UserError(f"--mixed-precision must be one of {', '.join(PRECISIONS)}, got {self.mixed_precision}")
        if self.lr_decay not in LR_DECAYS:
            raise UserError(f"--lr-decay must be one of {', '.join(LR_DECAYS)}, got {self.lr_decay}")
        if self.lr_decay != "inverse-sqrt" and self.warmup_updates >= self.max_updates:
            raise UserError(
                f"--warmup-updates {self.warmup_updates} must be below --max-updates {self.max_updates}: "
                f"--lr-decay {self.lr_decay} falls between them"
            )
        if self.width % (2 * self.num_heads):
            raise UserError(f"--width must be a multiple of 2 * --num-heads = {2 * self.num_heads}, got {self.width}")
        if self.copies_per_pass != "auto" and not (
            self.copies_per_pass.isdigit() and 1 <= int(self.copies_per_pass) <= self.ba_m
        ):
            raise UserError(
                f"--copies-per-pass must be auto or from 1 to --ba-m {self.ba_m}, got {self.copies_per_pass}"
            )
        named = [bool(self.train_prefix), self.valid_prefix is not None]
        if any([*named, bool(self.test_prefix)]) and not all(named):
            raise UserError("text of your own needs --train-prefix and --valid-prefix (and --test-prefix to be scored)")

    @property
    def is_generated(self) -> bool:
        """Whether the built-in corpus is used: no data is named."""
        return not self.train_prefix

    @property
    def folder(self) -> str:
        """The run folder."""
        if self.is_generated:
            text = "generated"
        elif is_text_of_preset(self.preset, self.train_prefix):
            text = self.preset
        else:
            text = describe(self.train_prefix[0]).replace(":", "-")
        return self.output_dir or f"runs/translation-{text}-m{self.ba_m}-seed{self.seed}"


# What a resumed run may change: nothing that reaches the weights. (The text is compared by its content.)
MAY_DIFFER = (
    "resume",
    "output_dir",
    "report_to",
    "cache_dir",
    "data_dir",
    "train_prefix",
    "valid_prefix",
    "test_prefix",
    "num_proc",
    "num_workers",
    "max_updates",
    "keep_checkpoints",
    "num_beams",
    "length_penalty",
    "allow_identical_copies",
)


def may_differ(config: TranslationConfig) -> tuple[str, ...]:
    """The options that resuming `config` may change; not the last update, where the learning rate falls towards it."""
    if config.lr_decay == "inverse-sqrt":
        return MAY_DIFFER
    return tuple(name for name in MAY_DIFFER if name != "max_updates")


def parse_config(argv: Sequence[str] | None = None) -> TranslationConfig:
    """Options from the command line (`--ba-m` and `--ba_m` alike), over those of `--preset`.

    Raises:
        UserError: a value out of range, or an unknown preset; the message names the option.
    """
    preset = OptionParser.peek(argv, "preset")
    preset = TranslationConfig.preset if preset is None else preset
    if preset not in PRESETS:
        raise UserError(f"--preset must be one of {', '.join(PRESETS)}, got {preset}")
    text = {} if OptionParser.peek(argv, "train_prefix") else TEXTS.get(preset, {})
    parser = OptionParser(
        TranslationConfig,
        allow_abbrev=False,
        description=f"Train a translation model. Defaults are those of --preset {preset}.",
    )
    parser.set_defaults(**PRESETS[preset], **text)
    named = parser.parse_known_options(argv)  # --help ends here
    if text:
        parser.set_defaults(**text_of_preset(preset, named.data_dir or os.environ.get("SEQBA_DATA")))
    (config,) = parser.parse_args_into_dataclasses(argv)
    return config


def as_json(config: TranslationConfig) -> dict[str, Any]:
    """All options, for `config.json`."""
    return asdict(config)
