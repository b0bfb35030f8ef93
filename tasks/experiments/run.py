"""Run the cells of a manifest: in turn or several at once, each resumed where it was, finished ones skipped."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tasks.cli.errors import RunError, make_folder, writing
from tasks.cli.files import write_json, write_text
from tasks.cli.options import check_least, option
from tasks.cluster.costs import fit_costs
from tasks.experiments.figures import save_figures
from tasks.experiments.kinds import SCRIPTS, Kind
from tasks.experiments.manifest import BA, FIXED_STEPS, Cell, Manifest, command_line, evaluate, read_manifest
from tasks.experiments.records import EVALUATION, EXPERIMENT, RESULTS, read_experiments
from tasks.experiments.tables import tables

logger = logging.getLogger(__name__)

LOG, TABLES, FIGURES = "log.txt", "tables.txt", "figures"
_TIMED = 6  # updates; the first one is left out
_LONGEST = 600.0  # seconds that timing may take
_SHOWN = 3  # last lines of a run that failed


@dataclass(frozen=True)
class ExperimentConfig:
    """Options of `scripts/experiment.py` beside the manifest."""

    output_dir: str | None = option(None, "folder of the experiment; by default runs/experiments/NAME of the manifest")
    jobs: int = option(1, "runs at a time")
    launch: str = option(
        "", "command that starts a training script, such as 'torchrun --nproc_per_node 4'; this Python by default"
    )
    dry_run: bool = option(False, "check the manifest, print its runs and their hours, and do nothing else")

    def __post_init__(self) -> None:
        check_least(self, {"jobs": 1})


def run_experiment(file: Path, config: ExperimentConfig) -> Path:
    """Run what is not finished of a manifest; all of it is checked before the first run.

    Returns:
        The experiment's folder: `experiment.json`, a run folder for every cell, `tables.txt` and `figures/`.

    Raises:
        UserError: the manifest is wrong, the folder holds another experiment, or a run failed.
    """
    manifest = read_manifest(file)
    folder = Path(config.output_dir or Path("runs/experiments", file.stem))
    cells = manifest.cells()
    _keep(manifest, cells, folder, dry_run=config.dry_run)
    waiting = [cell for cell in cells if not is_finished(folder / cell.name)]
    logger.info(f"{manifest.title}: {len(cells)} runs, {len(cells) - len(waiting)} of them finished")
    with _children() as children:
        runner = _Runner(manifest.kind, folder, config.launch.split() or [sys.executable], children)
        if waiting:
            _say_hours(runner, manifest, cells, waiting, config)
        if config.dry_run:
            return folder
        failed = runner.run_all(waiting, config.jobs)
        if failed:
            raise RunError(f"{len(failed)} of {len(waiting)} runs failed ({failed[0]}); the same command goes on")
        if manifest.evaluation and not is_finished(folder / EVALUATION):
            runner.evaluate(manifest, cells)
    for experiment in read_experiments([folder]):
        text = "\n\n".join(table.as_text() for table in tables(experiment))
        logger.info("\n%s", text)
        with writing(folder, remedy="give another --output-dir"):
            write_text(folder / TABLES, text + "\n")
        save_figures(experiment, folder / FIGURES)
    page = f"python scripts/report.py {folder} --output report.html"
    logger.info("\n%s: %s, %s/; as a page: %s", folder, TABLES, FIGURES, page)
    return folder


def is_finished(folder: Path) -> bool:
    """Whether a run folder holds a result."""
    return (folder / RESULTS).is_file()


def _keep(manifest: Manifest, cells: Sequence[Cell], folder: Path, *, dry_run: bool) -> None:
    """Write `experiment.json`, unless the folder holds runs that the manifest would make otherwise."""
    file = folder / EXPERIMENT
    now = json.loads(json.dumps({"manifest": asdict(manifest), "cells": {cell.name: asdict(cell) for cell in cells}}))
    if file.is_file():
        try:
            before = json.loads(file.read_text("utf-8"))["cells"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{file} is damaged ({error!r}); restore it, or give another --output-dir") from error
        for name in filter(before.get, now["cells"]):
            old, new = before[name]["options"], now["cells"][name]["options"]
            differing = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
            if differing and (folder / name).exists():
                key = differing[0]
                raise RunError(
                    f"{folder / name} was run with {key} {old.get(key)!r}, and the manifest now has {new.get(key)!r}; "
                    "give another --output-dir, or remove that folder"
                )
    if not dry_run:
        make_folder(folder, remedy="give another --output-dir")
        with writing(file, remedy="give another --output-dir"):
            write_json(file, now)


class _Runner:
    """Starts the scripts of one task, each run in its own folder below `folder`."""

    def __init__(self, kind: Kind, folder: Path, launch: Sequence[str], children: set[subprocess.Popen[bytes]]) -> None:
        self.kind, self.folder, self.launch, self.children = kind, folder, launch, children

    def run_all(self, cells: Sequence[Cell], jobs: int) -> list[str]:
        """Run cells, `jobs` at a time; one that fails does not stop the others. Returns what went wrong."""
        failed = []
        with ThreadPoolExecutor(jobs) as pool:
            running = {pool.submit(self.run, cell): cell for cell in cells}
            try:
                for done, future in enumerate(as_completed(running), start=1):
                    status, seconds = future.result()
                    cell = running[future]
                    logger.info(f"{done}/{len(cells)} {cell.name}: {_hours(seconds)}" + (", failed" if status else ""))
                    if status:
                        failed.append(f"{cell.name} ended with status {status}: {_last_lines(self.folder / cell.name)}")
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                _stop(self.children)
                logger.info("stopped; the same command goes on")
                raise
        return failed

    def run(self, cell: Cell) -> tuple[int, float]:
        """Train one cell to its end; its status, and seconds."""
        start = time.perf_counter()
        words = [*command_line({**cell.options, "output_dir": str(self.folder / cell.name)}), *self.kind.resume]
        process = self._start(self.kind.script, words, self.folder / cell.name)
        status = process.wait()
        self.children.discard(process)
        return status, time.perf_counter() - start

    def evaluate(self, manifest: Manifest, cells: Sequence[Cell]) -> None:
        """Score the models of all runs by the evaluation script, Table 4; its folder is `evaluation`."""
        assert self.kind.evaluation is not None
        models = [str(self.folder / cell.name / "model") for cell in cells]
        words = evaluate(manifest, models)
        place = self.folder / EVALUATION
        logger.info(f"{self.kind.evaluation[0]} scores {len(models)} models")
        process = self._start(self.kind.evaluation[0], [*words, "--output-dir", str(place)], place)
        if process.wait():
            raise RunError(f"{self.kind.evaluation[0]} failed: {_last_lines(place)}")

    def seconds_per_update(self, cell: Cell) -> float:
        """The median of some updates of a cell, begun in a folder of its own and stopped."""
        place = self.folder / ".timing" / cell.group
        shutil.rmtree(place, ignore_errors=True)
        options = {**cell.options, "output_dir": str(place), self.kind.log_every: 1}
        process = self._start(self.kind.script, command_line(options), place)
        file, mark = place / self.kind.logged[0], self.kind.logged[1]
        stamps: list[float] = []
        end = time.perf_counter() + _LONGEST
        while len(stamps) < _TIMED and process.poll() is None and time.perf_counter() < end:
            count = file.read_text("utf-8").count(mark) if file.exists() else 0
            stamps += [time.perf_counter()] * (count - len(stamps))
            time.sleep(0.01)
        ended = process.poll()
        _stop({process})
        self.children.discard(process)
        if len(stamps) < 2:
            why = f"ended with status {ended}: {_last_lines(place)}" if ended else f"did no update in {_LONGEST:g} s"
            raise RunError(f"{cell.name} {why}")
        shutil.rmtree(place.parent, ignore_errors=True)
        return statistics.median(b - a for a, b in itertools.pairwise(stamps))

    def _start(self, script: str, words: Sequence[str], place: Path) -> subprocess.Popen[bytes]:
        make_folder(place, remedy="give another --output-dir")
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with (place / LOG).open("ab") as log:
            process = subprocess.Popen(
                [*self.launch, str(SCRIPTS / script), *words], stdout=log, stderr=log, env=environment
            )
        self.children.add(process)
        return process


def _say_hours(
    runner: _Runner, manifest: Manifest, cells: Sequence[Cell], waiting: Sequence[Cell], config: ExperimentConfig
) -> None:
    """Print every run that is left, and about how long it takes; validation and the final scores are not counted."""
    found = [_measured(cell, runner.folder / cell.name) for cell in cells if is_finished(runner.folder / cell.name)]
    known = [one for one in found if one is not None]
    source = "as the finished runs took"
    if not known and manifest.seconds_per_update is not None:
        known, source = [(1, float(manifest.seconds_per_update))], "by the manifest's seconds_per_update"
    if not known:
        source = f"by {_TIMED - 1} timed updates"
        first = next((cell for cell in cells if cell.method == FIXED_STEPS), cells[0])
        last = max((cell for cell in cells if cell.method == BA), key=lambda cell: cell.work)
        known = [(cell.work, runner.seconds_per_update(cell)) for cell in (first, last)]
    copy, rest = fit_costs(known)
    total = 0.0
    for cell in waiting:
        seconds = cell.updates * (copy * cell.work + rest)
        total += seconds
        logger.info(f"  {cell.name}: {cell.updates:,} updates, about {_hours(seconds)}")
    at_once = f", {_hours(total / config.jobs)} with {config.jobs} at a time" if config.jobs > 1 else ""
    logger.info(f"training takes about {_hours(total)} {source}{at_once}; validation and scoring come on top")


def _measured(cell: Cell, folder: Path) -> tuple[int, float] | None:
    results: Mapping[str, Any] = json.loads((folder / RESULTS).read_text("utf-8"))
    return (cell.work, results["seconds"] / cell.updates) if results.get("seconds") else None


def _hours(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"


def _last_lines(place: Path) -> str:
    lines = (place / LOG).read_text("utf-8", errors="replace").replace("\r", "\n").split("\n")
    return " / ".join([line for line in lines if line.strip()][-_SHOWN:]) + f"; see {place / LOG}"


def _stop(children: set[subprocess.Popen[bytes]]) -> None:
    """Ask runs to stop, which saves a checkpoint, and wait until they did."""
    started = list(children)  # the threads that wait for them take them out
    for process in started:
        if process.poll() is None:
            process.terminate()
    for process in started:
        process.wait()


@contextmanager
def _children() -> Iterator[set[subprocess.Popen[bytes]]]:
    """The running scripts, which end with this one: SIGTERM is taken for Ctrl-C."""
    children: set[subprocess.Popen[bytes]] = set()

    def handle(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield children
    finally:
        signal.signal(signal.SIGTERM, before)
        _stop(children)
