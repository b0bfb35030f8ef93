"""The presets of a translation run: options by name, and text where a preset has one. Any option overrides them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.cli.errors import UserError
from tasks.text.hub import is_dataset

# The base model of Vaswani et al. 2017, table 3, as section 4.3 of the paper trains it. Not measured yet.
_BASE = {
    "vocab_size": 32_000, "width": 512, "ffn_width": 2_048, "num_layers": 6, "num_heads": 8,
    "max_length_ratio": 1.5, "max_tokens": 4_096, "max_updates": 100_000, "warmup_updates": 4_000, "lr_scale": 1.0,
    "log_every": 100, "eval_every": 1_000, "save_every": 1_000,
}  # fmt: skip
# Multi30k (Elliott et al. 2016), English to German. Measured on one thread of a server processor, bf16, one seed, 3 000
# updates: BLEU on test_2016_flickr 10.48 with M = 1 and 27.13 with M = 4; fixed samples (--max-tokens 4096) 32.15, in
# fp32, in 3.2 hours on one thread of a processor without AVX-512.
_MULTI30K = {
    "vocab_size": 8_000, "width": 256, "ffn_width": 1_024, "num_layers": 3,
    "dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.2,
    "max_tokens": 1_024, "max_updates": 3_000, "warmup_updates": 500, "lr_scale": 0.6, "lr_decay": "cosine",
    "log_every": 50, "eval_every": 250, "save_every": 250,
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    # The built-in corpus, English to German, and the defaults of `TranslationConfig`. Measured on two processor cores,
    # --mixed-precision as by default, one seed, 800 updates: test BLEU 62.59 with M = 1, in 68 s, and 80.05 with M = 4,
    # in 271 s on a processor with AVX-512 and about 370 s on one without.
    "generated": {},
    "transformer-base": _BASE,
    "transformer-base-wmt16": _BASE,
    "transformer-base-ende": _BASE,
    "multi30k-small": _MULTI30K,
}

# The text of a preset that has one: relative prefixes are under --data-dir.
TEXTS: dict[str, dict[str, Any]] = {
    # wmt16's own validation and test splits are newstest2015 and 2016; the paper reports on newstest2014
    "transformer-base-wmt16": {
        "train_prefix": ["datasets:wmt/wmt16:de-en:train"],
        "valid_prefix": "datasets:wmt/wmt14:de-en:validation",
        "test_prefix": ["datasets:wmt/wmt14:de-en:test"],
    },
    "transformer-base-ende": {
        "train_prefix": [
            "ende_msdocs/msdocs.train",
            "ende_tatoeba/tatoeba.train",
            "ende_misc/bcontrast.train",
            "ende_misc/europarl20k",
            "ende_misc/mlqepe_wiki",
            "ende_misc/wmt10k",
        ],
        "valid_prefix": "wmt_ende/newstest2013",
        "test_prefix": ["wmt_ende/newstest2014", "ende_msdocs/msdocs.test"],
    },
    "multi30k-small": {
        "train_prefix": ["multi30k/train"],
        "valid_prefix": "multi30k/val",
        "test_prefix": ["multi30k/test_2016_flickr", "multi30k/test_2018_flickr"],
    },
}


def is_text_of_preset(preset: str, train_prefix: Sequence[str]) -> bool:
    """Whether training text is a preset's own, in whichever folder.

    >>> is_text_of_preset("multi30k-small", ["data/multi30k/train"])
    True
    >>> is_text_of_preset("multi30k-small", ["data/train"])
    False
    """
    own = TEXTS[preset]["train_prefix"] if preset in TEXTS else []
    return len(own) == len(train_prefix) and all(map(_ends_with, train_prefix, own))


def _ends_with(prefix: str, own: str) -> bool:
    return prefix == own if is_dataset(own) else Path(prefix).parts[-len(Path(own).parts) :] == Path(own).parts


def text_of_preset(preset: str, data_dir: str | None) -> dict[str, Any]:
    """The options that name a preset's text, relative prefixes under `data_dir`.

    Raises:
        UserError: the text consists of files, and no folder is given.
    """
    text = TEXTS[preset]
    files = [p for p in [*text["train_prefix"], text["valid_prefix"], *text["test_prefix"]] if not is_dataset(p)]
    if files and data_dir is None:
        raise UserError(
            f"--preset {preset} reads {', '.join(files)} (a file of each language) in the folder that --data-dir or "
            "$SEQBA_DATA names; neither is given"
        )

    def under(prefix: str) -> str:
        return prefix if is_dataset(prefix) else str(Path(data_dir or "", prefix))

    return {name: under(own) if isinstance(own, str) else list(map(under, own)) for name, own in text.items()}
