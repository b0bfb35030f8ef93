"""Scores and comparisons as text tables, with the signatures below them."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.scoring.table import align


def format_scores(systems: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a system, a column a metric, and what each column's numbers are, below.

    Args:
        systems: name -> {"scores": [{"metric", "value", "signature"}], "line_ends_replaced": int, "seconds": float}.
    """
    first = next(iter(systems.values()))["scores"]
    rows = [["model", *(score["metric"] for score in first), "seconds"]]
    for name, system in systems.items():
        rows.append([name, *(f"{score['value']:.2f}" for score in system["scores"]), f"{system['seconds']:.1f}"])
    notes = [f"{score['metric']}: {score['signature']}" for score in first]
    notes += [
        f"{name}: line ends inside {system['line_ends_replaced']} translation(s) became spaces"
        for name, system in systems.items()
        if system["line_ends_replaced"]
    ]
    return "\n".join([align(rows), *notes])


def format_bootstrap(scores: Sequence[Mapping[str, Any]]) -> str:
    """A row a system and metric: score, mean and 95 % half-width over the resamples, p against the first system.

    Args:
        scores: the fields of `PairedScore`.
    """
    rows = [["model", "metric", "score", "mean", "+- 95 %", "p"]]
    for score in scores:
        p_value = "baseline" if score["p_value"] is None else f"{score['p_value']:.4f}"
        rows.append(
            [score["system"], score["metric"], *(f"{score[x]:.2f}" for x in ("value", "mean", "confidence")), p_value]
        )
    signatures = {score["metric"]: score["signature"] for score in scores}
    notes = [f"paired bootstrap, {metric}: {signature}" for metric, signature in signatures.items()]
    return "\n".join([align(rows), *notes])
