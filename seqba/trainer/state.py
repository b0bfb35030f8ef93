"""State around a Trainer's passes: attributes, counts, a rank's generators, the data order."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from seqba.groups import CopyGroup


@contextmanager
def replaced(target: object, name: str, value: Any) -> Iterator[None]:
    """Give an object an attribute for the time of the block; a class's own shows again after it."""
    had, before = name in vars(target), vars(target).get(name)
    setattr(target, name, value)
    try:
        yield
    finally:
        if had:
            setattr(target, name, before)
        else:
            delattr(target, name)


def snapshot(trainer: object) -> Callable[[], None]:
    """Remember an object's plain attributes: numbers, strings, and lists and dictionaries of them.

    A Trainer's `compute_loss` may keep counts there (TRL's does), which a pass that is done again would count twice.

    Returns:
        What puts them back, as often as it is called. Lists and dictionaries are filled anew, not replaced: others may
        hold them too.
    """
    kept = {name: copy.deepcopy(value) for name, value in vars(trainer).items() if _is_plain(value)}

    def restore() -> None:
        for name, value in kept.items():
            now, before = getattr(trainer, name), copy.deepcopy(value)
            if isinstance(now, list) and isinstance(before, list):
                now[:] = before
            elif isinstance(now, dict) and isinstance(before, dict):
                now.clear()
                now.update(before)
            else:
                setattr(trainer, name, before)

    return restore


@contextmanager
def batches_by_group(group: CopyGroup) -> Iterator[None]:
    """Inside, a loader that an accelerator prepares is cut for groups of ranks, as if each group were one rank."""
    prepare = accelerate.accelerator.prepare_data_loader

    def by_group(*args: Any, **kwargs: Any) -> Any:
        return prepare(*args, **{**kwargs, "num_processes": group.num_groups, "process_index": group.index})

    with replaced(accelerate.accelerator, "prepare_data_loader", by_group):
        yield


class OrderOfEpoch(Sampler):
    """A sampler whose order comes from (seed, epoch), not from the generator that dropout draws from.

    So neither the number of copies nor a resumed run's history moves it.

    Args:
        sampler: draws its order from its `generator`.
        seed: the run's.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int) -> None:
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is of."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)


def _is_plain(value: Any) -> bool:
    if value is None or isinstance(value, (bool, int, float, str)):
        return True
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    return isinstance(value, (list, tuple)) and all(_is_plain(item) for item in value)


def wrap_again(trainer: Trainer) -> None:
    """Have accelerate wrap the model for its ranks in spite of an earlier evaluation.

    An evaluation marks the model as prepared without wrapping it, and a marked model is not wrapped for training: no
    rank would hear of the others' gradients.
    """
    model = trainer.model
    if trainer.accelerator.num_processes > 1 and not isinstance(model, DistributedDataParallel):
        vars(model).pop("_is_accelerate_prepared", None)
