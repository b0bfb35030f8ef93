"""Table 1 and Figure 1 of Hoffer et al. 2020, of a run: correlations and norms of gradients as it is trained."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from seqba.analysis import NoiseSplit, choose_copies, pearson
from seqba.analysis.live import noise_of_halves, pick_rows
from seqba.analysis.variance import mean_interval
from seqba.audit.state import undisturbed
from seqba.checkpoint.files import MODEL
from seqba.context import copies_of_pass
from seqba.draws.generators import seeded_generators
from tasks.cli.errors import UserError, reason_of
from tasks.cli.files import write_json
from tasks.cli.machine import MachineOptions, start_accelerator
from tasks.cli.options import check_least, option
from tasks.gradients.subject import PLAIN, Subject, load_subject
from tasks.models.names import model_in
from tasks.run.stream import SAMPLE_IDS

logger = logging.getLogger(__name__)

INITIAL = "initial"


@dataclass(frozen=True)
class GradientConfig:
    """Options of `scripts/measure_gradients.py`."""

    run: str = option("", "run folder of train_wmt.py, train_ptb.py or train_vision.py: its options and data")
    weights: list[str] = option(
        [],
        "points of the training: checkpoints, model folders, and initial for new weights; by default initial, all "
        "checkpoints of the run, and its model",
    )
    pairs: int = option(100, "pairs of gradients that each correlation is the median of")
    ba_m: list[int] = option([1, 2, 4, 8, 16, 32], "M, the numbers of copies whose gradient norms are compared")
    batches: int = option(4, "batches that each norm is the mean of")
    chunk: int = option(8, "per-sample gradients in memory at a time, times two")
    seed: int = option(0, "seed of the pairs and of the masks")
    output_dir: str | None = option(None, "folder of gradients.json, .png and .svg; by default RUN/gradients")

    def __post_init__(self) -> None:
        check_least(self, {"pairs": 1, "batches": 1, "chunk": 1, "seed": 0})
        if not self.run:
            raise UserError("--run DIR names the run folder whose gradients are measured; none is given")
        if not self.ba_m or min(self.ba_m) < 1:
            raise UserError(f"--ba-m must be numbers of at least 1, got {self.ba_m}")


def measure_gradients(config: GradientConfig, machine: MachineOptions) -> list[dict[str, Any]]:
    """Measure, print, write and draw; a dictionary for each point.

    Raises:
        UserError: the run, or weights, cannot be read or do not fit each other.
    """
    accelerator = start_accelerator(machine, seed=config.seed)
    folder = Path(config.run)
    subject = load_subject(folder, accelerator, max(3, *config.ba_m))
    batches = [subject.stream.take(1)[0] for _ in range(max(config.ba_m) * config.batches)]
    points = []
    for name in config.weights or _points_of(folder):
        update = _load(subject.model, name)
        correlations = _correlations(subject, batches, config)
        noise = _noise(subject, batches[:: max(config.ba_m)], config.seed)
        choice = choose_copies(noise, most=max(config.ba_m))
        norms = _norms(subject, batches, config)
        noises = {"noise": vars(noise), "num_copies": choice.num_copies}
        points.append({"weights": name, "update": update, **correlations, "norms": norms, **noises})
        logger.info(_line(points[-1]))
        logger.info("%s: %s", name, choice.reason)
    output = Path(config.output_dir or folder / "gradients")
    output.mkdir(parents=True, exist_ok=True)
    for point in points:  # JSON has no infinity
        noise = point["noise"]
        point["noise"] = {
            name: list(x) if isinstance(x, tuple) and math.isfinite(x[0]) else x if isinstance(x, float) else None
            for name, x in noise.items()
        }
    write_json(output / "gradients.json", {"options": vars(config), "points": points})
    _draw(points, output)
    logger.info("%s: gradients.json, gradients.png, gradients.svg", output)
    return points


def _points_of(folder: Path) -> list[str]:
    found = sorted(str(path) for path in (folder / "checkpoints").glob("update-*"))
    return [INITIAL, *found, *([str(folder / "model")] if (folder / "model").is_dir() else [])]


def _load(model: nn.Module, name: str) -> int | None:
    """Fill the model; the update of a checkpoint, 0 of new weights, None of a model folder."""
    if name == INITIAL:
        return 0
    file = model_in(Path(name)) / MODEL
    try:
        weights = load_file(str(file))
        unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    except Exception as error:  # of damaged or foreign files: many types
        raise UserError(f"--weights {name} cannot be read into the run's model: {reason_of(error)}") from error
    filled = {x.data_ptr() for key, x in model.state_dict(keep_vars=True).items() if key in weights}  # of ties, one
    trained = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    if odd := [*unknown, *(key for key, p in trained if p.data_ptr() not in filled)]:
        raise UserError(f"--weights {name} is of another model than the run: {odd[0]} is in one of them alone")
    number = re.search(r"update-(\d+)", file.parent.name)
    return int(number[1]) if number else None


# ---- Table 1


def _correlations(subject: Subject, batches: Sequence[Any], config: GradientConfig) -> dict[str, Any]:
    """Median, median absolute deviation and number of pairs of each kind."""
    places = [(b, n) for b, batch in enumerate(batches) for n in range(len(batch["labels"]))]
    ids = [tuple(batch[SAMPLE_IDS].tolist()) for batch in batches]  # of a window its positions, of others a row each
    each = ((ids[b][n] if len(ids[b]) == len(batches[b]["labels"]) else (ids[b], n)) for b, n in places)
    samples = list(dict(zip(each, places, strict=True)).values())  # one of an earlier epoch may have come again
    generator = torch.Generator().manual_seed(config.seed)
    order = [samples[i] for i in torch.randperm(len(samples), generator=generator).tolist()]
    found = {}
    with undisturbed(subject.loss_model), torch.enable_grad():
        for module in subject.loss_model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # a gradient of one sample has no batch
        for kind, pairs in _pairs(subject, batches, order, config.pairs).items():
            values = []
            for start in range(0, len(pairs), config.chunk):
                part = pairs[start : start + config.chunk]
                sides = (sample_gradients(subject, batches, [p[i] for p in part], config.seed) for i in (0, 1))
                values.append(pearson(*sides))
            all_values = torch.cat(values)
            median = all_values.nanmedian()
            spread = (all_values - median).abs().nanmedian()
            found[kind] = {"median": float(median), "spread": float(spread), "pairs": len(all_values)}
    return {"correlations": found}


_View = tuple[int, int, int]  # batch, row, view


def _pairs(
    subject: Subject, batches: Sequence[Any], order: Sequence[tuple[int, int]], count: int
) -> dict[str, list[tuple[_View, _View]]]:
    """Pairs of views of samples in a random order: of images as Table 1 has them, of sequences under two masks."""
    if "input_ids" in batches[0]:
        return {
            "two masks": [((*s, 1), (*s, 2)) for s in order[:count]],
            "two samples": [((*s, 1), (*t, 2)) for s, t in list(pairwise(order))[:count]],
        }
    by_label: dict[int, list[tuple[int, int]]] = {}
    for b, n in order:
        by_label.setdefault(int(batches[b]["labels"][n]), []).append((b, n))
    same = [pair for group in by_label.values() for pair in pairwise(group)]
    other = [(s, t) for s, t in pairwise(order) if batches[s[0]]["labels"][s[1]] != batches[t[0]]["labels"][t[1]]]
    plain = {"same class": same, "different classes": other}
    return {
        "x and T(x)": [((*s, PLAIN), (*s, 0)) for s in order[:count]],
        **{kind: [((*s, PLAIN), (*t, PLAIN)) for s, t in pairs[:count]] for kind, pairs in plain.items() if pairs},
    }


def sample_gradients(subject: Subject, batches: Sequence[Any], views: Sequence[_View], seed: int) -> Tensor:
    """The gradient of the mean loss of each of some views, (n, D): vectorised where rows are images, else one by one.

    Batch norm must be in evaluation mode.
    """
    rows = [pick_rows(subject.take(batches[b], view), torch.tensor([n])) for b, n, view in views]
    if subject.row_loss is not None:
        images, labels = (torch.cat([row[name] for row in rows]) for name in ("images", "labels"))
        try:
            return _vectorised(subject, images, labels)
        except RuntimeError as error:  # an operation without a rule for vmap
            logger.info("gradients are taken one by one: %s", reason_of(error))
    weights = [p for p in subject.loss_model.parameters() if p.requires_grad]
    found = []
    for row, (b, n, view) in zip(rows, views, strict=True):
        with seeded_generators(seed, b, n, view & 0xFF), copies_of_pass((0,)):
            loss = subject.loss_of(subject.loss_model, row) / max(int(subject.count(row)), 1)
            found.append(_flat(torch.autograd.grad(loss, weights, allow_unused=True), weights))
    return torch.stack(found)


def _vectorised(subject: Subject, images: Tensor, labels: Tensor) -> Tensor:
    model, row_loss = subject.model, subject.row_loss
    assert row_loss is not None
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return row_loss(functional_call(model, weights, (image[None],)), label[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")(weights, images, labels)
    return torch.cat([found[name].flatten(1) for name in weights], 1)


def _flat(gradients: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor:
    pairs = zip(gradients, weights, strict=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for g, w in pairs])


# ---- Figure 1


def _norms(subject: Subject, batches: Sequence[Any], config: GradientConfig) -> list[dict[str, float]]:
    """For each M the mean L2 norm of the gradient of B samples in M copies, and of M batches of distinct samples."""
    most, rows = max(config.ba_m), []
    sums = torch.zeros(2, most)
    weights = [p for p in subject.loss_model.parameters() if p.requires_grad]
    with undisturbed(subject.loss_model), torch.enable_grad():
        for repeat in range(config.batches):
            some = batches[repeat * most : (repeat + 1) * most]
            for kind, parts in enumerate(([(some[0], m) for m in range(most)], [(batch, 0) for batch in some])):
                total, targets = torch.zeros(sum(p.numel() for p in weights), device=weights[0].device), 0
                for m, (batch, view) in enumerate(parts):
                    with seeded_generators(config.seed, repeat, kind, m), copies_of_pass((0,)):
                        taken = subject.take(batch, view)
                        loss = subject.loss_of(subject.loss_model, taken)
                        total += _flat(torch.autograd.grad(loss, weights, allow_unused=True), weights)
                    targets += int(subject.count(taken))
                    sums[kind, m] += float(total.norm()) / max(targets, 1)
    for m in sorted(set(config.ba_m)):
        copies, distinct = (sums[:, m - 1] / config.batches).tolist()
        rows.append({"num_copies": m, "copies": copies, "distinct": distinct})
    return rows


# ---- how many copies are worth it


def _noise(subject: Subject, batches: Sequence[Any], seed: int) -> NoiseSplit:
    """s_w^2 and s_b^2, the mean over batches; with intervals where there are four batches."""
    found = []
    for update, batch in enumerate(batches):

        def loss_of(copy: int, rows: Tensor, batch: Any = batch) -> Tensor:
            half = pick_rows(subject.take(batch, copy), rows)
            return subject.loss_of(subject.loss_model, half) / max(int(subject.count(half)), 1)

        count = len(batch["labels"])
        found.append(noise_of_halves(subject.loss_model, loss_of, count, copies=(0, 1), seed=(seed, update)))
    values = [[float(x) for x in side] for side in zip(*found, strict=True)]
    within, between = (sum(side) / len(side) for side in values)
    return NoiseSplit(within, between, *map(mean_interval, values))


# ---- what comes of it


def _line(point: dict[str, Any]) -> str:
    """One point, as a line of the table."""
    parts = [f"{kind} {x['median']:.3f} ± {x['spread']:.3f}" for kind, x in point["correlations"].items()]
    norms = ", ".join(f"{x['num_copies']}: {x['copies']:.3g} / {x['distinct']:.3g}" for x in point["norms"])
    return f"{point['weights']}: correlation of {', '.join(parts)}; norm by M, copies / distinct samples: {norms}"


def _draw(points: Sequence[dict[str, Any]], folder: Path) -> None:
    """The norms against the update, solid of copies and dashed of as many distinct samples; the model stands last."""
    figure = Figure(figsize=(7, 4.2), layout="constrained", dpi=150)
    panel = figure.subplots()
    places = [str(p["update"]) if p["update"] is not None else Path(p["weights"]).name for p in points]
    for i, first in enumerate(points[0]["norms"] if points else ()):
        for kind, style in (("copies", "-"), ("distinct", "--")):
            label = f"M = {first['num_copies']}" if kind == "copies" else None
            values = [p["norms"][i][kind] for p in points]
            panel.plot(range(len(points)), values, style, marker="o", markersize=3, color=f"C{i % 10}", label=label)
    panel.set_xticks(range(len(places)), places)
    panel.set(xlabel="update", ylabel="L2 norm of the gradient", title="copies (solid), distinct samples (dashed)")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    for ending in ("png", "svg"):
        figure.savefig(folder / f"gradients.{ending}")
