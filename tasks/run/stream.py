"""An endless stream of batches over epochs, resumable at any batch."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import repeat
from typing import Any, NamedTuple, TypeAlias

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

from seqba.draws.generators import keyed_generators
from seqba.sampler import BatchSampler
from tasks.run.group_channel import GroupChannel

SAMPLE_IDS = "sample_ids"


class SampleKey(NamedTuple):
    """The key of a sample's random transform: it depends neither on workers nor on where a run was resumed."""

    seed: int
    epoch: int
    sample: int

    def generators(self, copy: int) -> AbstractContextManager[None]:
        """A block in which torch on CPU, Python and numpy draw for this copy of the sample; see `keyed_generators`."""
        return keyed_generators(*self, copy)


Transform = Callable[[Any, SampleKey], Any]
_Read: TypeAlias = tuple[int, int, dict[str, Any]]  # a batch, with the epoch and the position after it


class Numbered:
    """A data set whose batches carry the numbers of their samples, under `sample_ids`; asked for (epoch, indices)."""

    def __init__(
        self, dataset: Any, collate: Callable[[list], dict[str, Any]], seed: int = 0, transform: Transform | None = None
    ) -> None:
        self.dataset, self.collate, self.seed, self.transform = dataset, collate, seed, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, batch: tuple[int, list[int]]) -> dict[str, Any]:
        """All samples of a batch at once, transformed and collated."""
        epoch, indices = batch
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = fetch(indices) if fetch else [self.dataset[i] for i in indices]
        if self.transform is not None:
            samples = [self.transform(x, SampleKey(self.seed, epoch, n)) for x, n in zip(samples, indices, strict=True)]
        return {**self.collate(samples), SAMPLE_IDS: torch.tensor(indices)}


class _WithEpoch:
    """A sampler's batches with their epoch, which reaches workers this way alone: they outlive an epoch."""

    def __init__(self, sampler: BatchSampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return zip(repeat(self.sampler.epoch), self.sampler)


def _unchanged(batch: Any) -> Any:
    return batch


class BatchStream:
    """Batches for ever, epoch after epoch, moved to the device (their `sample_ids` stay with the host).

    Its position is counted where batches are taken, not where workers prefetch them, so that a resumed stream goes
    on with exactly the batch that was due.

    Args:
        dataset: samples by index (and `__getitems__`, for whole batches).
        sampler: this rank's batches of indices.
        collate: list of samples -> dictionary of tensors of B rows; what is no tensor stays as it is.
        seed: of the samples' keys; and of the workers' own random numbers, with the position.
        num_workers: loader processes; 0 collates in the training process.
        channel: where given, the first rank of a group reads and the others receive, one batch ahead of the training in
            a thread; `transform` must not draw then, since the training draws meanwhile.
        received: what becomes of a batch on each rank, before it goes to the device.
        transform: (sample, its `SampleKey`) -> what `collate` gets, called in the workers. What it draws inside
            `key.generators(copy)` is the same for every number of workers and in a resumed run, other draws are not.
            The few samples that fill an epoch's last update are met twice in it, under one key.

    Attributes:
        batches_taken, seconds_waited: how many batches `take` has returned, and its time: what training waited.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: BatchSampler,
        collate: Callable[[list], dict[str, Any]],
        *,
        device: torch.device,
        seed: int,
        num_workers: int = 0,
        transform: Transform | None = None,
        channel: GroupChannel | None = None,
        received: Callable[[dict[str, Any]], dict[str, Any]] = _unchanged,
    ) -> None:
        self.sampler, self.device, self.seed = sampler, device, seed
        self._channel, self._received = channel, received
        self._reader = ThreadPoolExecutor(1, "reader") if channel is not None else None
        self._ahead: Future[_Read] | None = None
        self.epoch, self.position = 0, 0
        self.batches_taken, self.seconds_waited = 0, 0.0
        self._generator = torch.Generator()  # its own: the loader must not draw from the one that dropout uses
        self._loader: DataLoader[Any] = DataLoader(
            Numbered(dataset, collate, seed, transform),  # type: ignore[arg-type]
            batch_sampler=_WithEpoch(sampler),  # type: ignore[arg-type]
            collate_fn=_unchanged,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            persistent_workers=num_workers > 0,
            generator=self._generator,
        )
        self._batches: Iterator[Any] | None = None
        self._next_to_read = (0, 0)

    def take(self, count: int) -> list[dict[str, Any]]:
        """The next `count` batches."""
        start = time.perf_counter()
        batches = [self._next() for _ in range(count)]
        self.seconds_waited += time.perf_counter() - start
        self.batches_taken += count
        return batches

    def _next(self) -> dict[str, Any]:
        if self._reader is None:
            read = self._read()
        else:
            read = (self._ahead or self._reader.submit(self._read_once)).result()
            self._ahead = self._reader.submit(self._read_once)
        self.epoch, self.position, batch = read
        return send_to_device(self._received(batch), self.device, non_blocking=True, skip_keys=SAMPLE_IDS)

    def _read(self) -> _Read:
        """The next batch of the loader, and the epoch and position after it."""
        epoch, position = self._next_to_read
        if self._batches is None:
            self.sampler.set_epoch(epoch, position)
            self._generator.manual_seed(hash((self.seed, epoch, position)) & 0xFFFF_FFFF)
            self._batches = iter(self._loader)
        try:
            batch = next(self._batches)
        except StopIteration:
            if position == 0:
                raise ValueError("the sampler has no batches") from None
            self._next_to_read, self._batches = (epoch + 1, 0), None
            return self._read()
        self._next_to_read = (epoch, position + 1)
        return epoch, position + 1, batch

    def _read_once(self) -> _Read:
        """The same, read by the first rank of the group alone."""
        assert self._channel is not None
        if not self._channel.is_reader:
            read: _Read = self._channel.share()
            return read
        try:
            read = self._read()
        except Exception as error:
            self._channel.share(error=error)
            raise
        shared: _Read = self._channel.share(read)
        return shared

    def state_dict(self) -> dict[str, Any]:
        """The position, and what the sampler says of its data."""
        state = self.sampler.state_dict(self.position)
        # where batches are read ahead, or by another rank, the sampler may be in another epoch
        return {**state, "epoch": state["epoch"] + self.epoch - self.sampler.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch that was taken last."""
        self.sampler.load_state_dict(state)
        self.epoch, self.position, self._batches = self.sampler.epoch, self.sampler.first_batch, None
        if self._ahead is not None:
            self._ahead.result()  # of all ranks of the group, and of no use
        self._ahead, self._next_to_read = None, (self.epoch, self.position)
