"""The folder of an evaluation: `results.json`, and what else was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from tasks.cli.errors import UserError, make_folder, writing
from tasks.cli.files import write_json

RESULTS = "results.json"
REMEDY = "name another folder with --output-dir"


def keep_results(
    accelerator: Accelerator, folder: Path | None, results: dict[str, Any], *, kept: str = "the figures", also: str = ""
) -> None:
    """Write `results.json` on the first rank, and say where; or that what was `kept` otherwise is not.

    Raises:
        RunError: the folder cannot be written into.
    """
    if folder is None:
        accelerator.print(f"\nno --output-dir: {kept} are not kept")
    elif accelerator.is_main_process:
        with writing(folder / RESULTS, remedy=REMEDY):
            write_json(folder / RESULTS, results)
        accelerator.print(f"\n{folder}: {RESULTS}{also}")


def new_folder(output_dir: str | None, *, prefix: str = RESULTS) -> Path | None:
    """Make the folder of --output-dir, where one is asked for; it may hold neither results nor files of that prefix.

    Raises:
        UserError: it holds some, or cannot be written into.
    """
    if output_dir is None:
        return None
    folder = Path(output_dir)
    make_folder(folder, remedy=REMEDY)
    held = [path.name for path in folder.iterdir() if path.name == RESULTS or path.name.startswith(prefix)]
    if held:
        raise UserError(f"--output-dir {folder} already holds {min(held)}; name another folder, or remove it first")
    return folder
