"""A few updates of each training script under groups of ranks, and what a rank saw of them; for `run_ranks` too."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seqba.modules import LockedDropout
from tasks.run import stream as stream_module
from tiny_models import FAMILIES
from trainers import Samples, collator_of, make

SCRIPTS = {
    "translation": "--vocab-size 275 --width 32 --ffn-width 32 --num-layers 1 --max-tokens 96 --warmup-updates 2000",
    "language_modelling": "--embedding-size 16 --hidden-size 16 --batch-size 4 --bptt 8 --learning-rate 1",
    "vision": "--batch-size 8 --ghost-batch-size 0 --learning-rate 0.005 --seed 2 --train-images 96 --valid-images 40",
}
ALWAYS = "--max-updates 1000000 --eval-every 1000000 --save-every 1000000 --log-every 1000000 --cpu --num-threads 1"


def write_text(folder: Path) -> None:
    """Forty pairs of sentences for `run`, in its folder."""
    words = [f"w{n}" for n in range(9)]
    lines = [" ".join(words[(n * k) % 9] for k in range(1, 4 + n % 5)) for n in range(40)]
    (folder / "text.en").write_text("\n".join(lines) + "\n")
    (folder / "text.de").write_text("\n".join(line[::-1] for line in lines) + "\n")


def run(task: str, options: str, folder: str, updates: int = 5) -> dict[str, Any]:
    """`updates` updates (of images in float64): weights after them, gradients of the last, samples met, masks, reads.

    Masks are of the first dropout layer, or for images what the network's first layer is given; one number each.
    """
    training: Any = importlib.import_module(f"tasks.{task}.train")
    config = importlib.import_module(f"tasks.{task}.config")
    found: dict[str, Any] = {"samples": [], "masks": [], "read": 0, "counted": 0, "gradients": {}}
    step_class: Any = training.TrainStep
    read = stream_module.Numbered.__getitems__

    class Watched(step_class):
        def __init__(self, accelerator: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
            super().__init__(accelerator, model, *args, **kwargs)
            found["model"], found["world"] = accelerator.unwrap_model(model), accelerator.num_processes
            modules = list(found["model"].modules())
            first = next((x for x in modules if isinstance(x, nn.Conv2d)), None)
            locked = next((x for x in modules if isinstance(x, LockedDropout)), None)
            if first is not None:
                first.register_forward_pre_hook(lambda _, inputs: found["masks"].append(_number(inputs[0])))
            elif locked is not None:
                locked.register_forward_hook(lambda _, __, output: found["masks"].append(_number(output == 0)))
            else:
                watched_dropout(found["masks"])

        def _clip(self) -> torch.Tensor:
            found["gradients"] = {n: p.grad.clone() for n, p in found["model"].named_parameters() if p.grad is not None}
            return super()._clip()

    build = training.build

    def in_double(*args: Any) -> nn.Module:
        """Rounding in float32 turns a ReLU on or off within five updates, whatever the plan."""
        model = build(*args).double()
        first = next(x for x in model.modules() if isinstance(x, nn.Conv2d))
        first.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
        return model

    if task == "vision":
        training.build = in_double

    def counted(self: Any, batch: tuple[int, list[int]]) -> dict[str, Any]:
        found["read"] += len(batch[1])
        taken = read(self, batch)
        return taken

    parts = [*SCRIPTS[task].split(), *ALWAYS.split(), *options.split(), "--output-dir", f"{folder}/{task}"]
    if task == "translation":
        parts += ["--cache-dir", f"{folder}/cache"]
        parts += [part for split in ("train", "valid") for part in (f"--{split}-prefix", f"{folder}/text")]
    training.TrainStep, stream_module.Numbered.__getitems__ = Watched, counted
    take = stream_module.BatchStream.take

    def taken(self: Any, count: int) -> list[dict[str, Any]]:
        batches = take(self, count)
        found["samples"].append([batch[stream_module.SAMPLE_IDS].tolist() for batch in batches])
        return batches

    stream_module.BatchStream.take = taken
    try:
        loop = training.training(config.parse_config(parts))
        for _ in range(updates):
            result, _ = next(loop)
            found["counted"] += int(result.num_samples)
        loop.close()
    finally:
        training.TrainStep, stream_module.Numbered.__getitems__ = step_class, read
        stream_module.BatchStream.take, training.build = take, build
        nn.functional.dropout = _DROPOUT
    model = found.pop("model")
    found["weights"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    return found


def run_trainer(family: str, ranks_per_group: int, accumulation: int, folder: str, count: int = 12) -> dict[str, Any]:
    """Five updates of a Trainer with streams: weights after them, and its counters."""
    torch.manual_seed(0)
    model = FAMILIES[family](dropout=0.3)
    trainer = make(
        folder,
        model,
        Samples(family, count),
        data_collator=collator_of(family, model, 0.0),
        ba_m=4,
        reproducible_copies=True,
        ranks_per_group=ranks_per_group,
        settings={"max_steps": 5, "gradient_accumulation_steps": accumulation, "learning_rate": 0.05},
    )
    trainer.train()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {
        "weights": weights,
        "gradients": {},
        "counters": trainer.counters.state()["args"],
        "world": trainer.accelerator.num_processes,
    }


_DROPOUT = nn.functional.dropout


def watched_dropout(masks: list[float]) -> None:
    """Note one number of every mask that dropout draws from here on."""

    def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        output = _DROPOUT(input, p, training, inplace)
        if training and p:
            masks.append(_number(output == 0))
        return output

    nn.functional.dropout = dropout


def _number(x: torch.Tensor) -> float:
    weights = torch.arange(1, x.numel() + 1, dtype=torch.float64).sqrt()
    return float((x.detach().double().flatten() * weights).sum())
