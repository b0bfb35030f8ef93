"""Checkpoints: atomic, exact, pruned, verified; nothing in them is unpickled.

    run/checkpoints/update-000400/
        model.safetensors     parameters and buffers; tied ones once
        optimizer.pt          its state_dict, read with weights_only=True
        tensors.safetensors   what else the caller carries over, e.g. hidden states
        rng.pt                one `rng_state` for each rank
        counters.json         sampler position, counts, best value ...
        manifest.json         size and checksum of every file; written last

A checkpoint is written into a temporary folder beside, flushed to the disk, and renamed into place, so that a kill or
a power cut at any moment leaves the last good one. One process writes (rank 0, with every rank's `rng_state` gathered);
all may read. A folder belongs to one run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from seqba.checkpoint.files import (
    COUNTERS,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    RNG,
    TENSORS,
    checkpoint_fault,
    disk_error,
    find_ties,
    fsync,
    load_pt,
    load_tensors,
    save_pt,
    save_tensors,
    write_manifest,
)
from seqba.checkpoint.shards import sharded_like

TEMPORARY, REPLACED = ".tmp-", ".replaced"


@dataclass(frozen=True)
class Checkpoint:
    """The return value of `load_checkpoint`, which also fills the model and the optimizer."""

    path: Path
    update: int
    counters: dict[str, Any]
    rng: list[dict[str, Any]]  # of rank 0, 1, ...
    tensors: dict[str, Tensor]


def save_checkpoint(
    folder: str | Path,
    update: int,
    *,
    model: nn.Module | Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | Mapping[str, Any] | None = None,
    counters: Mapping[str, Any],
    rng: Sequence[Mapping[str, Any]],
    tensors: Mapping[str, Tensor] | None = None,
    keep: int = 2,
    pinned: Collection[int] = (),
) -> Path:
    """Write `folder`/update-NNNNNN atomically, then prune.

    Of the checkpoints up to this update the newest `keep` stay, and the `pinned`. One of a later update belongs to a
    future that was given up when the run went back before it, and goes too. While writing, the folder holds one
    checkpoint more than stay.

    Args:
        folder: of all checkpoints of one run; made where it is missing.
        update: how many updates were done, at least 0. A checkpoint of the same update is replaced, safely.
        model: unwrapped, so that its names are those of a run on one rank; or its state dictionary, as
            `full_state_dict` gathers it from all ranks.
        optimizer: it, or its state dictionary likewise; None where there is none to continue.
        counters: JSON values under string keys.
        rng: `rng_state()` of rank 0, 1, ..., gathered by the caller.
        tensors: more tensors by name, e.g. hidden states.
        keep: checkpoints to keep, at least 1.
        pinned: updates never pruned, e.g. the best one.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: an argument outside its range, or a state that could not be read back without unpickling.
        TypeError: a counter that JSON does not know.
        OSError: a full disk, most of all; the earlier checkpoints are intact and the partial one is removed.
    """
    if update < 0 or keep < 1:
        raise ValueError(f"update must be at least 0 and keep at least 1, got update={update} and keep={keep}")
    if isinstance(rng, Mapping) or not rng:
        raise ValueError("rng must be a list with the rng_state() of each rank, in the order of ranks")
    folder = Path(folder)
    final = folder / f"update-{update:06d}"
    counters_text = json.dumps(dict(counters), indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    fsync(folder.parent)
    with FileLock(folder.parent / f".{folder.name}.lock"):  # of two writers one waits
        _settle(folder)
        temporary = folder / f"{TEMPORARY}{final.name}"
        try:
            temporary.mkdir()
            save_tensors(temporary / MODEL, model.state_dict() if isinstance(model, nn.Module) else model)
            if isinstance(optimizer, torch.optim.Optimizer):
                optimizer = optimizer.state_dict()
            if optimizer is not None:
                save_pt(temporary / OPTIMIZER, dict(optimizer))
            if tensors is not None:
                save_tensors(temporary / TENSORS, tensors)
            save_pt(temporary / RNG, [dict(state) for state in rng])
            (temporary / COUNTERS).write_text(counters_text, encoding="utf-8")
            write_manifest(temporary, update)
            _publish(temporary, final)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            cause = disk_error(error)
            if cause is not None:
                raise _not_written(final, cause) from error
            raise
        _prune(folder, update, keep, pinned)
    return final


def find_checkpoint(folder: str | Path) -> tuple[Path | None, list[str]]:
    """Find the newest intact checkpoint, reading it whole.

    Returns:
        Its path, or None where there is none; and a sentence about each newer one that is damaged (path and fault), for
        the caller to report. Changes nothing, so every rank may ask.
    """
    faults: list[str] = []
    for _, path in reversed(_checkpoints(Path(folder))):
        fault = checkpoint_fault(path)
        if fault is None:
            return path, faults
        faults.append(f"{path} is damaged and passed over: {fault}")
    return None, faults


def load_checkpoint(
    path: str | Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    map_location: str | torch.device = "cpu",
) -> Checkpoint:
    """Fill the model and the optimizer, and return the rest. Nothing is changed unless everything fits.

    Random state is returned, not set: call `set_rng_state(checkpoint.rng[rank])` last, when the model and the data
    loader are built.

    Args:
        path: a checkpoint's folder.
        model: of the same names, shapes, dtypes and ties; its device is kept. A sharded one (FSDP2) takes its
            shards, and every rank must load.
        optimizer: over the same parameters in the same groups; its options become the saved ones.
        map_location: where the optimizer's file and `tensors` are read to.

    Raises:
        ValueError: the checkpoint is damaged or is not that of this model or optimizer; each with what differs.
    """
    path = Path(path)
    fault = checkpoint_fault(path)
    if fault is not None:
        raise ValueError(f"checkpoint {path} is damaged: {fault}")
    weights, ties = load_tensors(path / MODEL)
    state = model.state_dict(keep_vars=True)
    _check_model(path, state, weights, ties)
    rng = load_pt(path / RNG, "cpu")
    counters = json.loads((path / COUNTERS).read_text(encoding="utf-8"))
    tensors = load_tensors(path / TENSORS)[0] if (path / TENSORS).exists() else {}
    if optimizer is not None:
        _fill_optimizer(optimizer, _load_optimizer(path, optimizer, map_location))
    model.load_state_dict({name: sharded_like(x, state[name]) for name, x in weights.items()})
    return Checkpoint(
        path=path,
        update=json.loads((path / MANIFEST).read_text(encoding="utf-8"))["update"],
        counters=counters,
        rng=rng,
        tensors={name: x.to(map_location, copy=True) for name, x in tensors.items()},
    )


def _publish(temporary: Path, final: Path) -> None:
    fsync(temporary)
    if (
        final.exists()
    ):  # a full folder cannot be renamed over; between the two renames the old one is found by its new name
        os.replace(final, final.with_name(final.name + REPLACED))
    os.replace(temporary, final)
    fsync(final.parent)


def _not_written(final: Path, cause: OSError) -> OSError:
    free = shutil.disk_usage(final.parent).free
    return OSError(
        cause.errno,
        f"checkpoint {final} was not written ({cause.strerror or cause}); {free:,} bytes are free there now that its "
        "partial files are removed, and earlier checkpoints are intact",
    )


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Update and path of all checkpoints, oldest first; a replaced one before the one that replaced it."""
    found = []
    for path in folder.glob("update-*"):
        name = re.fullmatch(rf"update-(\d{{6,}})({re.escape(REPLACED)})?", path.name)
        if name:
            found.append((int(name[1]), name[2] is None, path))
    return [(number, path) for number, _, path in sorted(found)]


def _settle(folder: Path) -> None:
    """Finish what a killed save left: remove temporary folders, give a replaced checkpoint its name back."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"update-*{REPLACED}"):
        final = path.with_name(path.name.removesuffix(REPLACED))
        if final.exists():
            _remove(path)
        else:
            os.replace(path, final)


def _prune(folder: Path, update: int, keep: int, pinned: Collection[int]) -> None:
    numbered = _checkpoints(folder)
    past = sorted({number for number, _ in numbered if number <= update})
    kept = {*past[-keep:], *pinned}
    for number, path in numbered:
        if number not in kept or path.name.endswith(REPLACED):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint whose name is gone first, so that a kill leaves none without its files."""
    trash = path.with_name(TEMPORARY + path.name)
    os.replace(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def _check_model(path: Path, state: Mapping[str, Tensor], saved: Mapping[str, Tensor], ties: dict[str, str]) -> None:
    def kind(x: Tensor) -> str:
        return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"

    faults = [f"{name} is not in the checkpoint" for name in state.keys() - saved.keys()]
    faults += [f"{name} is not in the model" for name in saved.keys() - state.keys()]
    both = state.keys() & saved.keys()
    faults += [
        f"{name} is {kind(saved[name])} in the checkpoint, {kind(state[name])} in the model"
        for name in both
        if kind(saved[name]) != kind(state[name])
    ]
    if not faults and find_ties(state) != ties:
        faults = [f"it ties {ties or 'nothing'}, the model {find_ties(state) or 'nothing'}"]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"checkpoint {path} is not of this model: " + "; ".join(sorted(faults)[:5]) + more)


def _load_optimizer(path: Path, optimizer: torch.optim.Optimizer, map_location: str | torch.device) -> dict[str, Any]:
    if not (path / OPTIMIZER).exists():
        raise ValueError(f"checkpoint {path} holds no optimizer: load it without one, or start the optimizer anew")
    saved: dict[str, Any] = load_pt(path / OPTIMIZER, map_location)
    then = [len(group["params"]) for group in saved["param_groups"]]
    now = [len(group["params"]) for group in optimizer.param_groups]
    if then != now:
        raise ValueError(f"checkpoint {path} is not of this optimizer: its groups hold {then} parameters, not {now}")
    return saved


def _fill_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    optimizer.load_state_dict(saved)
    # torch casts state to its parameter's dtype; float32 state of a bfloat16 parameter has to stay float32
    params = [param for group in optimizer.param_groups for param in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for param, number in zip(params, numbers, strict=True):
        for name, value in saved["state"].get(number, {}).items():
            if isinstance(value, Tensor):
                loaded = optimizer.state[param][name]
                if loaded.dtype != value.dtype:
                    loaded = value.to(loaded.device)
                optimizer.state[param][name] = sharded_like(loaded, param)
