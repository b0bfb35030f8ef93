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

The checksum is CRC-32: it guards against truncation and decay, not against forgery (nothing read here can run code),
and zlib's runs at some 5 GB/s, five times BLAKE2b. A file is summed right after it is written, from the page cache.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from seqba.random_state import rng_state, set_rng_state

__all__ = ["Checkpoint", "find_checkpoint", "load_checkpoint", "rng_state", "save_checkpoint", "set_rng_state"]

MODEL, OPTIMIZER, TENSORS = "model.safetensors", "optimizer.pt", "tensors.safetensors"
RNG, COUNTERS, MANIFEST = "rng.pt", "counters.json", "manifest.json"
TEMPORARY, REPLACED = ".tmp-", ".replaced"


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` returns, besides the model and optimizer that it filled."""

    path: Path
    update: int
    counters: dict[str, Any]
    rng: list[dict[str, Any]]  # of rank 0, 1, ...
    tensors: dict[str, Tensor]


def save_checkpoint(
    folder: str | Path,
    update: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
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
        model: unwrapped, so that its names are those of a run on one rank.
        optimizer: or None where there is none to continue.
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
    _fsync(folder.parent)
    _settle(folder)
    temporary = folder / f"{TEMPORARY}{final.name}"
    try:
        temporary.mkdir()
        _save_tensors(temporary / MODEL, model.state_dict())
        if optimizer is not None:
            _save_pt(temporary / OPTIMIZER, optimizer.state_dict())
        if tensors is not None:
            _save_tensors(temporary / TENSORS, tensors)
        _save_pt(temporary / RNG, [dict(state) for state in rng])
        (temporary / COUNTERS).write_text(counters_text, encoding="utf-8")
        _write_manifest(temporary, update)
        _publish(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        cause = _disk_error(error)
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
        fault = _fault(path)
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
        model: of the same names, shapes, dtypes and ties; its device is kept.
        optimizer: over the same parameters in the same groups; its options become the saved ones.
        map_location: where the optimizer's file and `tensors` are read to.

    Raises:
        ValueError: the checkpoint is damaged or is not that of this model or optimizer; each with what differs.
    """
    path = Path(path)
    fault = _fault(path)
    if fault is not None:
        raise ValueError(f"checkpoint {path} is damaged: {fault}")
    weights, ties = _load_tensors(path / MODEL)
    _check_model(path, model.state_dict(), weights, ties)
    rng = _load_pt(path / RNG, "cpu")
    counters = json.loads((path / COUNTERS).read_text(encoding="utf-8"))
    tensors = _load_tensors(path / TENSORS)[0] if (path / TENSORS).exists() else {}
    if optimizer is not None:
        _fill_optimizer(optimizer, _load_optimizer(path, optimizer, map_location))
    model.load_state_dict(weights)
    return Checkpoint(
        path=path,
        update=json.loads((path / MANIFEST).read_text(encoding="utf-8"))["update"],
        counters=counters,
        rng=rng,
        tensors={name: x.to(map_location, copy=True) for name, x in tensors.items()},
    )


def _save_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors, those that share their memory once; the file's metadata maps the others to it."""
    for name, x in state.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{path.name} holds tensors only, but {name!r} is a {type(x).__name__}")
    ties = _ties(state)
    save_file({name: x.contiguous() for name, x in state.items() if name not in ties}, path, metadata=ties)


def _ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> the first name with the same memory, for every tensor but the first of its memory."""
    first: dict[object, str] = {}
    ties = {}
    for name, x in state.items():
        if x.numel():
            owner = first.setdefault((x.device, x.data_ptr(), x.dtype, x.shape, x.stride()), name)
            if owner != name:
                ties[name] = owner
    return ties


def _save_pt(path: Path, state: object) -> None:
    with path.open("wb") as file:  # a file of Python's, so that a full disk is an OSError
        torch.save(state, file)
    try:
        torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # reads structure, not tensors
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path.name} could not be read back without unpickling: make its values tensors, numbers, strings, "
            "lists and dicts (a numpy number as learning rate becomes a float)"
        ) from error


def _seal(path: Path) -> dict[str, int]:
    """Flush a file to the disk; return its manifest entry."""
    _fsync(path)
    return {"bytes": path.stat().st_size, "crc32": _crc32(path)}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _manifest_text(update: int, files: Mapping[str, Mapping[str, int]]) -> str:
    """The manifest's one spelling, with a checksum of itself: any other text is damage."""
    manifest: dict[str, Any] = {"format": 1, "update": update, "files": files}
    manifest["crc32"] = zlib.crc32(json.dumps(manifest).encode())
    return json.dumps(manifest, indent=1)


def _write_manifest(folder: Path, update: int) -> None:
    files = {path.name: _seal(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(_manifest_text(update, files), encoding="utf-8")
    _fsync(folder / MANIFEST)


def _publish(temporary: Path, final: Path) -> None:
    _fsync(temporary)
    if (
        final.exists()
    ):  # a full folder cannot be renamed over; between the two renames the old one is found by its new name
        os.replace(final, final.with_name(final.name + REPLACED))
    os.replace(temporary, final)
    _fsync(final.parent)


def _disk_error(error: BaseException) -> OSError | None:
    """Return the OSError behind what a writer raised: torch and safetensors hide it in their own."""
    if isinstance(error, SafetensorError):
        found = re.search(r"\(os error (\d+)\)", str(error))
        return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None
    cause: BaseException | None = error if isinstance(error, OSError | RuntimeError) else None
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause


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


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        if text != _manifest_text(manifest["update"], manifest["files"]):
            return f"{MANIFEST} was changed after it was written"
        missing = {MODEL, RNG, COUNTERS} - manifest["files"].keys()
        if missing:
            return f"{MANIFEST} does not list {', '.join(sorted(missing))}"
        faults = (_file_fault(path / name, entry) for name, entry in manifest["files"].items())
        return next((fault for fault in faults if fault), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"


def _file_fault(path: Path, entry: Mapping[str, int]) -> str | None:
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{path.name} has {size} bytes, {entry['bytes']} were written"
    return None if _crc32(path) == entry["crc32"] else f"{path.name} has another checksum than when it was written"


def _load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors by name, tied ones under each name, and the ties."""
    with safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        ties = dict(file.metadata() or {})
    return tensors | {name: tensors[owner] for name, owner in ties.items()}, ties


def _load_pt(path: Path, map_location: str | torch.device) -> Any:
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is refused: it is not a file of tensors and plain values") from error


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
    if not faults and _ties(state) != ties:
        faults = [f"it ties {ties or 'nothing'}, the model {_ties(state) or 'nothing'}"]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(f"checkpoint {path} is not of this model: " + "; ".join(sorted(faults)[:5]) + more)


def _load_optimizer(path: Path, optimizer: torch.optim.Optimizer, map_location: str | torch.device) -> dict[str, Any]:
    if not (path / OPTIMIZER).exists():
        raise ValueError(f"checkpoint {path} holds no optimizer: load it without one, or start the optimizer anew")
    saved: dict[str, Any] = _load_pt(path / OPTIMIZER, map_location)
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
                optimizer.state[param][name] = loaded if loaded.dtype == value.dtype else value.to(loaded.device)
