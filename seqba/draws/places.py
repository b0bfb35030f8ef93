"""Where in a model a number is drawn: in which call of which module, and as the how-manieth of its kind there."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn


class Place(NamedTuple):
    """A draw of a pass: the call of a module (numbered by `Places`), the operation, how many came before it there."""

    call: int
    operation: str
    nth: int


@dataclass
class _Call:
    number: int
    calls: Counter[str] = field(default_factory=Counter)
    draws: Counter[str] = field(default_factory=Counter)


class Places:
    """Names the places of a model's draws, alike in every pass: layers that are skipped do not move those behind them.

    Args:
        model: whose modules are told apart.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: path or type(module).__name__ for path, module in model.named_modules()}
        self._numbers: dict[tuple[int, str, int], int] = {}
        self._modules: dict[int, str] = {0: "the pass outside of modules"}
        self._stack = [_Call(0)]

    def module(self, call: int) -> str:
        """The path of the module that a call is of."""
        return self._modules[call]

    @property
    def running(self) -> str:
        """The path of the innermost module that runs."""
        return self._modules[self._stack[-1].number]

    def next(self, operation: str) -> Place:
        """The place of the draw that is about to be made."""
        call = self._stack[-1]
        place = Place(call.number, operation, call.draws[operation])
        call.draws[operation] += 1
        return place

    @contextmanager
    def followed(
        self, on_call: Callable[[int, Counter[str], Any], None] = lambda call, draws, output: None
    ) -> Iterator[Places]:
        """Follow the calls of all modules for the time of a pass.

        Args:
            on_call: told, when a module returns: the call, how often it drew itself, its output.
                The whole pass is call 0, told last.
        """
        self._stack = [_Call(0)]
        handled = sys.exc_info()[1]

        def enter(module: nn.Module, args: Any) -> None:
            outer, name = self._stack[-1], self._names[module]
            key = (outer.number, name, outer.calls[name])
            outer.calls[name] += 1
            number = self._numbers.setdefault(key, len(self._numbers) + 1)
            self._modules[number] = name
            self._stack.append(_Call(number))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            call = self._stack.pop()
            if sys.exc_info()[1] is handled:  # else the module has raised
                on_call(call.number, call.draws, output)

        handles: list[Any] = []
        for module in self._names:
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks; what it draws is its caller's
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield self
            on_call(0, self._stack[0].draws, None)
        finally:
            for handle in handles:
                handle.remove()


def in_backward() -> bool:
    """Whether a backward pass runs here, in which gradient checkpointing calls modules once more."""
    return torch._C._current_graph_task_id() != -1
