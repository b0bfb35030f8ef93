"""Random numbers that are a function of a key, row by row, on any device."""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio; as all constants here, a signed int64
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def keyed_uniform(keys: Tensor, count: int) -> Tensor:
    """Draw `count` numbers from U[0, 1) for each key: they depend on the key alone, and are the same on every device.

    SplitMix64 (Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators"), started from a hash of the key.

    Args:
        keys: (N, k) int64, such as (seed, epoch, sample, copy) of each row.
        count: numbers for each key.

    Returns:
        (N, count), float32 in steps of 2^-24, on the device of `keys`.

    Raises:
        ValueError: `keys` is no int64 tensor of two axes.

    >>> keys = torch.tensor([[0, 7], [0, 8]])
    >>> torch.equal(keyed_uniform(keys, 3)[1:], keyed_uniform(keys[1:], 5)[:, :3])
    True
    """
    if keys.dtype != torch.int64 or keys.ndim != 2:
        raise ValueError(f"keys must be int64 of shape (N, k), got {keys.dtype} of shape {tuple(keys.shape)}")
    state = torch.full_like(keys[:, 0], keys.shape[1])
    for column in keys.unbind(1):
        state = _mix(state + _GOLDEN ^ column)
    steps = torch.arange(1, count + 1, device=keys.device) * _GOLDEN
    return _shifted(_mix(state[:, None] + steps), 40).float() * 2**-24


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left, which `>>` of a signed number does not give."""
    return (x >> bits) & ((1 << 64 - bits) - 1)
