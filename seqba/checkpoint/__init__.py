"""Checkpoints: atomic, exact, pruned, verified; nothing in them is unpickled."""

from seqba.checkpoint.files import checkpoint_fault as checkpoint_fault
from seqba.checkpoint.folder import Checkpoint as Checkpoint
from seqba.checkpoint.folder import find_checkpoint as find_checkpoint
from seqba.checkpoint.folder import load_checkpoint as load_checkpoint
from seqba.checkpoint.folder import save_checkpoint as save_checkpoint
from seqba.checkpoint.shards import full_state_dict as full_state_dict
from seqba.draws.generators import rng_state as rng_state
from seqba.draws.generators import set_rng_state as set_rng_state
