"""An endless stream of batches over epochs, resumable at any batch."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from seqba.sampler import TokenBatchSampler

SAMPLE_IDS = "sample_ids"


class Numbered:
    """A data set whose batches carry the numbers of their samples, under `sample_ids`."""

    def __init__(self, dataset: Any, collate: Callable[[list], dict[str, Any]]) -> None:
        self.dataset, self.collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """All samples of a batch at once, collated."""
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = fetch(indices) if fetch else [self.dataset[i] for i in indices]
        return {**self.collate(samples), SAMPLE_IDS: torch.tensor(indices)}


def _unchanged(batch: Any) -> Any:
    return batch


class BatchStream:
    """Batches for ever, epoch after epoch, moved to the device (their `sample_ids` stay with the host).

    Its position is counted where batches are taken, not where workers prefetch them, so that a resumed stream goes
    on with exactly the batch that was due.

    Args:
        dataset: samples by index (and `__getitems__`, for whole batches).
        sampler: this rank's batches of indices.
        collate: list of samples -> dictionary of tensors of B rows.
        device: where batches go.
        seed: of the workers' own random numbers, with the position.
        num_workers: loader processes; 0 collates in the training process.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: TokenBatchSampler,
        collate: Callable[[list], dict[str, Any]],
        *,
        device: torch.device,
        seed: int,
        num_workers: int = 0,
    ) -> None:
        self.sampler, self.device, self.seed = sampler, device, seed
        self.epoch, self.position = 0, 0
        self._generator = torch.Generator()  # its own: the loader must not draw from the one that dropout uses
        self._loader: DataLoader[Any] = DataLoader(
            Numbered(dataset, collate),  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=_unchanged,
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            persistent_workers=num_workers > 0,
            generator=self._generator,
        )
        self._batches: Iterator[Any] | None = None

    def take(self, count: int) -> list[dict[str, Any]]:
        """The next `count` batches."""
        return [self._next() for _ in range(count)]

    def _next(self) -> dict[str, Any]:
        if self._batches is None:
            self.sampler.set_epoch(self.epoch, self.position)
            self._generator.manual_seed(hash((self.seed, self.epoch, self.position)) & 0xFFFF_FFFF)
            self._batches = iter(self._loader)
        try:
            batch = next(self._batches)
        except StopIteration:
            if self.position == 0:
                raise ValueError("the sampler has no batches") from None
            self.epoch, self.position, self._batches = self.epoch + 1, 0, None
            return self._next()
        self.position += 1
        return {name: x if name == SAMPLE_IDS else x.to(self.device, non_blocking=True) for name, x in batch.items()}

    def state_dict(self) -> dict[str, Any]:
        """The position, and what the sampler says of its data."""
        return self.sampler.state_dict(self.position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch that was taken last."""
        self.sampler.load_state_dict(state)
        self.epoch, self.position, self._batches = self.sampler.epoch, self.sampler.first_batch, None
