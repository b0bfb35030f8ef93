"""A run's folder: opened only where nothing is overwritten, and resumed only with the options it was begun with."""

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tasks.cli.errors import RunError, make_folder, writing
from tasks.cli.files import write_json, write_text
from tasks.run.log import read_metrics

logger = logging.getLogger(__name__)

_LEFT_BY_A_RUN = ("config.json", "metrics.jsonl", "checkpoints", "results.json", "model")
_OTHER_SCRIPT = 8  # options that this one does not have
_ELSEWHERE = "give another --output-dir"


class RunFolder:
    """The files of one run, but for its checkpoints' own; `may_differ` names options that a resumed run may change."""

    def __init__(self, path: Path, config: Mapping[str, Any], *, resume: bool, may_differ: Collection[str]) -> None:
        self.path, self.resume, self.may_differ = path, resume, may_differ
        self.config = json.loads(json.dumps(dict(config)))  # as it will be read again
        self.config_file = path / "config.json"  # all options; there from the first update on
        self.metrics_file = path / "metrics.jsonl"  # one JSON object a logged update
        self.checkpoints = path / "checkpoints"

    def open(self) -> None:
        """Make the folder, or make sure that the run can go on in it; nothing that it holds is changed.

        Raises:
            RunError: it already holds a run and `resume` is off, holds one of another configuration, or cannot be
                written into.
        """
        if self._left_by_a_run():  # where there is nothing, --resume may stand in a job script from the first start on
            self._compare_config()
        make_folder(self.path, remedy=_ELSEWHERE)

    def _left_by_a_run(self) -> list[str]:
        """The files of a run in the folder; an error where this run does not continue it."""
        left = [name for name in _LEFT_BY_A_RUN if (self.path / name).exists()]
        if left and not self.resume:
            raise RunError(
                f"{self.path} already holds a run; continue it with --resume, or {_ELSEWHERE} (found {', '.join(left)})"
            )
        return left

    def _compare_config(self) -> None:
        try:
            before = json.loads(self.config_file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise RunError(
                f"{self.config_file} {reason}: the run's options cannot be compared with those it was begun with; "
                f"restore it, or {_ELSEWHERE}"
            ) from error
        if not isinstance(before, dict):
            raise RunError(f"{self.config_file} holds no options; restore it, or {_ELSEWHERE}")
        if len(before.keys() - self.config.keys()) > _OTHER_SCRIPT:
            raise RunError(f"{self.path} holds a run of another script (its options are others); {_ELSEWHERE}")
        _say_other_software(before.get("software") or {}, self.config.get("software") or {})
        differing = [
            f"{name} was {before.get(name)!r}, is {self.config.get(name)!r}"
            for name in sorted(before.keys() | self.config.keys())
            if before.get(name) != self.config.get(name) and name not in self.may_differ
        ]
        if differing:
            raise RunError(
                f"{self.path} was begun with another configuration: {'; '.join(differing)}. Give the options it was "
                "begun with, or another --output-dir"
            )

    def begin(self, update: int) -> None:
        """Note the options, and drop what was logged after `update`: those updates are done again.

        Raises:
            RunError: a file cannot be written, a logged row cannot be read, or another run has begun here since `open`.
        """
        self._left_by_a_run()
        with writing(self.path, remedy=f"make room, or {_ELSEWHERE}"):
            if self.metrics_file.exists():
                rows = self._logged(update)
                write_text(self.metrics_file, "".join(json.dumps(row) + "\n" for row in rows))
            write_json(self.config_file, self.config)

    def _logged(self, update: int) -> list[dict[str, Any]]:
        try:
            return [row for row in read_metrics(self.metrics_file) if row["update"] <= update]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self.metrics_file} has a line that is no row of metrics ({error!r}); take the line out, or move "
                "the file away to log into a new one"
            ) from error


def _say_other_software(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    differing = [
        f"{name} was {before.get(name)}, is {now.get(name)}"
        for name in before.keys() | now.keys()
        if before.get(name) != now.get(name)
    ]
    if before and differing:
        logger.info(
            "note: the run was begun with other software (%s); its result may differ in its last digits from that of "
            "an undisturbed run",
            "; ".join(sorted(differing)),
        )
