"""Whether two methods differ by more than their seeds: Welch's t, or for BLEU the paired bootstrap of each seed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from seqba.analysis.student import student_tail
from tasks.cli.files import write_json
from tasks.experiments.records import SIGNIFICANCE, Record
from tasks.scoring.bleu import bleu_tokenizer, paired_bootstrap
from tasks.translation.prepare import generate_texts, read_sources, unique_names

_RESAMPLES, _BOOTSTRAP_SEED = 1_000, 12_345


def welch(a: Sequence[float], b: Sequence[float]) -> float | None:
    """p of a difference between two means at least this large if there were none; None with fewer than two values each.

    Welch 1947: t = (mean(a) - mean(b)) / sqrt(v), v = var(a)/n_a + var(b)/n_b, of Student's distribution with
    v^2 / sum((var/n)^2 / (n-1)) degrees of freedom.

    >>> round(welch([30.02, 29.99, 30.11, 29.97], [29.89, 29.93, 29.72, 29.98]), 4)
    0.0817
    """
    if min(len(a), len(b)) < 2:
        return None
    parts = [float(np.var(x, ddof=1)) / len(x) for x in (a, b)]
    difference = abs(float(np.mean(a) - np.mean(b)))
    if sum(parts) == 0:
        return 1.0 if difference == 0 else 0.0
    df = sum(parts) ** 2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True))
    return student_tail(difference / math.sqrt(sum(parts)), df)


def p_value_of(ours: Sequence[Record], other: Sequence[Record], test: str) -> tuple[float | None, str]:
    """The p-value of a difference, and how it was found.

    Paired bootstrap where both methods' translations are there, or were compared before: the largest p of the seeds
    that both have. Else Welch's t over the seeds; None with one seed.
    """
    found = [_bootstrap(a, b, test) for a in ours for b in other if a.seed == b.seed and a.tests[test].file]
    compared = [p for p in found if p is not None]
    if compared and len(compared) == len(found):
        return max(compared), f"paired bootstrap, the largest p of {len(found)} seed{'s'[: len(found) > 1]}"
    values = [[record.tests[test].value for record in side if test in record.tests] for side in (ours, other)]
    return welch(*values), "Welch's t"


def _bootstrap(ours: Record, other: Record, test: str) -> float | None:
    """p of the difference in BLEU, kept in `significance.json` beside the runs; None where it cannot be found."""
    file, key = ours.folder.parent / SIGNIFICANCE, f"{test}: {ours.name} and {other.name}"
    kept = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if key not in kept:
        sides = [record.folder / record.tests[test].file for record in (other, ours)]
        config = ours.folder / "config.json"
        if not all(path.is_file() for path in [*sides, config]):
            return None
        options = json.loads(config.read_text("utf-8"))
        systems = dict(zip(("other", "ours"), [_lines(path) for path in sides], strict=True))
        compared = paired_bootstrap(
            systems,
            _references(options, test),
            num_samples=_RESAMPLES,
            seed=_BOOTSTRAP_SEED,
            tokenizer=bleu_tokenizer(options["target_lang"], options["bleu_tokenize"]),
        )
        kept[key] = next(one.p_value for one in compared if one.system == "ours")  # BLEU comes first
        write_json(file, kept)
    return float(kept[key])


def _lines(file: Path) -> list[str]:
    return file.read_text("utf-8").split("\n")[:-1]


def _references(options: dict[str, object], test: str) -> list[str]:
    if not options["train_prefix"]:
        return generate_texts(int(str(options["corpus_seed"]))).tests[test].target
    prefixes = options["test_prefix"]
    assert isinstance(prefixes, list)
    languages = str(options["source_lang"]), str(options["target_lang"])
    return read_sources([unique_names(prefixes)[test]], *languages).target
