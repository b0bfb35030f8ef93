"""Per-copy random streams, for models nobody rewrote.

A copy's randomness comes from (seed, update, shard, copy), never from who computed it: fused in one pass,
accumulated over several, or spread over ranks, copy 3 of an update meets the same dropout masks.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from seqba.context import copies_of_pass, draws_are_shared
from seqba.draws.generators import mix
from seqba.draws.measured import SHARED, DrawAxes, Look, can_be_cut
from seqba.draws.operations import CUDNN_RNN, FUSED_ATTENTION, RandomCall, RandomOps
from seqba.draws.places import in_backward
from seqba.errors import StreamError


@dataclass(frozen=True)
class _Entry:
    """The states of the generators that are restored on leaving, and those that must not have changed."""

    torch_state: torch.Tensor
    python_state: Any
    numpy_state: Any
    cuda_state: torch.Tensor | None

    @classmethod
    def now(cls) -> "_Entry":
        return cls(
            torch.default_generator.get_state(),
            random.getstate(),
            np.random.get_state(),
            torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        )


@contextmanager
def copy_streams(
    copies: Sequence[int],
    *,
    seed: int,
    update: int,
    shard: int = 0,
    batch: int = 0,
    num_samples: int | None = None,
    axes: DrawAxes | None = None,
) -> Iterator[None]:
    """Draw every random number of the pass inside from the stream of the copy whose rows it is for.

    For any model, unmodified. On entry torch's CPU generator is seeded from (seed, update, shard). Each random
    operation takes one key from it, and draws its block of rows for copy m from a stream derived from (key, m).
    So the masks of a copy do not depend on which copies share its pass. Gradient checkpointing replays the
    generator, hence the keys, hence the masks. **Run the backward pass inside the block too**: outside of it
    a checkpointed model would be recomputed under other masks.

    Which rows are a copy's is measured (`axes`, of `measure_draws`; `TrainStep` and the Trainers do so themselves): a
    draw that does not grow with the copies is one for all of them and all passes, from the key without the copy.
    Without `axes` the rows are taken to be on the first axis, and a draw of shape () to be shared (LayerDrop). A draw
    inside `shared_draws()` is shared. All generators are as before on leaving.

    Args:
        copies: the copies in the pass, in the order of their blocks of rows: (0, 1, 2, 3) for a fused M=4,
            (2,) for one pass of an accumulated update.
        seed, update: any integers; the run's seed and the number of the update.
        shard: the index of the B-sample batch inside the update: ranks (or groups of ranks) times accumulation.
        batch: its index among this rank's own, which draws nothing: `current_batch()` says it.
        num_samples: B, without `axes`: a draw must then have len(copies) or len(copies) * B rows, and no other axis of
            that size, which could be the one. Without it too, the caller vouches that every draw has its rows in front.
        axes: what is known of the model's draws.

    Raises:
        StreamError: an operation whose draws cannot be told apart by copy, by name, with what to do: rows that are
            no multiple of the copies, `torch.randperm`, a generator of the model's own, dropout inside a fused
            attention kernel or cuDNN's recurrent networks, recurrent dropout over a `PackedSequence`; and on leaving,
            numbers that numpy, Python or a kernel outside of torch's operations drew meanwhile. With `axes`, an
            `UnmeasuredError`: a draw that is not among them.
        ValueError: no copies, a copy twice or below 0, or `num_samples` below 1.

    >>> x = torch.ones(2, 8)
    >>> with copy_streams((0, 1), seed=1, update=5):
    ...     fused = torch.dropout(torch.cat([x, x]), 0.5, True)
    >>> with copy_streams((1,), seed=1, update=5):
    ...     alone = torch.dropout(x, 0.5, True)
    >>> torch.equal(fused[2:], alone), torch.equal(fused[:2], alone)
    (True, False)
    """
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples must be at least 1 where it is given, got {num_samples}")
    streams = CopyStreams(tuple(copies), num_samples, axes)
    with ExitStack() as stack:
        if axes is not None:
            stack.enter_context(axes.places.followed(axes.check_call))
        stack.enter_context(copies_of_pass(copies, batch=batch))
        stack.enter_context(seeded_streams(streams, seed=seed, update=update, shard=shard))
        yield


@contextmanager
def seeded_streams(streams: "CopyStreams", *, seed: int, update: int, shard: int) -> Iterator[None]:
    """A block whose draws `streams` makes, from keys of (seed, update, shard)."""
    with ExitStack() as stack:
        if torch.cuda.is_available():
            # the fused kernels draw inside; the math backend's dropout is an operation that can be cut into rows
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        entry = _Entry.now()
        torch.default_generator.manual_seed(mix(seed, update, shard))
        try:
            with streams:
                yield
        finally:
            torch.default_generator.set_state(entry.torch_state)
        _refuse_other_generators(entry)


class CopyStreams(RandomOps):
    """Cuts every draw into the blocks of the copies, and draws each from its copy's stream of torch's next key.

    What `copy_streams` enters, without the seeding of the default generator and the look at other generators.

    Args:
        copies: in the order of their blocks of rows.
        num_samples: B, where known.
        axes: says the axis of each draw.
    """

    def __init__(
        self, copies: tuple[int, ...], num_samples: int | None = None, axes: DrawAxes | Look | None = None
    ) -> None:
        super().__init__()
        self.copies, self.num_samples, self.axes = copies, num_samples, axes
        self.generators: dict[torch.device, torch.Generator] = {}
        self._by_key: dict[int, int] = {}  # the axis of each draw of the forward pass

    def on_draw(self, call: RandomCall) -> Any:
        """Draw a call in blocks, or once where it is one for all copies."""
        if call.kind in (FUSED_ATTENTION, CUDNN_RNN):
            if not call.drops_out:
                return call.run()
            raise StreamError(_fused_refusal(call))
        if call.is_nested:
            raise StreamError(
                f"{call.name} draws over a nested tensor, whose rows have no axis to be cut along; pad it, or train "
                "without reproducible copies"
            )
        key = _next_key()
        if call.own_generator() is not None:
            raise StreamError(
                f"{call.name} draws from a generator that the model passes itself, so its copies cannot have streams "
                "of their own; let it use torch's default generator, or train without reproducible copies"
            )
        axis = SHARED if draws_are_shared() else self.axis_of(call, key)
        if axis != SHARED:
            return self.draw_blocks(replace(call, row_dim=axis), key)
        if call.shape == () or not can_be_cut(call):
            return self.draw(call, mix(key, SHARED))
        return self.draw_blocks(replace(call, row_dim=0), key, (SHARED,))

    def axis_of(self, call: RandomCall, key: int) -> int:
        """The axis of the copies' rows, or SHARED; in a backward pass by the key, which checkpointing meets again."""
        if self.axes is not None:
            if not in_backward():
                self._by_key[key] = self.axes.axis(call)
            elif key not in self._by_key:
                raise StreamError(
                    f"{call.name} draws in the backward pass and not in the forward pass, where its numbers could be "
                    "told apart by copy; train without reproducible copies"
                )
            return self._by_key[key]
        if not (can_be_cut(call) or call.packed):
            raise StreamError(
                f"{call.name} has no rows that belong to copies (or is not known to seqba); if one draw is meant for "
                "all copies, wrap it in `with seqba.shared_draws():`, else train without reproducible copies"
            )
        return call.row_dim if call.shape else SHARED

    def draw_blocks(self, call: RandomCall, key: int, copies: tuple[int, ...] | None = None) -> Any:
        """One block of rows after the other, each from its own copy's stream; `copies` by default those of the pass.

        Blocks are drawn contiguous, one copy alone too: kernels fill other layouts in another order.
        """
        copies = self.copies if copies is None else copies
        rows = call.shape[call.row_dim] if len(copies) == 1 else self.rows_of_a_copy(call)
        results = []
        for block, copy in enumerate(copies):
            start = block * rows
            part = call.rows(start, start + rows)
            results.append(self.draw(part, mix(key, copy)))
            call.write_back(part, start)
        if any(argument.alias_info is not None for argument in call.func._schema.arguments[:1]):
            return call.args[0]
        if len(results) == 1:
            return results[0]
        if isinstance(results[0], torch.Tensor):
            return torch.cat(results, dim=call.row_dim)
        return tuple(torch.cat(parts, dim=call.row_dim) for parts in zip(*results, strict=True))

    def rows_of_a_copy(self, call: RandomCall) -> int:
        """How many rows of a draw are one copy's."""
        size = call.shape[call.row_dim] if len(call.shape) > call.row_dim else 0
        num_copies, guessed = len(self.copies), self.axes is None
        unit = num_copies * (self.num_samples or 1)
        if call.packed or size == 0 or size % num_copies or (guessed and size != num_copies and size % unit):
            samples = f" of {self.num_samples} samples" if self.num_samples else ""
            packed = ", over a PackedSequence whose rows are interleaved in time" if call.packed else ""
            module = "" if self.axes is None else f" in {self.axes.places.running}"
            raise StreamError(
                f"{call.name}{module} draws a mask of shape {call.shape}{packed}: axis {call.row_dim} does not hold "
                f"the rows of {num_copies} copies{samples}, so its numbers cannot be told apart by copy. If the mask "
                "is meant for all copies, wrap it in `with seqba.shared_draws():`; otherwise keep the samples on the "
                "first axis, run one copy a pass (copies_per_pass=1), or train without reproducible copies"
            )
        if guessed and self.num_samples and call.caller_axis is None:
            others = [n for axis, n in enumerate(call.shape) if axis != call.row_dim]
            if size not in (num_copies, unit) or unit in others:
                raise StreamError(
                    f"{call.name} draws a mask of shape {call.shape} in a pass of {num_copies} copies of "
                    f"{self.num_samples} samples: from its sizes alone, more than one axis can hold their rows, or "
                    "none (a table, time, heads in front of rows). Say which by `axes=seqba.measure_draws(...)`"
                )
        return size // num_copies

    def draw(self, call: RandomCall, seed: int) -> Any:
        """Run a call under a generator seeded for it."""
        device = call.device
        if call.takes_generator():
            if device not in self.generators:
                self.generators[device] = torch.Generator(device)
            return call.run(self.generators[device].manual_seed(seed))
        default = _default_generator(device, call.name)
        state = default.get_state()
        default.manual_seed(seed)
        try:
            return call.run()
        finally:
            default.set_state(state)


def _next_key() -> int:
    """One 63-bit key from torch's CPU generator, the one that gradient checkpointing saves and restores."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=torch.default_generator))


def _default_generator(device: torch.device, name: str) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    generators = getattr(torch.get_device_module(device), "default_generators", None)
    if generators is None:
        raise StreamError(f"{name} on {device}: this device has no generator that can be seeded per copy")
    index = device.index if device.index is not None else torch.get_device_module(device).current_device()
    return generators[index]


def _fused_refusal(call: RandomCall) -> str:
    if call.kind == CUDNN_RNN:
        return (
            f"{call.name} drops out between its layers inside cuDNN (dropout={call.dropout}), where copies cannot have "
            "streams of their own; set torch.backends.cudnn.enabled = False, put nn.Dropout between "
            "one-layer networks, or train without reproducible copies"
        )
    return (
        f"{call.name} drops attention weights inside its kernel (dropout_p={call.dropout}), where copies cannot have "
        'streams of their own; use attn_implementation="eager" or the math backend of scaled_dot_product_attention'
    )


def _refuse_other_generators(entry: _Entry) -> None:
    now, moved = _Entry.now(), []
    if now.python_state != entry.python_state:
        moved.append("Python's random")
    if any(not np.array_equal(a, b) for a, b in zip(now.numpy_state, entry.numpy_state, strict=True)):
        moved.append("numpy.random")
    # torch's own draws on the device put its generator back: what moved it is a kernel that torch does not tag
    if entry.cuda_state is not None and now.cuda_state is not None and not entry.cuda_state.equal(now.cuda_state):
        moved.append("the CUDA generator in a kernel of its own (flash attention, for one)")
    if moved:
        raise StreamError(
            f"the model drew from {' and '.join(moved)} during the pass, which no stream of a copy covers (SpecAugment "
            "and some LayerDrops do): such a draw differs between plans. Switch it off, draw with torch instead, or "
            "train without reproducible copies"
        )
