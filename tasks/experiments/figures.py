"""The paper's figures from records: validation against updates, final figures against M, updates to reach a quality."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tasks.cli.errors import make_folder, writing
from tasks.experiments.manifest import BA, FIXED_SAMPLES, FIXED_STEPS
from tasks.experiments.records import Experiment, Record, mean_curve, spread
from tasks.experiments.tables import label, quality

# readable on white and on near black: the middle of the scale of lightness
_COLOURS = ("#c0392b", "#2e86c1", "#239b56", "#b9770e", "#8e44ad", "#148f77", "#ca6f8f", "#7f8c3d")
_INK = "#767676"  # stands for the page's own colour in an SVG
_SETTINGS: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "seqba", "font.size": 10, "font.family": "sans-serif",
    "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
}  # fmt: skip


def figures(experiment: Experiment) -> dict[str, tuple[str, Figure]]:
    """Every figure that the runs of an experiment allow: name -> caption, figure."""
    found: dict[str, tuple[str, Figure]] = {}
    for variant in experiment.variants:
        end = f"-{variant}" if variant else ""
        of = f" ({variant})" if variant else ""
        for name, caption, draw in _drawn(experiment, variant):
            with matplotlib.rc_context(_SETTINGS):
                figure = Figure(figsize=(6.4, 4.6), layout="constrained", dpi=150)
                panel = figure.subplots()
                draw(panel)
                panel.grid(alpha=0.25)
                panel.spines[["top", "right"]].set_visible(False)
                if panel.get_legend_handles_labels()[1]:
                    figure.legend(frameon=False, loc="outside lower center", ncols=1)
            found[name + end] = (caption + of, figure)
    return found


def save_figures(experiment: Experiment, folder: Path) -> list[Path]:
    """Write every figure of an experiment as SVG and PNG."""
    make_folder(folder, remedy="name another folder")
    files = []
    with writing(folder, remedy="make room, or name another folder"):
        for name, (_, figure) in figures(experiment).items():
            files += [folder / f"{name}.svg", folder / f"{name}.png"]
            files[-2].write_text(as_svg(figure, name), "utf-8")
            figure.savefig(files[-1], facecolor="white")
    return files


def as_svg(figure: Figure, name: str) -> str:
    """A figure as an `<svg>` for a page: transparent, in the page's own text colour, its ids begin with its name."""
    stream = io.StringIO()
    with matplotlib.rc_context(_SETTINGS):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r'(\bid="|url\(#|href="#)', lambda found: f"{found[0]}{name}-", text)
    start, end, rest = text.partition(">")
    return re.sub(r'\s(width|height)="[^"]*"', "", start) + end + rest  # as wide as the page lets it be


_Drawing = tuple[str, str, Callable[[Axes], None]]
_Coloured = tuple[Sequence[Record], str]


def _drawn(experiment: Experiment, variant: str) -> Iterator[_Drawing]:
    groups = experiment.groups(variant=variant)
    curves = [
        (records, _COLOURS[i % len(_COLOURS)])  # of a method the same in every figure
        for i, records in enumerate(groups.values())
        if len(mean_curve(records)) > 1
    ]
    copies = [one for one in curves if one[0][0].method in (FIXED_STEPS, BA)]
    band = ", the mean of the seeds, from least to most" if any(len(records) > 1 for records in groups.values()) else ""
    if copies:
        yield "copies", f"Validation against updates for each M{band} (Figure 2a)", lambda ax: _curves(ax, copies)
    if len(ends := _ends(groups)) > 1:
        unit = experiment.records[0].unit
        yield "final", "The best validation against M, with standard deviation (Figure 2b)", lambda ax: _final(
            ax, ends, unit
        )  # fmt: skip
    for number in sorted({records[0].num_copies for records, _ in curves if records[0].method == FIXED_SAMPLES}):
        pair = [one for one in curves if one[0][0].num_copies == number]
        caption = f"Training loss (dashed, right) and validation (solid): fixed samples against M = {number} (Figure 3)"
        yield f"samples-m{number}", caption, lambda ax, pair=pair: _curves(ax, pair, with_training=True)  # type: ignore[misc]
    if curves:
        caption = "Updates until the mean validation is at least as good; dotted: where fixed steps end"
        wanted = quality(experiment, variant)
        yield "reach", caption, lambda ax: _reach(ax, curves, wanted)


def _curves(panel: Axes, groups: Sequence[_Coloured], *, with_training: bool = False) -> None:
    training = panel.twinx() if with_training else None
    for records, colour in groups:
        updates, mean, least, most = zip(*mean_curve(records), strict=True)
        panel.plot(updates, mean, color=colour, marker="o", markersize=3, label=label(records[0]))
        if len(records) > 1:
            panel.fill_between(updates, least, most, color=colour, alpha=0.18, linewidth=0)
        if training is not None:
            loss = [(row["update"], row["loss"]) for row in records[0].rows if "loss" in row]
            training.plot(*zip(*loss, strict=True), color=colour, linestyle="--", linewidth=0.9)
    panel.set(xlabel="update", ylabel=groups[0][0][0].unit)
    if training is not None:
        training.set(ylabel=f"training loss, seed {groups[0][0][0].seed}")
        training.spines[["top", "left"]].set_visible(False)


def _ends(groups: dict[str, list[Record]]) -> list[tuple[str, int, float, float]]:
    """(label, M, mean, deviation) of fixed steps and of each M, by M."""
    chosen = [records for records in groups.values() if records[0].method in (FIXED_STEPS, BA)]
    found = [(label(one[0]), one[0].num_copies, *spread([record.best for record in one])) for one in chosen]
    return sorted(((name, m, mean, sd or 0.0) for name, m, mean, sd in found), key=lambda one: one[1])


def _final(panel: Axes, ends: Sequence[tuple[str, int, float, float]], unit: str) -> None:
    names, _, means, deviations = zip(*ends, strict=True)
    places = range(len(ends))
    panel.errorbar(places, means, deviations, color=_COLOURS[1], marker="o", linestyle="none", capsize=4)
    panel.set(ylabel=f"best {unit}", xlim=(-0.5, len(ends) - 0.5))
    panel.set_xticks(places, [name.replace(", ", ",\n").replace(": ", ":\n") for name in names])


def _reach(panel: Axes, groups: Sequence[_Coloured], wanted: float | None) -> None:
    for records, colour in groups:
        best, points = float("inf"), []
        for update, mean, *_ in mean_curve(records):
            if mean < best:
                best = mean
                points.append((mean, update))
        panel.step(
            *zip(*points, strict=True), where="pre", color=colour, marker="o", markersize=3, label=label(records[0])
        )
    panel.set(xlabel=groups[0][0][0].unit, ylabel="updates to reach it")
    panel.invert_xaxis()
    if wanted is not None:
        panel.axvline(wanted, color=_INK, linestyle=":", linewidth=1)
