"""The options of `scripts/benchmark.py translation`, and the rows of its table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.benchmark.options import BenchmarkOptions
from tasks.cli.options import option
from tasks.text.parallel import OPENERS
from tasks.translation.config import TranslationConfig, TranslationOptions, parse_config
from tasks.translation.presets import text_of_preset

ROWS = ("trainer", "bare", "fused", "waiting", "memory", "preprocessing", "decoding", "streams")
NEVER = 1_000_000_000
_PREFERRED, _FALLBACK = "multi30k-small", "generated"


@dataclass(frozen=True)
class TranslationBenchmark(BenchmarkOptions):
    """Options of the benchmark: it times the updates of a preset on its text."""

    preset: str = option(
        "",
        f"of scripts/train_wmt.py; by default {_PREFERRED} where its training text is in the data folder, else "
        f"{_FALLBACK}",
    )
    data_dir: str | None = option(None, "folder of the preset's text; by default $SEQBA_DATA")
    rows: list[str] = option(list(ROWS), "what is measured", choices=ROWS)
    pairs: int = option(7, "timed pairs, A B A B; half of them for decoding, none for waiting and memory")
    sentences: int = option(1_000, "sentences that the decoding row translates")
    model: str | None = option(None, "model folder of the decoding row; by default one is trained here for a while")

    def __post_init__(self) -> None:
        self.check(sentences=1)

    def __str__(self) -> str:
        return f"{super().__str__()}\nupdates of: {self.training().as_json()}"

    def training(self, **changes: Any) -> TranslationOptions:
        """The run whose updates are timed: it never validates or saves, and logs as the preset does."""
        folder = self.data_dir or os.environ.get("SEQBA_DATA")
        preset = self.preset or (_PREFERRED if folder and _has_training_text(_PREFERRED, folder) else _FALLBACK)
        argv: Sequence[str] = ["--preset", preset, *(["--data-dir", folder] if folder else [])]
        return parse_config(argv).changed(
            **{
                "mixed_precision": self.mixed_precision,
                "cache_dir": self.cache_dir,
                "cpu": self.cpu,
                "max_updates": NEVER,
                "eval_every": NEVER,
                "save_every": NEVER,
                **changes,
            }
        )


def _has_training_text(preset: str, folder: str) -> bool:
    """Whether both sides of every training text of a preset are files under a folder, packed or not."""
    languages = (TranslationConfig.source_lang, TranslationConfig.target_lang)
    sides = [f"{prefix}.{lang}" for prefix in text_of_preset(preset, folder)["train_prefix"] for lang in languages]
    return all(any(Path(side + packed).is_file() for packed in OPENERS) for side in sides)
