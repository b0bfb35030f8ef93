"""A manifest: which runs an experiment consists of, read from TOML and checked before anything runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tasks.cli.errors import UserError, reason_of
from tasks.cli.options import flag
from tasks.experiments.kinds import KINDS, Kind

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FIXED_STEPS, FIXED_SAMPLES, EQUAL_COMPUTE, BA = "fixed-steps", "fixed-samples", "equal-compute", "ba"
METHODS = (FIXED_STEPS, FIXED_SAMPLES, EQUAL_COMPUTE, BA)
BASELINES = METHODS[:-1]
_NEVER = 1e6  # epochs: the number of updates alone ends a run


@dataclass(frozen=True)
class Cell:
    """One run of an experiment.

    Attributes:
        name: of its folder; `group` is the same without the seed.
        num_copies: M of Batch Augmentation; of a baseline the factor of its batch (fixed samples) or of its updates
            (equal compute), 1 for fixed steps.
        rate_power: p, where the learning rate is that of fixed steps times M^p.
        updates: of the run, and `work`, instances of an update over those of fixed steps.
        options: of the training script, by name.
    """

    name: str
    group: str
    method: str
    variant: str
    num_copies: int
    rate_power: float
    seed: int
    updates: int
    work: int
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Manifest:
    """The paper's protocol (Hoffer et al. 2020, section 4): what its Table 2 compares, for one network and data set.

    Every cell of it is a run of the task's training script with `options`. Fixed steps is M = 1. Fixed samples is
    M = 1 with M times the batch, so that updates and instances are those of Batch Augmentation, at rates times M^p for
    each p of `rate_powers`. Equal compute is M = 1 with M times the updates.

    Attributes:
        task: translation, language_modelling, vision or finetuning.
        title: of tables and figures.
        updates: of every run but those of equal compute.
        ba_m: the values of M, each at least 2.
        seeds: all of which every cell is run with.
        baselines: of fixed-steps, fixed-samples and equal-compute.
        rate_powers: p; the paper takes 0, 0.25, 0.5, 1 and 2.
        fixed_samples_by: batch enlarges the batch; accumulation takes M batches an update.
        train_samples: N; with it what counts in epochs falls on the same updates in larger batches.
        seconds_per_update: of M = 1; without it some updates are timed before the start.
        options: of the training script.
        variants: options of all methods, by name, such as one with mixup; each has its own tables.
        ba_variants: options of Batch Augmentation alone, by name.
        evaluation: options of the task's evaluation script, which then scores all runs at the end.
    """

    task: str
    title: str
    updates: int
    ba_m: list[int]
    seeds: list[int] = field(default_factory=lambda: [0])
    baselines: list[str] = field(default_factory=lambda: [FIXED_STEPS, FIXED_SAMPLES])
    rate_powers: list[float] = field(default_factory=lambda: [0.0])
    fixed_samples_by: str = "batch"
    train_samples: int | None = None
    seconds_per_update: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    ba_variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """What is known of the task."""
        return KINDS[self.task]

    def cells(self) -> list[Cell]:
        """All runs, the first seed of every method first."""
        groups = [made for name, options in (self.variants or {"": {}}).items() for made in self._groups(name, options)]
        return [
            Cell(f"{cell['group']}-seed{seed}", seed=seed, **{**cell, "options": {**cell["options"], "seed": seed}})
            for seed in self.seeds
            for cell in groups
        ]

    def _groups(self, variant: str, of_variant: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        kind = self.kind
        shared = {**self.options, **of_variant, "ba_m": 1, kind.updates: self.updates}
        base = kind.parse(command_line(shared))
        if base.get("epochs") is not None and "epochs" in kind.epochs:
            shared["epochs"] = _NEVER

        def group(
            method: str, name: str, num_copies: int = 1, power: float = 0.0, work: int = 1, **options: Any
        ) -> Any:
            if power:
                name, options[kind.rate] = f"{name}-rate{power:g}", base[kind.rate] * num_copies**power
            chosen = {**shared, **options}
            return {
                "group": "-".join(filter(None, [variant, name])), "method": method, "variant": variant,
                "num_copies": num_copies, "rate_power": power, "updates": chosen[kind.updates], "work": work,
                "options": chosen,
            }  # fmt: skip

        if FIXED_STEPS in self.baselines:
            yield group(FIXED_STEPS, FIXED_STEPS)
        for copies in self.ba_m:
            for name, options in (self.ba_variants or {"": {}}).items():
                label = "-".join(filter(None, [f"m{copies}", name]))
                yield group(BA, label, copies, work=copies, **{**options, "ba_m": copies})
            if FIXED_SAMPLES in self.baselines:
                size = kind.batch if self.fixed_samples_by == "batch" else kind.accumulation
                larger = {size: base[size] * copies, **self._later(base, self._epochs(base, copies))}
                for power in self.rate_powers:
                    yield group(FIXED_SAMPLES, f"{FIXED_SAMPLES}-m{copies}", copies, power, work=copies, **larger)
            if EQUAL_COMPUTE in self.baselines:
                longer = {kind.updates: self.updates * copies, **self._later(base, copies)}
                yield group(EQUAL_COMPUTE, f"{EQUAL_COMPUTE}-m{copies}", copies, **longer)

    def _epochs(self, base: Mapping[str, Any], copies: int) -> float:
        """Epochs of M times the batch in the updates of one epoch."""
        samples = self.train_samples or base.get("train_images")
        if samples is None:
            return copies
        batch = base[self.kind.batch] * base[self.kind.accumulation]
        return (samples // batch) / max(1, samples // (batch * copies))

    def _later(self, base: Mapping[str, Any], factor: float) -> dict[str, Any]:
        """What counts in epochs, `factor` times as late."""
        found = {name: base[name] for name in self.kind.epochs if name != "epochs" and base[name]}
        return {
            name: [x * factor for x in value] if isinstance(value, list) else value * factor
            for name, value in found.items()
        }


def command_line(options: Mapping[str, Any]) -> list[str]:
    """Options as a script takes them.

    >>> command_line({"ba_m": 4, "flip": False, "lr_drops": [2.0, 3.5]})
    ['--ba-m', '4', '--flip', 'False', '--lr-drops', '2.0', '3.5']
    """
    words: list[str] = []
    for name, value in options.items():
        words += [flag(name), *map(str, value if isinstance(value, list) else [value])]
    return words


def read_manifest(file: Path) -> Manifest:
    """Read and check a manifest, every cell of it by the task's own parser.

    Raises:
        UserError: it cannot be read, a key is unknown, a value is out of range, or the task refuses an option; the
            message names the file and the key.
    """
    try:
        content = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a manifest: {reason_of(error)}") from error
    try:
        return _checked(content)
    except UserError as error:
        raise UserError(f"{file}: {error}", details=error.details) from error


def _checked(content: Mapping[str, Any]) -> Manifest:
    known = [one.name for one in fields(Manifest)]
    _refuse_unknown("the key", content, known, "one of a manifest")
    if missing := [name for name in known[:4] if name not in content]:
        raise UserError(f"the key {missing[0]} is missing")
    if content["task"] not in KINDS:
        raise UserError(f"task must be one of {', '.join(KINDS)}, got {content['task']!r}")
    manifest = Manifest(**content)
    _check_values(manifest)
    _check_options(manifest)
    return manifest


def _check_values(manifest: Manifest) -> None:
    for name, least in (("ba_m", 2), ("seeds", 0)):
        values = getattr(manifest, name)
        if not isinstance(values, list) or not values or not all(_is_whole(x, least) for x in values):
            raise UserError(f"{name} must be a list of whole numbers of at least {least}, got {values!r}")
        if len(set(values)) < len(values):
            raise UserError(f"{name} names a value twice: {values}")
    for name in ("updates", "train_samples"):
        value = getattr(manifest, name)
        if value is not None and not _is_whole(value, 1):
            raise UserError(f"{name} must be a whole number of at least 1, got {value!r}")
    if not isinstance(manifest.baselines, list) or not set(manifest.baselines) <= set(BASELINES):
        raise UserError(f"baselines must be a list of {', '.join(BASELINES)}, got {manifest.baselines!r}")
    powers = manifest.rate_powers
    if (
        not isinstance(powers, list)
        or not powers
        or not all(isinstance(p, int | float) and 0 <= p <= 4 for p in powers)
    ):
        raise UserError(f"rate_powers must be a list of numbers from 0 to 4, got {powers!r}")
    if manifest.fixed_samples_by not in ("batch", "accumulation"):
        raise UserError(f"fixed_samples_by must be batch or accumulation, got {manifest.fixed_samples_by!r}")
    seconds = manifest.seconds_per_update
    if seconds is not None and not (isinstance(seconds, int | float) and 0 < seconds < math.inf):
        raise UserError(f"seconds_per_update must be above 0 and finite, got {seconds!r}")
    for name in ("options", "evaluation", "variants", "ba_variants"):
        tables = getattr(manifest, name)
        if not isinstance(tables, dict) or (name.endswith("s") and name != "options" and not all(
            isinstance(table, dict) for table in tables.values())):  # fmt: skip
            raise UserError(f"{name} must be a table{' of tables' if 'variants' in name else ''}, got {tables!r}")


def _check_options(manifest: Manifest) -> None:
    kind = manifest.kind
    known = kind.parse([]).keys()
    for where, table in _tables(manifest):
        _refuse_unknown(where, table, known, f"an option of {kind.script}")
        for name, instead in _set_here(kind).items():
            if name in table:
                raise UserError(f"{where} {name} is set by {instead}; leave it out")
    if manifest.evaluation and kind.evaluation is None:
        raise UserError(f"evaluation: the task {manifest.task} has no evaluation script; leave the table out")
    try:
        cells = manifest.cells()
    except UserError as error:
        raise UserError(f"options: {error}", details=error.details) from error
    if manifest.evaluation:
        evaluate(manifest, ["a"])
    for cell in cells:
        try:
            kind.parse(command_line(cell.options))
        except UserError as error:
            raise UserError(f"the run {cell.name}: {error}", details=error.details) from error


def evaluate(manifest: Manifest, models: Sequence[str]) -> list[str]:
    """The command line of the evaluation script, checked by its parser; the data is that of the training."""
    kind = manifest.kind
    assert kind.evaluation is not None
    base = kind.parse(command_line(manifest.options))
    of_training = {name: base[name] for name in kind.data if base.get(name)}
    words = ["--model", *models, *command_line({**of_training, **manifest.evaluation})]
    try:
        kind.evaluation[1](words)
    except UserError as error:
        raise UserError(f"evaluation: {error}") from error
    return words


def _tables(manifest: Manifest) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "options:", manifest.options
    for name in ("variants", "ba_variants"):
        for variant, table in getattr(manifest, name).items():
            yield f"{name}.{variant}:", table


def _set_here(kind: Kind) -> dict[str, str]:
    return {
        "ba_m": "the manifest's ba_m", "seed": "the manifest's seeds", kind.updates: "the manifest's updates",
        "output_dir": "the command line's --output-dir", kind.resume[0].lstrip("-"): "the experiment itself",
    }  # fmt: skip


def _refuse_unknown(where: str, given: Mapping[str, Any], known: Sequence[str] | Any, of: str) -> None:
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            raise UserError(f"{where} {name} is not {of}" + (f"; did you mean {close[0]}?" if close else ""))


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
