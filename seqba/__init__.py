"""seqba: Batch Augmentation for sequence models (Hoffer et al. 2020, "Augment Your Batch").

The Hugging Face Trainer integration is imported when it is first asked for: transformers' Trainer is slow to load.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from seqba import schedule
from seqba.arguments import BatchAugmentationArguments
from seqba.audit import IdenticalCopiesError, MaskAudit, audit_masks, check_copies_differ
from seqba.carried import CarriedState
from seqba.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, save_checkpoint
from seqba.collator import BatchAugmentationCollator
from seqba.context import copies_of_pass, current_copies, shared_draws
from seqba.draws.generators import keyed_generators, rng_state, set_rng_state
from seqba.draws.measure import measure_draws
from seqba.draws.streams import copy_streams
from seqba.errors import StreamError, UnsupportedError
from seqba.groups import CopyGroup
from seqba.loss import count_targets, linear_cross_entropy, token_cross_entropy
from seqba.repeat import copy_ids, fold, repeat_batch, unfold
from seqba.sampler import BatchSampler, FixedBatchSampler, TokenBatchSampler
from seqba.step import TrainStep, UpdateResult

if TYPE_CHECKING:
    from seqba.trainer import BatchAugmentationMixin, BatchAugmentationSeq2SeqTrainer, BatchAugmentationTrainer, augment

# the public names, each of which the README's table explains
__all__ = [
    "BatchAugmentationArguments",
    "BatchAugmentationCollator",
    "BatchAugmentationMixin",
    "BatchAugmentationSeq2SeqTrainer",
    "BatchAugmentationTrainer",
    "BatchSampler",
    "CarriedState",
    "Checkpoint",
    "CopyGroup",
    "FixedBatchSampler",
    "IdenticalCopiesError",
    "MaskAudit",
    "StreamError",
    "TokenBatchSampler",
    "TrainStep",
    "UnsupportedError",
    "UpdateResult",
    "audit_masks",
    "augment",
    "check_copies_differ",
    "copies_of_pass",
    "copy_ids",
    "copy_streams",
    "count_targets",
    "current_copies",
    "find_checkpoint",
    "fold",
    "keyed_generators",
    "linear_cross_entropy",
    "load_checkpoint",
    "measure_draws",
    "repeat_batch",
    "rng_state",
    "save_checkpoint",
    "schedule",
    "set_rng_state",
    "shared_draws",
    "token_cross_entropy",
    "unfold",
]

try:
    __version__ = version("seqba")
except PackageNotFoundError:  # a checkout on the path, which nobody installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """Import what stands on transformers' Trainer when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from seqba import trainer

    return getattr(trainer, name)


def __dir__() -> list[str]:
    """All names, those of the Trainer integration too."""
    return sorted({*globals(), *__all__})
