"""Layers that state the scope of their mask, or of their statistics; all take rows first.

Each layer's functional core has the name of its file and is imported from there.
"""

from seqba.modules.embedding_dropout import EmbeddingDropout as EmbeddingDropout
from seqba.modules.ghost_batch_norm import GhostBatchNorm2d as GhostBatchNorm2d
from seqba.modules.ghost_batch_norm import convert_ghost_batch_norm as convert_ghost_batch_norm
from seqba.modules.locked_dropout import LockedDropout as LockedDropout
from seqba.modules.mask_scope import MaskScope as MaskScope
from seqba.modules.regularisation import activation_regularisation as activation_regularisation
from seqba.modules.regularisation import temporal_activation_regularisation as temporal_activation_regularisation
from seqba.modules.weight_dropout import WeightDropoutLSTM as WeightDropoutLSTM
from seqba.modules.zoneout import Zoneout as Zoneout
