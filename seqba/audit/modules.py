"""Which module of a model is running."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

HOSTS = ("Python's random", "numpy.random")

# key (624 words) and position of a Mersenne Twister, the generator of both
_Twister = tuple[npt.NDArray[np.uint32], int]


class RunningModules:
    """Follows the calls of a model's modules: `path` and `module` are those of the innermost one that runs.

    Between two calls it looks whether Python's or numpy's generator moved, which no interception of torch shows.

    Args:
        model: whose modules.
        watch_hosts: whether to look at those generators.

    Attributes:
        called: the paths that have run.
        host_draws: for (path, generator), how many 32-bit words the module itself drew and in how many places
            between its calls of other modules.
    """

    def __init__(self, model: nn.Module, *, watch_hosts: bool = True) -> None:
        self.model = model
        self.watch_hosts = watch_hosts
        self.called: set[str] = set()
        self.host_draws: dict[tuple[str, str], tuple[int, int]] = {}
        self._stack: list[tuple[str, nn.Module]] = [("", model)]
        self._hosts = _host_states()

    @property
    def path(self) -> str:
        """The dotted path of the innermost running module; empty for the model itself."""
        return self._stack[-1][0]

    @property
    def module(self) -> nn.Module:
        """The innermost running module."""
        return self._stack[-1][1]

    @contextmanager
    def followed(self) -> Iterator["RunningModules"]:
        """Hooks on every module for the time of the block."""
        handles: list[Any] = []
        self._hosts = _host_states()
        try:
            for path, module in self.model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # takes no hooks; what it draws is its caller's
                handles.append(module.register_forward_pre_hook(self._enter(path)))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
            yield self
            self._look_at_hosts()
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._look_at_hosts()
            self.called.add(path)
            self._stack.append((path, module))

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._look_at_hosts()
        self._stack.pop()

    def _look_at_hosts(self) -> None:
        if not self.watch_hosts:
            return
        now = _host_states()
        for name, before, after in zip(HOSTS, self._hosts, now, strict=True):
            if before != after:
                words, places = self.host_draws.get((self.path, name), (0, 0))
                drawn = words_between(_twister(before), _twister(after))
                self.host_draws[self.path, name] = (words + drawn, places + 1)
        self._hosts = now


def words_between(before: _Twister, after: _Twister, *, limit: int = 1_000) -> int:
    """How many 32-bit words a Mersenne Twister gave between two states; 0 where they are `limit` * 624 apart or more.

    >>> a = random.Random(1)
    >>> start = a.getstate()[1]
    >>> _ = a.getrandbits(32 * 700)
    >>> words_between(_twister(start), _twister(a.getstate()[1]))
    700
    """
    (key, position), (last_key, last_position) = before, after
    generator = np.random.RandomState()
    generator.set_state(("MT19937", key, position, 0, 0.0))
    words = (last_position - position) % len(key)
    generator.bytes(4 * words)
    for _ in range(limit):
        if np.array_equal(generator.get_state(legacy=False)["state"]["key"], last_key):
            return words
        generator.bytes(4 * len(key))
        words += len(key)
    return 0


def _host_states() -> tuple[tuple, tuple]:
    """States that compare quickly: Python's words and position, numpy's as bytes and a position."""
    state: Any = np.random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        return random.getstate()[1], ()
    return random.getstate()[1], (state["state"]["key"].tobytes(), int(state["state"]["pos"]))


def _twister(state: tuple) -> _Twister:
    if len(state) == 2:
        return np.frombuffer(state[0], dtype=np.uint32), state[1]
    return np.array(state[:-1], dtype=np.uint32), state[-1]
