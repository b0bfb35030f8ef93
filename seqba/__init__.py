"""seqba: Batch Augmentation for sequence models (Hoffer et al. 2020, "Augment Your Batch")."""

from seqba.checkpoint import Checkpoint as Checkpoint
from seqba.checkpoint import find_checkpoint as find_checkpoint
from seqba.checkpoint import load_checkpoint as load_checkpoint
from seqba.checkpoint import save_checkpoint as save_checkpoint
from seqba.collator import BatchAugmentationCollator as BatchAugmentationCollator
from seqba.loss import count_targets as count_targets
from seqba.loss import linear_cross_entropy as linear_cross_entropy
from seqba.loss import token_cross_entropy as token_cross_entropy
from seqba.random_ops import shared_draws as shared_draws
from seqba.random_state import rng_state as rng_state
from seqba.random_state import set_rng_state as set_rng_state
from seqba.repeat import copy_ids as copy_ids
from seqba.repeat import fold as fold
from seqba.repeat import repeat_batch as repeat_batch
from seqba.repeat import unfold as unfold
from seqba.sampler import TokenBatchSampler as TokenBatchSampler
from seqba.step import TrainStep as TrainStep
from seqba.step import UpdateResult as UpdateResult
from seqba.step import plan_passes as plan_passes
from seqba.streams import copies_of_pass as copies_of_pass
from seqba.streams import copy_streams as copy_streams
from seqba.streams import current_copies as current_copies
