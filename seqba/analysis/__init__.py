"""The paper's analyses: what the noise of a batch gradient is made of, and what copies do to it."""

from seqba.analysis.choice import CopyChoice as CopyChoice
from seqba.analysis.choice import choose_copies as choose_copies
from seqba.analysis.correlation import pearson as pearson
from seqba.analysis.variance import NoiseSplit as NoiseSplit
from seqba.analysis.variance import split_variance as split_variance
