"""Random state of a process: as tensors and numbers, which a checkpoint keeps of every rank, and from a key."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_MASK_64 = (1 << 64) - 1


def rng_state() -> dict[str, Any]:
    """Return this process's random state: Python, numpy (global), torch on CPU and on every CUDA device.

    Made of tensors and numbers only, so that `torch.load(weights_only=True)` reads it. `set_rng_state` undoes it.
    """
    version, words, gauss = random.getstate()
    state = np.random.get_state(legacy=False)
    if not isinstance(state, dict) or state["bit_generator"] != "MT19937":
        raise ValueError("numpy's global generator must be its default, MT19937, to be saved")
    return {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "key": torch.from_numpy(state["state"]["key"].astype(np.int64)),
            "pos": int(state["state"]["pos"]),
            "has_gauss": int(state["has_gauss"]),
            "gauss": float(state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Set this process's random state to what `rng_state` returned.

    Raises:
        ValueError: the state is of another number of CUDA devices than this process sees. A state without any (`cuda`
            empty) leaves the devices' as they are.
    """
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if state["cuda"] and len(state["cuda"]) != devices:
        raise ValueError(
            f"the random state is of {len(state['cuda'])} CUDA devices, but {devices} are visible: resume on as many, "
            "or give up exactness there and pass {**state, 'cuda': []}"
        )
    python, numpy = state["python"], state["numpy"]
    mt19937 = {"key": numpy["key"].numpy().astype(np.uint32), "pos": numpy["pos"]}
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(
        {"bit_generator": "MT19937", "state": mt19937, "has_gauss": numpy["has_gauss"], "gauss": numpy["gauss"]}
    )
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def keyed_generators(*key: int) -> Iterator[None]:
    """Seed torch on CPU, Python and numpy (global) from the integers of `key`, and put all three back on leaving.

    What a block draws is then a function of its key alone, whichever process runs it. Takes about 0.1 ms. Libraries
    with generators of their own (SentencePiece's sampling) are not reached.

    >>> with keyed_generators(0, 7, 1):
    ...     first = random.random(), np.random.rand(), torch.rand(()).item()
    >>> with keyed_generators(0, 7, 1):
    ...     first == (random.random(), np.random.rand(), torch.rand(()).item())
    True
    """
    torch_state, python, numpy = torch.default_generator.get_state(), random.getstate(), np.random.get_state()
    seed = mix(*key)
    torch.default_generator.manual_seed(seed)  # keeps the low 32 bits
    random.seed(seed)
    np.random.seed(seed >> 32)  # not torch's bits: both are MT19937, and would draw the same
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def seeded_generators(*key: int) -> Iterator[None]:
    """As `keyed_generators`, with those of all devices: for a pass of a network that draws without streams.

    Ranks that begin with one seed, or whose generators are made equal at every epoch, draw what their keys say.
    """
    before, seed = rng_state(), mix(*key)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed >> 32)
    try:
        yield
    finally:
        set_rng_state(before)


def mix(*numbers: int) -> int:
    """Hash integers to 64 well-spread bits (SplitMix64's finaliser, Steele et al. 2014, after each number).

    torch's CPU generator keeps the low 32 of a seed's bits, its CUDA generator all.

    >>> mix(1, 2) == mix(1, 2), mix(1, 2) == mix(2, 1)
    (True, False)
    """
    state = 0
    for number in numbers:
        state = (state + (number & _MASK_64) + 0x9E3779B97F4A7C15) & _MASK_64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK_64
        state ^= state >> 31
    return state
