"""Batches of whole samples, under a budget of padded tokens or of a fixed size: shuffled, sharded, resumable.

A sampler knows lengths or a size and nothing else: no token, no copy, no model. So the data order is the same for every
number of copies M, and a batch is counted before it is repeated.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Sampler

Integers = npt.NDArray[np.integer[Any]]
_Options = dict[str, int | str | None]


class BatchSampler(Protocol):
    """The interface that streams of batches and checkpoints need; `TokenBatchSampler` and `FixedBatchSampler` have it.

    Order. It is a pure function of (data, options, seed, epoch): equal on every rank, for every M and plan, and on
    every numpy (only the raw bits of PCG64 are used, which numpy guarantees). Global random state is neither read nor
    changed. Ordering 5 million samples takes under a second an epoch.

    Ranks. An update reads `num_shards * batches_per_update` consecutive batches of the epoch; shard s gets the block
    s * batches_per_update + i of them, i < `batches_per_update` (with 1, batch i goes to shard i % num_shards). So one
    rank that accumulates 4 batches reads the data of 4 ranks. Where an epoch's batches do not fill its last update,
    that update is filled with the epoch's first batches, counted in `wrapped_batches` and `wrapped_samples`; no other
    sample is met twice in an epoch.

    There is no `batch_size` attribute, on purpose: accelerate would cut the batches anew by it and lose samples. Shard
    here and keep the loader out of `Accelerator.prepare`, whose loader calls `set_epoch` with its own count.

    Resuming. A `DataLoader` reads ahead, so only its consumer knows what was trained on: it counts, and asks for the
    position. Give the loader its own `generator`: otherwise it draws a number from the global one at every start, and
    a resumed run would have drawn one number more.

        loader = DataLoader(data, batch_sampler=sampler, collate_fn=collate, generator=torch.Generator())
        if resuming:
            sampler.load_state_dict(counters["sampler"])
        while True:
            for batches_done, batch in enumerate(loader, start=sampler.first_batch + 1):
                ...  # train; `sampler.state_dict(batches_done)` is what a checkpoint keeps
            sampler.set_epoch(sampler.epoch + 1)

    Attributes:
        epoch, first_batch: where the next iteration starts.
    """

    epoch: int
    first_batch: int

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[list[int]]: ...
    def set_epoch(self, epoch: int, first_batch: int | None = None) -> None: ...  # noqa: D102
    def state_dict(self, batches_done: int) -> dict[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...  # noqa: D102


class _SortedBatches(Sampler[list[int]]):
    """An epoch is all samples by `keys`, equal keys at random, cut at the borders `cuts`, in a random order of batches.

    Samples after the last border are in no batch. `options` are what set keys and borders: a resumed run has the same.
    """

    def __init__(
        self,
        keys: npt.NDArray[Any],
        cuts: npt.NDArray[np.intp],
        options: _Options,
        seed: int,
        num_shards: int,
        shard: int,
        batches_per_update: int,
    ) -> None:
        self._keys, self._cuts = keys, cuts
        self._seed = _integer("seed", seed, minimum=0)
        self._num_shards = _integer("num_shards", num_shards, minimum=1)
        self._shard = _integer("shard", shard, minimum=0)
        if self._shard >= self._num_shards:
            raise ValueError(f"shard must be below num_shards={num_shards} (it counts from 0), got {shard}")
        self._batches_per_update = _integer("batches_per_update", batches_per_update, minimum=1)
        self._fingerprint: _Options = {
            "samples": len(keys),
            **options,
            "seed": self._seed,
            "batches of all shards in an update": self._num_shards * self._batches_per_update,
        }
        self.epoch = self.first_batch = 0
        self._pending = False  # a position that was loaded or named waits for its first reader

    @property
    def wrapped_batches(self) -> int:
        """Batches of this epoch that are read twice, to fill the last update of all shards."""
        return len(self) * self._num_shards - self._num_batches

    @property
    def wrapped_samples(self) -> int:
        """Samples read once more in the current epoch because of `wrapped_batches`."""
        batch_order, _ = self._random_bits()
        again = np.arange(self._num_batches, self._num_batches + self.wrapped_batches) % self._num_batches
        return int(np.diff(self._cuts)[batch_order[again]].sum())

    def __len__(self) -> int:
        """Batches of this shard in a whole epoch: the same for every epoch and shard, wherever the next one starts."""
        in_update = self._num_shards * self._batches_per_update
        return -(-self._num_batches // in_update) * self._batches_per_update

    def __iter__(self) -> Iterator[list[int]]:
        """Read this shard's batches of the current epoch, from `first_batch` on."""
        self._pending = False
        batch_order, tie_breaks = self._random_bits()
        samples = np.lexsort((tie_breaks, self._keys))  # by key; by random bits within a key
        for index in batch_order[self._positions()[self.first_batch :]]:
            yield samples[self._cuts[index] : self._cuts[index + 1]].tolist()

    def set_epoch(self, epoch: int, first_batch: int | None = None) -> None:
        """Let the next iteration read `epoch`, from this shard's batch `first_batch` on, by default its first.

        A position that was loaded or named, and that nothing has read from yet, is kept where no `first_batch` is
        named; another epoch would silently drop it, and raises (accelerate's loaders count their own epochs from 0).
        """
        if first_batch is not None:
            self._set_position(epoch, first_batch)
        elif not self._pending:
            self._set_position(epoch, 0)
            self._pending = False
        elif epoch != self.epoch:
            raise ValueError(
                f"set_epoch({epoch}) would drop the position (epoch {self.epoch}, batch {self.first_batch}), from "
                "which nothing has read yet: keep the loader out of Accelerator.prepare, or name first_batch too"
            )

    def state_dict(self, batches_done: int) -> dict[str, Any]:
        """The position after this shard's first `batches_done` batches of the current epoch, as JSON values.

        The consumer counts from the start of the epoch, batches before a resume included. After the last batch the
        position is the next epoch's start. Only whole updates can be resumed, so `batches_done` is a multiple of
        `batches_per_update`. The same on every shard.
        """
        self._check_batch("batches_done", batches_done, len(self))
        epochs, batches = divmod(batches_done, len(self))
        return {
            "epoch": self.epoch + epochs,
            "updates_in_epoch": batches // self._batches_per_update,
            "made_with": dict(self._fingerprint),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; another data set or other options raise and are named.

        Ranks may be traded for accumulated batches (`num_shards` for `batches_per_update`): the data order is the same.
        """
        try:
            epoch, updates, made_with = state["epoch"], state["updates_in_epoch"], dict(state["made_with"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the state of a {type(self).__name__}: {state!r}") from error
        names = self._fingerprint.keys() | made_with.keys()
        differ = [name for name in sorted(names) if self._fingerprint.get(name) != made_with.get(name)]
        if differ:
            pairs = [f"{name}: {made_with.get(name)} then, {self._fingerprint.get(name)} now" for name in differ]
            raise ValueError(
                "the position was taken with other data or options, so its batches would not be the same "
                f"({'; '.join(pairs)}): resume with those, or start a new run"
            )
        self._set_position(epoch, updates * self._batches_per_update)

    @property
    def _num_batches(self) -> int:
        return len(self._cuts) - 1

    def _set_position(self, epoch: int, first_batch: int) -> None:
        self._check_batch("first_batch", first_batch, len(self) - 1)
        self.epoch = _integer("epoch", epoch, minimum=0)
        self.first_batch = first_batch
        self._pending = True

    def _check_batch(self, name: str, batch: int, maximum: int) -> None:
        if not 0 <= batch <= maximum:
            raise ValueError(f"{name} must be from 0 to {maximum} (batches of this shard in an epoch), got {batch}")
        if batch % self._batches_per_update:
            raise ValueError(
                f"{name} must be a multiple of batches_per_update={self._batches_per_update}, since an update is not "
                f"resumed in its middle, got {batch}"
            )

    def _random_bits(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.uint64]]:
        """The order of the epoch's batches, and 64 random bits a sample that order equal keys."""
        bits = np.random.PCG64([self._seed, self.epoch])  # sorted raw bits: Generator.permutation may change with numpy
        batch_order = np.argsort(np.asarray(bits.random_raw(self._num_batches)), kind="stable")
        return batch_order, np.asarray(bits.random_raw(len(self._keys)))

    def _positions(self) -> npt.NDArray[np.intp]:
        """Where in the epoch's order this shard's batches stand: (updates, batches_per_update), flattened."""
        per_update = self._batches_per_update
        updates = np.arange(len(self) // per_update)[:, None] * (self._num_shards * per_update)
        positions = updates + self._shard * per_update + np.arange(per_update)
        return positions.ravel() % self._num_batches  # the wrap


class TokenBatchSampler(_SortedBatches):
    """Yield lists of sample indices such that (longest length in the batch) * (samples in the batch) <= `max_tokens`.

    Samples are sorted by length, longest first, equal lengths in a new random order every epoch, and cut greedily: a
    batch that starts with length L holds `max_tokens // L` samples. The order of the batches is then shuffled. Every
    epoch has the same number of batches and leaves out no sample; which samples of one length meet in a batch changes.
    Order, ranks and resuming are as in `BatchSampler`.

    Args:
        lengths: tokens of sample n as padded, max(source, target) for a pair; integers, at least 1.
        max_tokens: padded tokens of a batch, before it is repeated M times; at least 1.
        seed: with the epoch, the only source of randomness; at least 0.
        num_shards: groups of ranks that read different batches; at least 1.
        shard: which of them this is, 0 <= shard < num_shards.
        batches_per_update: batches that a shard reads in an update (accumulation); at least 1.
        max_samples: the most samples in a batch, however short; None is no limit.

    Raises:
        ValueError: an argument outside its range, a length below 1 or over `max_tokens` (the sample is named).

    >>> sampler = TokenBatchSampler([3, 9, 4, 2, 9, 3], max_tokens=18)
    >>> sorted(sorted(batch) for batch in sampler)
    [[0, 2, 3, 5], [1, 4]]
    >>> [len(TokenBatchSampler([5] * 12, 10, num_shards=4, shard=rank)) for rank in range(4)]
    [2, 2, 2, 2]
    >>> TokenBatchSampler([5] * 12, 10, num_shards=4).wrapped_batches  # 6 batches fill 2 updates of 4
    2
    """

    def __init__(
        self,
        lengths: Sequence[int] | Integers | Tensor,
        max_tokens: int,
        *,
        seed: int = 0,
        num_shards: int = 1,
        shard: int = 0,
        batches_per_update: int = 1,
        max_samples: int | None = None,
    ) -> None:
        max_tokens = _integer("max_tokens", max_tokens, minimum=1)
        max_samples = None if max_samples is None else _integer("max_samples", max_samples, minimum=1)
        checked = _check_lengths(lengths, max_tokens)
        longest = int(checked.max())
        # 0 for the longest; numpy sorts 16-bit integers by radix, in half the time
        shortness = (longest - checked).astype(np.uint16 if longest <= 1 << 16 else np.int64)
        cuts = _cut(np.sort(checked)[::-1], max_tokens, max_samples or len(checked))
        digest = hashlib.blake2b(checked.tobytes(), digest_size=8).hexdigest()
        options: _Options = {"lengths": digest, "max_tokens": max_tokens, "max_samples": max_samples}
        super().__init__(shortness, cuts, options, seed, num_shards, shard, batches_per_update)


class FixedBatchSampler(_SortedBatches):
    """Yield lists of exactly `batch_size` sample indices: an epoch is a new permutation of all samples, cut in batches.

    The `num_samples % batch_size` samples that fill no batch are left out of the epoch, others in each; `left_out` is
    their number. Order, ranks and resuming are as in `BatchSampler`.

    Args:
        num_samples: samples of the data set, at least `batch_size`.
        batch_size: B, samples of a batch, before it is repeated M times; at least 1.
        seed, num_shards, shard, batches_per_update: as in `TokenBatchSampler`.

    Raises:
        ValueError: an argument outside its range.

    >>> sampler = FixedBatchSampler(11, batch_size=4)
    >>> [len(batch) for batch in sampler], sampler.left_out
    ([4, 4], 3)
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int = 0,
        num_shards: int = 1,
        shard: int = 0,
        batches_per_update: int = 1,
    ) -> None:
        num_samples = _integer("num_samples", num_samples, minimum=1)
        batch_size = _integer("batch_size", batch_size, minimum=1)
        if num_samples < batch_size:
            raise ValueError(
                f"num_samples={num_samples} do not fill one batch of batch_size={batch_size}: lower batch_size"
            )
        self.left_out = num_samples % batch_size
        keys, cuts = np.zeros(num_samples, np.uint16), np.arange(0, num_samples + 1, batch_size)
        super().__init__(keys, cuts, {"batch_size": batch_size}, seed, num_shards, shard, batches_per_update)


def _integer(name: str, value: int, *, minimum: int) -> int:
    try:
        integer = operator.index(value)
    except TypeError:
        integer = minimum - 1
    if integer < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return integer


def _check_lengths(lengths: Sequence[int] | Integers | Tensor, max_tokens: int) -> npt.NDArray[np.int64]:
    array = np.asarray(lengths)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise ValueError(
            "lengths must be integers, one for each sample and at least one sample, "
            f"got shape {array.shape} of {array.dtype}"
        )
    if array.min() < 1:
        index = int(np.argmax(array < 1))
        raise ValueError(
            f"sample {index} has length {array[index]}; {int((array < 1).sum())} samples have a length below 1: "
            "drop empty samples, or count the end-of-sequence token"
        )
    over = array > max_tokens
    if over.any():
        index = int(np.argmax(over))
        raise ValueError(
            f"sample {index} has length {array[index]}, over max_tokens={max_tokens}; {int(over.sum())} of "
            f"{len(array)} samples are over it, the longest {array.max()}: raise max_tokens to {array.max()}, drop "
            "those samples, or cut them in the data set"
        )
    return array.astype(np.int64)


def _cut(longest_first: npt.NDArray[np.int64], max_tokens: int, max_samples: int) -> npt.NDArray[np.intp]:
    """The borders of the batches in the sorted order: batch i is samples[cuts[i]:cuts[i + 1]]."""
    cuts = [0]
    while cuts[-1] < len(longest_first):
        cuts.append(min(cuts[-1] + min(max_tokens // int(longest_first[cuts[-1]]), max_samples), len(longest_first)))
    return np.array(cuts)
