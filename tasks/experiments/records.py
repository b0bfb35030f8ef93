"""Finished run folders as records: curves, test figures, work, depth and seconds, whichever task they are of."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tasks.cli.errors import UserError
from tasks.experiments.manifest import BA, EQUAL_COMPUTE, FIXED_SAMPLES, FIXED_STEPS, METHODS
from tasks.run.log import read_metrics

EXPERIMENT, RESULTS, EVALUATION, SIGNIFICANCE = "experiment.json", "results.json", "evaluation", "significance.json"
_SEED = re.compile(r"-seed(\d+)$")


@dataclass(frozen=True)
class Score:
    """A run's figure on a test set, its unit, and for BLEU sacreBLEU's signature and the file of translations."""

    value: float
    unit: str
    higher_is_better: bool
    signature: str = ""
    file: str = ""


@dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        group: the runs that differ from it in the seed alone.
        method: of `tasks.experiments.manifest`; `num_copies` and `rate_power` are a `Cell`'s.
        updates: depth, the longest chain of steps that follow each other.
        seen: work, the instances processed, copies included (section 3 of the paper).
        seconds: of training and validation, as the run counted them; 0 where it did not.
        rows: of `metrics.jsonl`.
        validation: (update, value) of every validation, less is better; `unit` says of what.
    """

    folder: Path
    group: str
    seed: int
    method: str
    variant: str
    num_copies: int
    rate_power: float
    updates: int
    unique: int
    seen: int
    seconds: float
    rows: Sequence[Mapping[str, Any]]
    validation: Sequence[tuple[int, float]]
    unit: str
    tests: Mapping[str, Score]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.name

    @property
    def best(self) -> float:
        """The lowest validation figure: that of the checkpoint which is tested."""
        return min((value for _, value in self.validation), default=math.nan)

    def rates(self) -> list[float]:
        """Instances a second between rows of the log that hold no validation."""
        rows = [row for row in self.rows if "seconds" in row and "seen_instances" in row]
        timed = [(b, b["seen_instances"] - a["seen_instances"], b["seconds"] - a["seconds"]) for a, b in pairwise(rows)]
        alone = [one for one in timed if not any(name.startswith("valid") for name in one[0])]
        return [instances / seconds for _, instances, seconds in alone or timed if seconds > 0]


@dataclass(frozen=True)
class Experiment:
    """Runs that are compared with each other, in the order of their manifest."""

    folder: Path
    title: str
    records: Sequence[Record]
    unfinished: Sequence[str] = ()
    evaluation: Mapping[str, Any] | None = None

    def groups(self, method: str | None = None, variant: str | None = None) -> dict[str, list[Record]]:
        """The records by their group, of one method and variant where they are named."""
        found: dict[str, list[Record]] = {}
        for record in self.records:
            if method in (None, record.method) and variant in (None, record.variant):
                found.setdefault(record.group, []).append(record)
        return found

    @property
    def variants(self) -> list[str]:
        """Their names; one that is empty where there are none."""
        return list(dict.fromkeys(record.variant for record in self.records))


def read_experiments(folders: Sequence[Path]) -> list[Experiment]:
    """The experiments in folders: of `scripts/experiment.py`, or folders of run folders; lone run folders are one.

    Raises:
        UserError: there is no finished run, or a record is damaged.
    """
    found, lone = [], []
    for folder in folders:
        if (folder / RESULTS).is_file():
            lone.append(folder)
            continue
        inside = [path for path in sorted([folder, *folder.rglob("*")]) if _holds_runs(path)]
        if not inside:
            raise UserError(f"{folder} holds no finished run (no {RESULTS}); name run folders, or a folder of them")
        found += [_experiment(path) for path in inside]
    if lone:
        found.append(Experiment(lone[0].parent, "Runs", _infer([_record(path, {}) for path in lone])))
    return found


def _holds_runs(folder: Path) -> bool:
    return folder.is_dir() and (
        (folder / EXPERIMENT).is_file() or any(path.parent.name != EVALUATION for path in folder.glob(f"*/{RESULTS}"))
    )


def _experiment(folder: Path) -> Experiment:
    finished = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{RESULTS}"))}
    scored = finished.pop(EVALUATION, None)
    evaluation = None if scored is None else _read(scored / RESULTS)
    if not (folder / EXPERIMENT).is_file():
        records = _infer([_record(path, {}) for path in finished.values()])
        return Experiment(folder, folder.name, records, evaluation=evaluation)
    kept = _read(folder / EXPERIMENT)
    records = [_record(finished[name], cell) for name, cell in kept["cells"].items() if name in finished]
    if not records:
        raise UserError(f"{folder}: none of its {len(kept['cells'])} runs is finished; run the experiment first")
    unfinished = [name for name in kept["cells"] if name not in finished]
    return Experiment(folder, kept["manifest"]["title"], records, unfinished, evaluation)


def _read(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); restore it, or leave its folder out") from error
    return content


def _record(folder: Path, cell: Mapping[str, Any]) -> Record:
    results = _read(folder / RESULTS)
    try:
        rows = read_metrics(folder / "metrics.jsonl")
        column, unit, scale = _validation(results, rows)
        counters = results.get("counters", results)
        updates = results.get("updates") or rows[-1]["update"]
        seed = _SEED.search(folder.name)
        return Record(
            folder=folder,
            group=cell.get("group", _SEED.sub("", folder.name)),
            seed=cell.get("seed", int(seed[1]) if seed else 0),
            method=cell.get("method", ""),
            variant=cell.get("variant", ""),
            num_copies=cell.get("num_copies", results.get("num_copies") or results["options"]["ba_m"]),
            rate_power=cell.get("rate_power", 0.0),
            updates=updates,
            unique=counters["unique_samples"],
            seen=counters["seen_instances"],
            seconds=results.get("seconds") or 0.0,
            rows=rows,
            validation=[(row["update"], scale(row[column])) for row in rows if row.get(column) is not None],
            unit=unit,
            tests=dict(_tests(results)),
            options=cell.get("options", {}),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{folder} holds no record of a finished run ({error!r}); leave it out") from error


def _validation(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[str, str, Any]:
    """The column of a validation, and how it becomes a figure of which less is better."""
    columns = {name for row in rows for name in row}
    if accuracy := columns & {"valid_accuracy"}:
        return accuracy.pop(), "validation error, %", lambda x: 100 * (1 - x)
    if "valid_perplexity" in columns or "test_perplexity" in results:
        return "valid_loss", "validation perplexity", math.exp
    return "valid_loss", "validation nats per token", float


def _tests(results: Mapping[str, Any]) -> Iterator[tuple[str, Score]]:
    if "tests" in results:
        for name, one in results["tests"].items():
            yield name, Score(one["bleu"], "BLEU", True, f"{one['signature']}; {one['decoding']}", one["file"])
    elif "task" in results:  # of a Trainer, by split
        split = "test" if "test" in results else "validation"
        found = {name.partition("_")[2]: value for name, value in results[split].items()}
        for name, unit in (("bleu", "BLEU"), ("accuracy", "%"), ("perplexity", "perplexity")):
            if name in found:
                value, signature = found[name] * (100 if name == "accuracy" else 1), found.get("bleu_signature", "")
                yield split, Score(value, unit, name != "perplexity", signature if name == "bleu" else "")
                return
    elif "test_accuracy" in results:
        yield "test", Score(100 * results["test_accuracy"], "%", True)
    elif "test_perplexity" in results:
        yield "test", Score(results["test_perplexity"], "perplexity", False)


def _infer(records: Sequence[Record]) -> list[Record]:
    """Runs without a manifest: M = 1 is fixed samples or equal compute where its batch or its updates are larger."""
    batch = min(record.unique / record.updates for record in records)
    depth = min(record.updates for record in records)
    found = []
    for record in records:
        larger, longer = round(record.unique / record.updates / batch), round(record.updates / depth)
        if record.num_copies > 1:
            found.append(replace(record, method=BA))
        elif larger > 1:
            found.append(replace(record, method=FIXED_SAMPLES, num_copies=larger))
        elif longer > 1:
            found.append(replace(record, method=EQUAL_COMPUTE, num_copies=longer))
        else:
            found.append(replace(record, method=FIXED_STEPS))
    return sorted(found, key=lambda record: (METHODS.index(record.method), record.num_copies))


def mean_curve(records: Sequence[Record]) -> list[tuple[int, float, float, float]]:
    """(update, mean, least, most) of the validations that all runs of a group have."""
    curves = [dict(record.validation) for record in records]
    shared = [update for update in curves[0] if all(update in curve for curve in curves)]
    points = [(update, [curve[update] for curve in curves]) for update in shared]
    return [(update, statistics.fmean(values), min(values), max(values)) for update, values in points]


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for the latter of one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
