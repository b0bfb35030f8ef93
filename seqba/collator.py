"""Batch Augmentation for any data loader: a collator around the collator."""

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch

from seqba.repeat import repeat_batch


class BatchAugmentationCollator:
    """Collate B samples, then repeat the batch M times, copy-major (`repeat_batch`).

    The copies part at the network's own dropout. Install it for training only: evaluation must see every sample
    once. Where the collator itself is the random transform T (masked language modelling, noise, SentencePiece
    sampling), `collate_each_copy=True` calls it once per copy, so that each copy draws its own. Where T is a function
    of a sample (of a decoded image), give it as `transform`: it is called for every copy, the sample is read once.

    Args:
        collate_fn: list of samples -> batch of B rows: torch's `default_collate`, `DataCollatorForSeq2Seq`
            (give it `model=`, so that the decoder's inputs exist and are repeated too),
            `DataCollatorForLanguageModeling`, or a plain function.
        num_copies: M, at least 1.
        dim: the sample axis of its tensors.
        collate_each_copy: draw the collator's own randomness per copy. It must then return a tensor or a mapping
            of tensors, of the same shapes at each call.
        transform: T, sample -> what `collate_fn` takes; it may not write into the sample's tensors. Its results must
            collate to tensors, as with `collate_each_copy`.

    Raises:
        ValueError: `num_copies` is below 1.
        TypeError: `collate_each_copy` or `transform` with a collator that returns something else.

    >>> collate = BatchAugmentationCollator(torch.utils.data.default_collate, num_copies=3)
    >>> collate([{"input_ids": 5}, {"input_ids": 6}])["input_ids"].tolist()
    [5, 6, 5, 6, 5, 6]
    """

    def __init__(
        self,
        collate_fn: Callable[[list], Any],
        num_copies: int,
        dim: int = 0,
        *,
        collate_each_copy: bool = False,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        if num_copies < 1:
            raise ValueError(f"num_copies must be at least 1, got {num_copies}")
        self.collate_fn = collate_fn
        self.num_copies = num_copies
        self.dim = dim
        self.collate_each_copy = collate_each_copy or transform is not None
        self.transform = transform or _as_it_is

    def __call__(self, features: Sequence) -> Any:
        """B samples -> a batch of M*B rows along `dim`."""
        samples = list(features)
        if not self.collate_each_copy:
            return repeat_batch(self.collate_fn(samples), self.num_copies, dim=self.dim)
        batches = [self.collate_fn([self.transform(_shallow_copy(x)) for x in samples]) for _ in range(self.num_copies)]
        return _concatenate(batches, self.dim)


def _as_it_is(sample: Any) -> Any:
    return sample


def _shallow_copy(sample: Any) -> Any:
    """Collators may pop keys from a sample; the next copy must find them again."""
    return dict(sample) if isinstance(sample, dict) else sample


def _concatenate(batches: list, dim: int) -> Any:
    """Whole batches one after the other along `dim`: the layout of `repeat_batch`, each copy with its own draw."""
    first = batches[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(batches, dim=dim)
    if not isinstance(first, MutableMapping):
        raise TypeError(
            f"collate_each_copy joins tensors or mappings of tensors, but the collator returned {type(first).__name__}"
        )
    repeated = repeat_batch(first, len(batches), dim=dim)
    for key, value in repeated.items():
        if isinstance(value, torch.Tensor) and value.ndim:
            repeated[key] = torch.cat([batch[key] for batch in batches], dim=min(dim, value.ndim - 1))
    return repeated
