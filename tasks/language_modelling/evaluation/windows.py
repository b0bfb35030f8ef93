"""Windows over a text: what a model reads at once, and which of its targets are scored there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from seqba.loss import IGNORE_INDEX
from tasks.language_modelling.evaluation.tokens import Numbers


@dataclass(frozen=True)
class Windows:
    """Windows by the place of their first input; each is scored from `scored_from` to its end, `length` places on.

    Place i of the text is read to predict token i: the input there is the token before it. Scored stretches follow one
    another from place 0 to the text's end.
    """

    starts: Numbers
    scored_from: Numbers
    length: int

    def batches(self, sequence: Numbers, size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Batches of `size` windows: the places that they score, `input_ids` and `labels` (rows, length).

        Args:
            sequence: (N + 1,), the id that the first token is predicted from, then all N tokens.
            size: windows of a batch.
        """
        num_tokens = len(sequence) - 1
        for i in range(0, len(self.starts), size):
            starts, scored_from = self.starts[i : i + size, None], self.scored_from[i : i + size, None]
            places = starts + np.arange(min(self.length, num_tokens - int(starts[-1, 0])))
            labels = np.where(places < scored_from, IGNORE_INDEX, sequence[places + 1])
            scored = slice(int(scored_from[0, 0]), int(places[-1, -1]) + 1)
            yield scored, torch.from_numpy(sequence[places]), torch.from_numpy(labels)


def overlapping_windows(num_tokens: int, length: int, stride: int) -> Windows:
    """Windows whose ends are `stride` apart: each scores what the one before did not reach, the first all of its own.

    The last one ends with the text, and begins so much earlier: a token has at least `length - stride + 1` tokens of
    context but for the text's first ones, and no window needs padding. With `stride` = `length` the windows lie side by
    side, as lm-evaluation-harness's rolling windows do; with 1 every token has the longest context there can be.

    >>> windows = overlapping_windows(num_tokens=10, length=4, stride=3)
    >>> windows.starts.tolist(), windows.scored_from.tolist()
    ([0, 3, 6], [0, 4, 7])
    """
    length = min(length, num_tokens)
    ends = np.append(np.arange(length, num_tokens, stride), num_tokens)
    return Windows(ends - length, np.append(0, ends[:-1]), length)


def carried_windows(num_tokens: int, length: int) -> Windows:
    """Windows side by side, for a state that is carried from each to the next; the last one is shorter.

    >>> carried_windows(num_tokens=10, length=4).starts.tolist()
    [0, 4, 8]
    """
    starts = np.arange(0, num_tokens, length)
    return Windows(starts, starts, length)
