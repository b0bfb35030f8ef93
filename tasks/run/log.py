"""The numbers that a run leaves behind: the rows of `metrics.jsonl`, and the learning curve."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tasks.run.progress import Figures

_VALIDATION = "#b3541e"


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    if not file.exists():
        return []
    lines = file.read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def draw_curve(rows: Sequence[Mapping[str, Any]], file: Path, *, title: str, figures: Figures) -> None:
    """The learning curve against the update: training and validation loss, and below them another metric."""
    own_axes = figures.metric != "valid_loss" and any(figures.metric in row for row in rows)
    figure = Figure(figsize=(7, 7 if own_axes else 4.2), layout="constrained", dpi=150)
    panels = figure.subplots(1 + own_axes, sharex=True, squeeze=False)[:, 0]
    logged = [row for row in rows if "loss" in row]  # a Trainer logs its validations by themselves
    updates, losses = ([row[name] for row in logged] for name in ("update", "loss"))
    panels[0].plot(updates, losses, color="#8aa4c8", label=figures.training)
    for panel, name in zip(panels, ("valid_loss", figures.metric), strict=False):
        found = [(row["update"], row[name]) for row in rows if row.get(name) is not None]
        if not found:
            continue
        panel.plot(*zip(*found, strict=True), color=_VALIDATION, marker="o", markersize=4, label="validation")
        if name == figures.metric:
            update, value = (max if figures.higher_is_better else min)(found, key=lambda point: point[1])
            place = {"xytext": (0, 12), "textcoords": "offset points", "ha": "right"}
            panel.annotate(f"{value:.3f} at {update:,}", (update, value), color=_VALIDATION, **place)
    panels[0].set(ylabel=figures.loss, title=title)
    if own_axes:
        panels[1].set(ylabel=figures.metric.replace("_", " "))
    panels[-1].set(xlabel="update")
    for panel in panels:
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    figure.savefig(file)
