"""Monte Carlo dropout in a search: every step takes the mean of N dropout masks' next-token distributions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from seqba.repeat import fold, repeat_batch, unfold
from tasks.decoding.skip_finished import PER_ROW


@contextmanager
def averaged_over_masks(model: PreTrainedModel, num_masks: int) -> Iterator[None]:
    """While it is entered, `model.generate` searches under the mean of N dropout masks' distributions.

        p(y_t | y_<t, x) = 1/N * sum_n p_n(y_t | y_<t, x)

    (Gal and Ghahramani 2016, "Dropout as a Bayesian Approximation"), the sequence twin of test-time augmentation.
    Probabilities are averaged, not their logarithms. Encoder and decoder run N copies of every beam with dropout on,
    all N behind the same prefix; the search sees one distribution, which it adds up, ranks and penalises as any other.

    A copy's masks for a position are drawn when the position is decoded, and stay: its keys and values are kept in
    the cache. Along a translation a copy is therefore one draw of the whole network as it was trained, with masks for
    every position. Two beams that part have masks of their own from there on. LayerDrop stays off, as a layer that is
    skipped at one position would have no keys for it at the next.

    Give `generate` of an encoder-decoder a `BeamCache(model.config, num_copies=num_masks)` as its cache. Draws come
    from torch's global generator.

    Raises:
        ValueError: `num_masks` is below 1.
    """
    if num_masks < 1:
        raise ValueError(f"num_masks must be at least 1, got {num_masks}")
    copies = _Copies(num_masks)
    encoder = model.get_encoder()
    hooks = (
        encoder.register_forward_pre_hook(copies.repeat_sources, with_kwargs=True),
        encoder.register_forward_hook(copies.pack_states),
        model.register_forward_pre_hook(copies.repeat_beams, with_kwargs=True),
        model.register_forward_hook(copies.average),
    )
    try:
        with dropout_on(model):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def dropout_on(model: nn.Module) -> Iterator[None]:
    """Training mode without LayerDrop, for as long as it is entered."""
    was_training = {module: module.training for module in model.modules()}
    layerdrop: dict[Any, Any] = {module: module.layerdrop for module in model.modules() if hasattr(module, "layerdrop")}
    try:
        model.train()
        for module in layerdrop:
            module.layerdrop = 0.0
        yield
    finally:
        for module, probability in layerdrop.items():
            module.layerdrop = probability
        for module, mode in was_training.items():
            module.training = mode


@torch.inference_mode()
def has_dropout(model: PreTrainedModel) -> bool:
    """Whether equal rows come out different in training mode: without that, N masks are N times the same.

    The generators stay as they were.
    """
    device = next(model.parameters()).device
    rows = torch.ones(2, 32, dtype=torch.int64, device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), dropout_on(model):
        first, second = model(input_ids=rows, decoder_input_ids=rows).logits
    return not torch.equal(first, second)


class _Copies:
    """The hooks around the encoder and the model; R rows are beams, N*R their copies, copy-major."""

    def __init__(self, num_masks: int) -> None:
        self.num_masks = num_masks
        self._packed: Tensor | None = None
        self._unpacked: Tensor | None = None

    def repeat_sources(self, encoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """`input_ids`, `attention_mask` (B, S) -> (N*B, S)."""
        return args, repeat_batch(kwargs, self.num_masks)

    def pack_states(self, encoder: nn.Module, args: tuple, output: Any) -> Any:
        """Encoder states (N*B, S, D) -> (B, N, S, D): `generate` then repeats sentences by beam, copies and all."""
        output.last_hidden_state = unfold(output.last_hidden_state, self.num_masks).transpose(0, 1)
        return output

    def repeat_beams(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Decoder inputs (R, ...) -> (N*R, ...), and encoder states (R, N, S, D) -> (N*R, S, D)."""
        rows = {name: kwargs[name] for name in PER_ROW if kwargs.get(name) is not None}
        states = type(kwargs["encoder_outputs"])(last_hidden_state=self._unpack(kwargs["encoder_outputs"][0]))
        return args, kwargs | repeat_batch(rows, self.num_masks, num_samples=len(rows["decoder_input_ids"])) | {
            "encoder_outputs": states
        }

    def average(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """Logits (N*R, T, V) -> (R, T, V), the logarithms of the mean probabilities."""
        log_probabilities = unfold(output.logits, self.num_masks).float().log_softmax(dim=-1)
        output.logits = log_probabilities.logsumexp(dim=0) - math.log(self.num_masks)
        return output

    def _unpack(self, packed: Tensor) -> Tensor:
        """All steps of a search share one tensor of states: it is laid out once."""
        if packed is not self._packed:
            self._packed, self._unpacked = packed, fold(packed.transpose(0, 1))
        assert self._unpacked is not None
        return self._unpacked
