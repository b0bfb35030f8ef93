"""The run folder of a Trainer: not written over by accident, and gone on with only as the run that it holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments

from seqba.trainer_arguments import BatchAugmentationArguments
from tasks.errors import RunError, make_folder
from tasks.finetuning.config import FinetuningConfig
from tasks.metrics import write_json

RESULTS, OPTIONS = "results.json", "options.json"
LAST = "last"

# what a resumed run may change: nothing that reaches the weights
_MAY_DIFFER = ("num_beams", "length_penalty", "cache_dir", "copies_per_pass", "allow_identical_copies")


def prepare_folder(args: TrainingArguments, say: Callable[[str], None]) -> str | None:
    """Make the run folder, or find the checkpoint in it that was asked for.

    Returns:
        The checkpoint to go on from: the one named, or with "last" the newest that is whole; None for a new run.

    Raises:
        RunError: the folder holds a run already, cannot be written, or there is no such checkpoint.
    """
    folder, asked = Path(args.output_dir), args.resume_from_checkpoint
    make_folder(folder, remedy="name another folder with --output_dir")
    if asked is None:
        held = [path.name for path in folder.iterdir() if path.name in (RESULTS, OPTIONS, "config.json")]
        held += [path.name for path in folder.glob("checkpoint-*")]
        if held:
            raise RunError(
                f"{folder} already holds a run ({min(held)}): go on with it by --resume_from_checkpoint {LAST}, name "
                "another folder with --output_dir, or remove it first"
            )
        return None
    if asked not in (LAST, "true", "True"):
        if trouble := _trouble(Path(asked)):
            raise RunError(f"--resume_from_checkpoint {asked} {trouble}")
        return str(asked)
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if not (trouble := _trouble(path)):
            return str(path)
        say(f"{path} {trouble}: passed over")
    raise RunError(f"--resume_from_checkpoint {LAST}: {folder} holds no whole checkpoint; leave the option out")


def keep_options(folder: Path, config: FinetuningConfig, ba_args: BatchAugmentationArguments) -> None:
    """Write down the options that make a run what it is."""
    write_json(folder / OPTIONS, _options(config, ba_args))


def check_same_options(folder: Path, config: FinetuningConfig, ba_args: BatchAugmentationArguments) -> None:
    """Compare the options of a resumed run with those that it began with.

    Raises:
        RunError: they differ; the message names them.
    """
    file, options = folder / OPTIONS, _options(config, ba_args)
    kept = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    if other := [name for name in options if name in kept and kept[name] != options[name]]:
        said = ", ".join(f"--{name} {kept[name]} there and {options[name]} here" for name in other)
        raise RunError(f"{folder} holds a run with other options ({said}); give the same, or another --output_dir")


def _options(config: FinetuningConfig, ba_args: BatchAugmentationArguments) -> dict[str, Any]:
    named = {**asdict(config), **asdict(ba_args)}
    return {name: value for name, value in named.items() if name not in _MAY_DIFFER}


def _trouble(folder: Path) -> str | None:
    """Why a folder is no checkpoint to go on from, as the rest of a sentence."""
    if not folder.is_dir():
        return "is no folder"
    if not (folder / "trainer_state.json").is_file():  # a Trainer writes it last
        return "is no whole checkpoint of a Trainer (it has no trainer_state.json)"
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"is damaged ({file.name}: {error})"
    return None
