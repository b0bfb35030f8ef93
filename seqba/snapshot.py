"""Saves and restores what a pass changes of a model besides its gradients."""

from collections.abc import Callable

import torch
from torch import nn

from seqba.draws.generators import rng_state, set_rng_state


def model_snapshot(model: nn.Module) -> Callable[[], None]:
    """Remember modes, buffers (running statistics) and generators; the function returned puts them back each time."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, dict(module._buffers.items())) for module in model.modules()]
    values = {buffer: buffer.clone() for _, named in buffers for buffer in named.values() if buffer is not None}
    generators = rng_state()
    syncs_buffers = getattr(model, "require_forward_param_sync", None)

    @torch.no_grad()
    def restore() -> None:
        for module, training in modes:
            module.training = training
        for module, named in buffers:
            for name in [name for name, _ in module._buffers.items() if name not in named]:
                del module._buffers[name]
            for name, buffer in named.items():
                if module._buffers[name] is not buffer:
                    module._buffers[name] = buffer
        for buffer, value in values.items():
            if buffer.shape != value.shape:  # resized in place
                buffer.data = value.clone()
            elif not torch.equal(buffer, value):
                buffer.copy_(value)
        set_rng_state(generators)
        if syncs_buffers is not None:
            # DDP broadcasts buffers in the first forward pass of an update: a rank that failed in it must
            # do so again together with those that did not
            model.require_forward_param_sync = syncs_buffers

    return restore
