"""The paper's tables from records: Table 2's row, throughput, test-time averages, and updates to reach a quality."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.experiments.manifest import BA, EQUAL_COMPUTE, FIXED_SAMPLES, FIXED_STEPS
from tasks.experiments.records import Experiment, Record, mean_curve, spread
from tasks.experiments.significance import p_value_of
from tasks.scoring.table import align
from tasks.vision.evaluation.evaluate import relative_improvement

_ALPHA = 0.05
_WORDS = {FIXED_STEPS: "fixed steps", FIXED_SAMPLES: "fixed samples", EQUAL_COMPUTE: "equal compute"}


@dataclass(frozen=True)
class Table:
    """A title, a head, rows of text, and notes below them."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]

    def as_text(self) -> str:
        """For a terminal."""
        return "\n".join([self.title, align([self.head, *self.rows]), *self.notes])

    def as_markdown(self) -> str:
        """For `RESULTS.md`."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        table = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
        notes = [f"- {note}" for note in self.notes]
        return "\n".join([f"### {self.title}", "", *table, *([""] if notes else []), *notes])


def tables(experiment: Experiment) -> list[Table]:
    """All tables that the runs of an experiment allow."""
    made = [methods(experiment), all_runs(experiment), updates_to_reach(experiment), throughput(experiment)]
    made.append(averaged(experiment))
    return [table for table in made if table is not None and table.rows]


def label(record: Record) -> str:
    """A group in words.

    M is the factor of the batch or of the updates, where it is no number of copies.
    """
    rate = f", rate times M^{record.rate_power:g}" if record.rate_power else ""
    if record.method == BA:
        own = record.group.removeprefix(record.variant).strip("-")
        words = own.replace(f"m{record.num_copies}", f"M = {record.num_copies}", 1).replace("-", ", ")
    elif record.method == FIXED_STEPS:
        words = _WORDS[FIXED_STEPS]
    else:
        words = f"{_WORDS[record.method]}, {'B' if record.method == FIXED_SAMPLES else 'updates'} times "
        words += f"{record.num_copies}{rate}"
    return f"{record.variant}: {words}" if record.variant else words


def methods(experiment: Experiment) -> Table | None:
    """Table 2 (and with variants such as mixup Table 3) of Hoffer et al. 2020, with what it says in words."""
    rows, notes = [], []
    compared = dict.fromkeys(
        method for method in (FIXED_STEPS, FIXED_SAMPLES, EQUAL_COMPUTE) if experiment.groups(method)
    )
    signatures: set[str] = set()
    for variant in experiment.variants:
        for ours in experiment.groups(BA, variant).values():
            for test, figure in ours[0].tests.items():
                row = [label(ours[0]), f"{test}, {figure.unit}", _figure(ours, test)]
                for method in compared:
                    other = _baseline(experiment, method, variant, ours[0])
                    row.append(_figure(other, test) if other else "-")
                    if other:
                        notes.append(verdict(ours, other, test))
                rows.append(row)
                signatures |= {figure.signature} - {""}
    seeds = max((len(records) for records in experiment.groups().values()), default=0)
    notes.append(f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed: no spread, no test")
    if any(record.rate_power for record in experiment.records):
        notes.append("of fixed samples the rate factor with the best validation; all of them stand below")
    notes += [f"BLEU {signature}" for signature in sorted(signatures)]
    if experiment.unfinished:
        notes.append(f"not finished: {', '.join(experiment.unfinished)}")
    head = ["method", "figure", "BA", *(_WORDS[method] for method in compared)]
    return Table("Batch Augmentation against its baselines (Table 2)", head, rows, notes)


def verdict(ours: Sequence[Record], other: Sequence[Record], test: str) -> str:
    """What a comparison says, in a sentence: better beyond chance, perhaps chance, or not better."""
    figure = ours[0].tests[test]
    means = [spread([record.tests[test].value for record in side])[0] for side in (ours, other)]
    gain = (means[0] - means[1]) * (1 if figure.higher_is_better else -1)
    p, how = p_value_of(ours, other, test)
    chance = f"p = {p:.3f}, {how}" if p is not None else "one seed, so that no test tells it from chance"
    unit = "points" if figure.unit == "%" else figure.unit
    who = f"{label(ours[0])} on {test}"
    against = label(other[0])
    if gain > 0 and p is not None and p < _ALPHA:
        return f"{who} beats {against} by {gain:.2f} {unit} ({chance})"
    if gain > 0:
        return f"{who} is {gain:.2f} {unit} better than {against}, which may be chance ({chance})"
    how_much = f"{-gain:.2f} {unit} worse" if gain else "no better"
    return f"{who} does NOT win over {against}: it is {how_much} ({chance})"


def all_runs(experiment: Experiment) -> Table:
    """Every group: figures, depth (updates) and work (instances processed), section 3 of the paper; wall time."""
    names = dict.fromkeys(test for record in experiment.records for test in record.tests)
    units = {name: one.unit for record in experiment.records for name, one in record.tests.items()}
    rows = []
    for records in experiment.groups().values():
        seconds = spread([record.seconds for record in records])[0]
        rows.append(
            [label(records[0]), str(len(records)), *(_figure(records, name) for name in names),
             _plus_minus([record.best for record in records]), f"{records[0].updates:,}",
             f"{statistics.fmean(record.seen for record in records):,.0f}", f"{seconds:,.0f}" if seconds else "-"]
        )  # fmt: skip
    head = ["method", "seeds", *(f"{name}, {units[name]}" for name in names), f"best {experiment.records[0].unit}"]
    notes = ["depth: updates one after another; work: instances processed, copies included (section 3)"]
    return Table("All runs", [*head, "updates (depth)", "instances (work)", "seconds"], rows, notes)


def quality(experiment: Experiment, variant: str) -> float | None:
    """The validation figure with which fixed steps end, the mean over seeds; None without such runs."""
    for records in experiment.groups(FIXED_STEPS, variant).values():
        if curve := mean_curve(records):
            return curve[-1][1]
    return None


def updates_to_reach(experiment: Experiment) -> Table | None:
    """The paper's "faster": updates, and instances, until a method is as good as fixed steps are at their end.

    The figure is the mean over the seeds, so that fixed steps reach it at their last validation at the latest.
    """
    rows, notes = [], []
    for variant in experiment.variants:
        wanted = quality(experiment, variant)
        if wanted is None:
            continue
        notes.append(f"{variant + ': ' if variant else ''}{experiment.records[0].unit} of {wanted:.4g} or less")
        base = next(iter(experiment.groups(FIXED_STEPS, variant).values()))[0]
        for records in experiment.groups(variant=variant).values():
            update = next((update for update, mean, *_ in mean_curve(records) if mean <= wanted), None)
            if update is None:
                rows.append([label(records[0]), "never", "-", "-"])
            else:
                work = records[0].seen * update / records[0].updates / base.seen
                rows.append([label(records[0]), f"{update:,}", f"{base.updates / update:.2f}", f"{work:.2f}"])
    notes.append("of the mean over the seeds, at validations alone; factors are of all that fixed steps take")
    head = ["method", "updates", "times fewer updates", "times the instances"]
    return Table("Updates until the baseline's final quality", head, rows, notes) if rows else None


def throughput(experiment: Experiment) -> Table | None:
    """Table 5: instances a second against the instances of an update, median and spread over the rows of the log."""
    rows = []
    for size, records in sorted(_by_size(experiment).items()):
        rates = [rate for record in records for rate in record.rates()]
        if len(rates) > 1:
            names = ", ".join(dict.fromkeys(label(record) for record in records))
            rows.append(
                [f"{size:,.0f}", names, f"{statistics.median(rates):,.1f}", f"{statistics.stdev(rates):,.1f}",
                 str(len(rates))]
            )  # fmt: skip
    head = ["instances an update", "runs", "instances/s, median", "standard deviation", "windows"]
    return Table("Throughput (Table 5)", head, rows, ["of training alone; a window is what lies between two rows"])


def averaged(experiment: Experiment) -> Table | None:
    """Table 4: the mean over random views (TTA), or over dropout masks, against one plain reading."""
    if experiment.evaluation is None:
        return None
    options = experiment.evaluation["options"]
    number = options.get("tta") or options.get("mc_dropout") or 0
    what = f"{number} views (TTA)" if options.get("tta") else f"{number} dropout masks" if number else "scored again"
    rows = []
    for records in experiment.groups().values():
        for test in records[0].tests:
            figure = records[0].tests[test]
            found = [value for record in records for value in _scored(experiment, record, test)]
            if not found:
                continue
            plain = spread([record.tests[test].value for record in records])[0]
            mean = spread(found)[0]
            if figure.unit == "%":
                better = relative_improvement(plain / 100, mean / 100) or 0.0
            else:
                better = (mean / plain - 1) * (1 if figure.higher_is_better else -1)
            rows.append(
                [label(records[0]), f"{test}, {figure.unit}", _figure(records, test), _plus_minus(found),
                 f"{better:+.2%}"]
            )  # fmt: skip
    note = "improvement: the share of errors that is gone (Table 4); of BLEU and perplexity, their relative change"
    head = ["method", "figure", "plain", what, "improvement"]
    return Table("Averaging at test time (Table 4)", head, rows, [note])


def _scored(experiment: Experiment, record: Record, test: str) -> Iterator[float]:
    """A run's figure in the evaluation, which knows it by the folder of its model."""
    assert experiment.evaluation is not None
    evaluation = experiment.evaluation
    for name, one in evaluation["models"].items():
        if Path(one["model"]).parent.name != record.name:
            continue
        if "tta_accuracy" in one:
            yield 100 * one["tta_accuracy"]
        elif "accuracy" in one:
            yield 100 * one["accuracy"]
        elif "perplexity" in one:
            yield one["perplexity"]
        elif test in evaluation.get("tests", {}):
            yield evaluation["tests"][test]["systems"][name]["scores"][0]["value"]


def _baseline(experiment: Experiment, method: str, variant: str, ours: Record) -> list[Record] | None:
    """The runs that a Batch Augmentation is compared with: of fixed samples the rate whose validation is best."""
    found = [
        records
        for records in experiment.groups(method, variant).values()
        if method == FIXED_STEPS or records[0].num_copies == ours.num_copies
    ]
    return min(found, key=lambda records: spread([record.best for record in records])[0], default=None)


def _by_size(experiment: Experiment) -> dict[int, list[Record]]:
    sizes: dict[int, list[Record]] = {}
    for record in experiment.records:
        sizes.setdefault(round(record.seen / record.updates), []).append(record)
    return sizes


def _figure(records: Sequence[Record], test: str) -> str:
    return _plus_minus([record.tests[test].value for record in records if test in record.tests])


def _plus_minus(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, deviation = spread(values)
    return f"{mean:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")
