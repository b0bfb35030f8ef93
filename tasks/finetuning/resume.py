"""The run folder of a Trainer: not written over by accident, and gone on with only as the run that it holds."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments

from seqba.arguments import BatchAugmentationArguments
from tasks.cli.errors import RunError, make_folder
from tasks.cli.files import write_json
from tasks.finetuning.config import FinetuningConfig, as_plain

logger = logging.getLogger(__name__)

RESULTS, OPTIONS = "results.json", "options.json"
LAST = "last"
_LAST = (LAST, "true", "True")

# what a resumed run may change: nothing that reaches the weights
_MAY_DIFFER = ("num_beams", "length_penalty", "bleu_tokenize", "cache_dir", "copies_per_pass", "allow_identical_copies")

# options of transformers that do reach them, as versions of it name them
_TRAINING = (
    "seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs",
    "train_sampling_strategy", "length_column_name", "dataloader_drop_last", "ignore_data_skip", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "optim", "optim_args",
    "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "label_smoothing_factor", "neftune_noise_alpha", "average_tokens_across_devices", "bf16", "fp16", "tf32",
    "auto_find_batch_size", "accelerator_config", "remove_unused_columns", "label_names", "full_determinism",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel",
)  # fmt: skip


def prepare_folder(args: TrainingArguments) -> str | None:
    """Make the run folder, or find the checkpoint in it that was asked for.

    Returns:
        The checkpoint to go on from: the one named (of this folder or another), or with "last" the newest here that
        is whole; None for a new run.

    Raises:
        RunError: the folder holds another run, cannot be written, or there is no such checkpoint.
    """
    folder, asked = Path(args.output_dir), args.resume_from_checkpoint
    make_folder(folder, remedy="name another folder with --output_dir")
    if asked is None or (asked not in _LAST and Path(asked).resolve().parent != folder.resolve()):
        held = [path.name for path in folder.iterdir() if path.name in (RESULTS, "config.json")]
        checkpoints = [path.name for path in folder.glob("checkpoint-*")]
        if held or checkpoints:
            go_on = f"go on with it by --resume_from_checkpoint {LAST}, " if checkpoints else ""
            raise RunError(
                f"{folder} already holds a run ({min(held + checkpoints)}): {go_on}name another folder with "
                "--output_dir, or remove it first"
            )
    if asked is None:
        return None
    if asked not in _LAST:
        if trouble := _trouble(Path(asked)):
            raise RunError(f"--resume_from_checkpoint {asked} {trouble}")
        return str(asked)
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    for path in sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        if not (trouble := _trouble(path)):
            return str(path)
        logger.info(f"{path} {trouble}: passed over")
    if numbered:
        raise RunError(f"--resume_from_checkpoint {LAST}: {folder} has no whole checkpoint; name another --output_dir")
    logger.info(f"{folder} holds no checkpoint to go on from: starting at update 1")
    return None


def keep_options(config: FinetuningConfig, ba_args: BatchAugmentationArguments, args: TrainingArguments) -> None:
    """Write down the options that make a run what it is."""
    write_json(Path(args.output_dir, OPTIONS), _options(config, ba_args, args))


def check_same_options(
    checkpoint: str, config: FinetuningConfig, ba_args: BatchAugmentationArguments, args: TrainingArguments
) -> None:
    """Compare the options of a resumed run with those that the run of the checkpoint began with.

    Raises:
        RunError: they differ; the message names them.
    """
    folder = Path(checkpoint).absolute().parent
    file, options = folder / OPTIONS, _options(config, ba_args, args)
    if not file.is_file():
        logger.info(f"{folder} has no {OPTIONS}: whether that run had the same options cannot be told")
        return
    kept = json.loads(file.read_text("utf-8"))
    if other := [name for name in options if name in kept and kept[name] != options[name]]:
        said = ", ".join(f"--{name} {kept[name]} there and {options[name]} here" for name in other)
        raise RunError(f"{folder} holds a run with other options ({said}); give the same, or begin a new run")


def _options(config: FinetuningConfig, ba_args: BatchAugmentationArguments, args: TrainingArguments) -> dict[str, Any]:
    named = {**asdict(config), **asdict(ba_args)}
    chosen = {name: value for name, value in named.items() if name not in _MAY_DIFFER}
    training = {name: as_plain(getattr(args, name)) for name in _TRAINING if hasattr(args, name)}
    return {**chosen, **training, "num_processes": args.world_size}


def _trouble(folder: Path) -> str | None:
    """Why a folder is no checkpoint to go on from, as the rest of a sentence."""
    if not folder.is_dir():
        return "is no folder"
    if not (folder / "trainer_state.json").is_file():  # a Trainer writes it last
        return "is no whole checkpoint of a Trainer (it has no trainer_state.json)"
    if not (folder / "optimizer.pt").is_file():
        return "has no optimizer.pt (--save_only_model leaves it out): its learning rate and averages would begin anew"
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"is damaged ({file.name}: {error})"
    return None
