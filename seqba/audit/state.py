"""Restores a model after a look at it: modes, buffers and every generator."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from seqba.snapshot import model_snapshot


class OwnGenerators:
    """Generators that a model passes to its random operations itself, with their states when first met."""

    def __init__(self) -> None:
        self._states: dict[torch.Generator, torch.Tensor] = {}

    def meet(self, generator: torch.Generator | None) -> None:
        """Remember the state of a generator that is about to draw."""
        if generator is not None and generator not in self._states:
            self._states[generator] = generator.get_state()

    def restore(self) -> None:
        """Put all of them back."""
        for generator, state in self._states.items():
            generator.set_state(state)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[OwnGenerators]:
    """Train mode without gradients inside; modes, buffers (running statistics) and generators as before after it.

    A model in training mode keeps its submodules' modes (a frozen one stays in eval mode); one in eval mode is told
    `model.train()`, as a training loop does. Compiled models run their own Python code.
    """
    own, restore = OwnGenerators(), model_snapshot(model)
    if not model.training:
        model.train()
    try:
        with ExitStack() as stack:
            if any(is_compiled(module) for module in model.modules()):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.no_grad())
            # gradient checkpointing expects gradients, and warns without
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
            yield own
    finally:
        restore()
        own.restore()


def bare(model: nn.Module) -> nn.Module:
    """The module inside the wrappers of data parallelism and `torch.compile`."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        inner: Any = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", model)
        if inner is model:
            return model
        model = inner


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of this very module run compiled code."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
