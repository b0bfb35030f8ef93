"""Random state of a process, as tensors and numbers: what a checkpoint keeps of every rank."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


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
        {
            "bit_generator": "MT19937",
            "state": mt19937,
            "has_gauss": numpy["has_gauss"],
            "gauss": numpy["gauss"],
        }
    )
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
