"""seqba: Batch Augmentation for sequence models (Hoffer et al. 2020, "Augment Your Batch").

The Hugging Face Trainer integration is imported when it is first asked for: transformers' Trainer is slow to load.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from seqba import schedule as schedule
from seqba.arguments import BatchAugmentationArguments as BatchAugmentationArguments
from seqba.audit import IdenticalCopiesError as IdenticalCopiesError
from seqba.audit import MaskAudit as MaskAudit
from seqba.audit import audit_masks as audit_masks
from seqba.audit import check_copies_differ as check_copies_differ
from seqba.carried import CarriedState as CarriedState
from seqba.checkpoint import Checkpoint as Checkpoint
from seqba.checkpoint import find_checkpoint as find_checkpoint
from seqba.checkpoint import load_checkpoint as load_checkpoint
from seqba.checkpoint import save_checkpoint as save_checkpoint
from seqba.collator import BatchAugmentationCollator as BatchAugmentationCollator
from seqba.context import copies_of_pass as copies_of_pass
from seqba.context import current_copies as current_copies
from seqba.context import shared_draws as shared_draws
from seqba.draws.generators import rng_state as rng_state
from seqba.draws.generators import set_rng_state as set_rng_state
from seqba.draws.streams import copy_streams as copy_streams
from seqba.errors import StreamError as StreamError
from seqba.errors import UnsupportedError as UnsupportedError
from seqba.groups import CopyGroup as CopyGroup
from seqba.loss import count_targets as count_targets
from seqba.loss import linear_cross_entropy as linear_cross_entropy
from seqba.loss import token_cross_entropy as token_cross_entropy
from seqba.repeat import copy_ids as copy_ids
from seqba.repeat import fold as fold
from seqba.repeat import repeat_batch as repeat_batch
from seqba.repeat import unfold as unfold
from seqba.sampler import TokenBatchSampler as TokenBatchSampler
from seqba.step import TrainStep as TrainStep
from seqba.step import UpdateResult as UpdateResult

if TYPE_CHECKING:
    from seqba.trainer import BatchAugmentationMixin as BatchAugmentationMixin
    from seqba.trainer import BatchAugmentationSeq2SeqTrainer as BatchAugmentationSeq2SeqTrainer
    from seqba.trainer import BatchAugmentationTrainer as BatchAugmentationTrainer
    from seqba.trainer import augment as augment

# the public names, each of which the README's table explains
__all__ = [
    "BatchAugmentationArguments",
    "BatchAugmentationCollator",
    "BatchAugmentationMixin",
    "BatchAugmentationSeq2SeqTrainer",
    "BatchAugmentationTrainer",
    "CarriedState",
    "Checkpoint",
    "CopyGroup",
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
    "linear_cross_entropy",
    "load_checkpoint",
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
