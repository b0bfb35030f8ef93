"""The files of one checkpoint: written, sealed with checksums, verified, and read back without unpickling.

The checksum is CRC-32: it guards against truncation and decay, not against forgery (nothing read here can run code),
and zlib's runs at some 5 GB/s, five times BLAKE2b. A file is summed right after it is written, from the page cache.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

MODEL, OPTIMIZER, TENSORS = "model.safetensors", "optimizer.pt", "tensors.safetensors"
RNG, COUNTERS, MANIFEST = "rng.pt", "counters.json", "manifest.json"


def save_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors, those that share their memory once; the file's metadata maps the others to it."""
    for name, x in state.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{path.name} holds tensors only, but {name!r} is a {type(x).__name__}")
    ties = find_ties(state)
    save_file({name: _alone(x) for name, x in state.items() if name not in ties}, path, metadata=ties)
    follow_umask(path)


def _alone(x: Tensor) -> Tensor:
    """A tensor without other tensors in its memory: a slice of one is copied."""
    x = x.contiguous()
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()


def follow_umask(*files: Path) -> None:
    """Give files the mode that the umask allows: safetensors makes its own readable by their owner alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    for file in files:
        file.chmod(0o666 & ~umask)


def find_ties(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> the first name with the same memory, for every tensor but the first of its memory."""
    first: dict[object, str] = {}
    ties = {}
    for name, x in state.items():
        if x.numel():
            # a sharded parameter may have no memory on this rank: it is known by being the same object
            memory = id(x) if isinstance(x, DTensor) else (x.device, x.data_ptr(), x.dtype, x.shape, x.stride())
            owner = first.setdefault(memory, name)
            if owner != name:
                ties[name] = owner
    return ties


def save_pt(path: Path, state: object) -> None:
    """Write what `load_pt` reads, and make sure that it can be read without unpickling."""
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
    fsync(path)
    return {"bytes": path.stat().st_size, "crc32": _crc32(path)}


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
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


def write_manifest(folder: Path, update: int = 0) -> None:
    """Seal every file of a folder, such as a checkpoint's; the last file to be written."""
    files = {path.name: _seal(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(_manifest_text(update, files), encoding="utf-8")
    fsync(folder / MANIFEST)


def disk_error(error: BaseException) -> OSError | None:
    """The OSError behind what a writer raised, or None: torch and safetensors hide it in their own."""
    if isinstance(error, SafetensorError):
        found = re.search(r"\(os error (\d+)\)", str(error))
        return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None
    cause: BaseException | None = error if isinstance(error, OSError | RuntimeError) else None
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause


def checkpoint_fault(path: Path) -> str | None:
    """The damage of a checkpoint in words, or None; every file is read."""
    return manifest_fault(path, {MODEL, RNG, COUNTERS})


def manifest_fault(path: Path, needed: Collection[str] = ()) -> str | None:
    """The damage of a folder that `write_manifest` sealed, in words, or None; every file is read."""
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        if text != _manifest_text(manifest["update"], manifest["files"]):
            return f"{MANIFEST} was changed after it was written"
        missing = set(needed) - manifest["files"].keys()
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


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors by name, tied ones under each name, and the ties."""
    with safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        ties = dict(file.metadata() or {})
    return tensors | {name: tensors[owner] for name, owner in ties.items()}, ties


def load_pt(path: Path, map_location: str | torch.device) -> Any:
    """Read tensors and plain values; a file that would need unpickling is refused with a ValueError."""
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is refused: it is not a file of tensors and plain values") from error
