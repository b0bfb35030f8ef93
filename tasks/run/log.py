"""The numbers that a run leaves behind: the rows of `metrics.jsonl`, and the learning curve."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    if not file.exists():
        return []
    lines = file.read_text("utf-8").split("\n")
    rows = [json.loads(line) for line in lines[:-1]]
    return rows


def draw_curve(rows: Sequence[Mapping[str, Any]], file: Path, *, title: str) -> None:
    """The learning curve: training and validation loss, in nats per target, against the update.

    The training loss carries label smoothing and dropout where the run has them; the validation loss has neither.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained", dpi=150)
    axes = figure.subplots()
    axes.plot(
        [row["update"] for row in rows],
        [row["loss"] for row in rows],
        color="#8aa4c8",
        label="training (with dropout, label smoothing)",
    )
    valid = [row for row in rows if row.get("valid_loss") is not None]
    if valid:
        updates, losses = [row["update"] for row in valid], [row["valid_loss"] for row in valid]
        axes.plot(updates, losses, color="#b3541e", marker="o", markersize=4, label="validation")
        best = min(valid, key=lambda row: row["valid_loss"])
        axes.annotate(
            f"{best['valid_loss']:.3f} at {best['update']:,}",
            (best["update"], best["valid_loss"]),
            xytext=(0, 12),
            textcoords="offset points",
            ha="right",
            color="#b3541e",
        )
    axes.set(xlabel="update", ylabel="loss (nats per target token)", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file)
