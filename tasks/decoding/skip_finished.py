"""Beam search that no longer computes sentences whose result is settled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.decoding.beam_cache import CACHE

PER_ROW = ("decoder_input_ids", "attention_mask", "decoder_attention_mask")  # what `forward` is given a row each

_WORTHWHILE = 0.8  # rows are dropped, which copies the cache, once at most this share of them is still searched
_SETTLED = "_check_early_stop_heuristic"  # where transformers' beam search decides it


@contextmanager
def skip_finished(model: PreTrainedModel) -> Iterator[None]:
    """While it is entered, `model.generate` with beams runs the network only on sentences that can still change.

    A batch is searched until its last sentence is settled. A sentence is settled once none of its running beams can
    overtake its finished ones; transformers then accepts no more of its beams, and whatever the network would say about
    them has no effect. Their rows leave the batch and the cache here, and the search gets zeros for their logits; the
    translations are the same.

    Give `generate` of an encoder-decoder a `BeamCache` as its cache. Where a version of transformers decides elsewhere,
    or the search is greedy, nothing is skipped.
    """
    settled: Callable[..., Tensor] | None = getattr(model, _SETTLED, None)
    if settled is None:
        yield
        return
    rows = _Rows(settled)
    hooks = (
        model.register_forward_pre_hook(rows.leave_out, with_kwargs=True, prepend=True),
        model.register_forward_hook(rows.fill_in),
    )
    try:
        setattr(model, _SETTLED, rows.watch)
        yield
    finally:
        delattr(model, _SETTLED)
        for hook in hooks:
            hook.remove()


class _Rows:
    """The hooks around the model: R rows, the beams of all B sentences, of which the kept ones are computed."""

    def __init__(self, settled: Callable[..., Tensor]) -> None:
        self._settled = settled
        self._open: Tensor | None = None  # (B,), sentences that can still change
        self._kept: Tensor | None = None  # rows, ascending; None keeps all
        self._states: Any = None  # encoder states of the kept rows
        self._num_rows = 0

    def watch(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the search asks, passed on; the answer says which sentences can still improve, (B, 1)."""
        improvable = self._settled(*args, **kwargs)
        self._open = improvable.flatten()
        return improvable

    def leave_out(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Inputs (R, ...) -> (kept, ...)."""
        cache = kwargs[CACHE]
        self._num_rows = len(kwargs["decoder_input_ids"])
        if cache.get_seq_length() == 0:  # a new search
            self._open = self._kept = None
        elif self._open is not None and self._is_worthwhile(self._open):
            beams = self._num_rows // len(self._open)
            self._kept = self._open.repeat_interleave(beams).nonzero().flatten()
            cache.keep(self._kept)
            states = kwargs["encoder_outputs"]
            self._states = type(states)(last_hidden_state=states[0][self._kept])
        if self._kept is None:
            return args, kwargs
        rows = {name: kwargs[name][self._kept] for name in PER_ROW if kwargs.get(name) is not None}
        return args, kwargs | rows | {"encoder_outputs": self._states}

    def fill_in(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """Logits (kept, T, V) -> (R, T, V)."""
        if self._kept is not None:
            logits = output.logits.new_zeros(self._num_rows, *output.logits.shape[1:])
            output.logits = logits.index_copy_(0, self._kept, output.logits)
        return output

    def _is_worthwhile(self, still_open: Tensor) -> bool:
        computed = self._num_rows if self._kept is None else len(self._kept)
        needed = int(still_open.sum()) * (self._num_rows // len(still_open))
        return 0 < needed <= _WORTHWHILE * computed
