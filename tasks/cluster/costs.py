"""The time of an update on W ranks: computing copies, reading, and the ring all-reduce of the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from seqba.groups import CopyGroup


@dataclass(frozen=True)
class Network:
    """The links between ranks.

    Args:
        bandwidth: bytes a second that a rank sends to its neighbour in the ring.
        latency: seconds of a message without content.
    """

    bandwidth: float
    latency: float

    def all_reduce(self, num_bytes: float, world_size: int) -> float:
        """Seconds of a ring all-reduce: 2 (W - 1) steps, in each of which a rank sends 1 / W of the bytes.

        2 (W - 1) latency + 2 (W - 1) / W bytes / bandwidth (Thakur, Rabenseifner and Gropp 2005, section 4; Patarasuk
        and Yuan 2009 show that no all-reduce needs less bandwidth).

        >>> Network(bandwidth=100.0, latency=0.0).all_reduce(100.0, 2)
        1.0
        """
        steps = 2 * (world_size - 1)
        return steps * self.latency + steps / world_size * num_bytes / self.bandwidth


@dataclass(frozen=True)
class Costs:
    """What an update costs on one rank, apart from the other ranks.

    Args:
        copy_seconds: forward and backward of one copy of a batch.
        update_seconds: what every update costs besides, such as the optimizer's step.
        gradient_bytes: of the gradients that are reduced.
        batch_size: B, samples of a batch before repetition.
        overlap: the share of the reduction that is hidden behind the backward pass, 0 to 1.
    """

    copy_seconds: float
    update_seconds: float
    gradient_bytes: float
    batch_size: float
    overlap: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """Rates of a cluster: updates, unique samples, and samples that are read, each a second, over all ranks."""

    updates: float
    samples: float
    reads: float
    reduction_share: float


def predict(costs: Costs, network: Network, group: CopyGroup, *, cores: int | None = None) -> Prediction:
    """Predict the rates of W ranks in groups of R that share M copies.

    Args:
        costs: of one rank.
        network: between ranks.
        group: M, W and R; its rank does not matter.
        cores: processor cores that all ranks share, where they are on one machine: with more ranks than cores they
            slow each other.

    A rank computes M / R copies. A batch is read once for each group, and its samples are met once.
    """
    crowding = 1.0 if cores is None else max(1.0, group.world_size / cores)
    computing = crowding * (costs.update_seconds + len(group.copies) * costs.copy_seconds)
    reducing = (1 - costs.overlap) * network.all_reduce(costs.gradient_bytes, group.world_size)
    updates = 1 / (computing + reducing)
    samples = updates * group.num_groups * costs.batch_size
    return Prediction(updates, samples, samples, reducing / (computing + reducing))


def fit_costs(runs: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Seconds of a copy and of an update besides, from (copies, seconds an update) of runs on one rank.

    One run tells no more than their sum: all of it is taken for the copies' then.

    >>> fit_costs([(1, 0.3), (4, 0.9)])
    (0.2, 0.1)

    Raises:
        ValueError: no run is given.
    """
    if not runs:
        raise ValueError("no run to measure by")
    copies, seconds = (np.array(column, dtype=float) for column in zip(*runs, strict=True))
    if len(set(copies)) == 1:
        return float((seconds / copies).mean()), 0.0
    copy, rest = np.polyfit(copies, seconds, 1)
    if rest < 0 or copy <= 0:  # noise: fewer copies took longer
        return float((seconds / copies).mean()), 0.0
    return round(float(copy), 12), round(float(rest), 12)
