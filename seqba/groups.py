"""Which copies of which batches a rank computes: the one place that turns ranks into copies, shards and counts."""

from dataclasses import dataclass

from accelerate import Accelerator


@dataclass(frozen=True)
class CopyGroup:
    """A rank's part in the M copies of an update.

    R consecutive ranks are a group: they share their batches, and each computes M / R of the copies of every one
    (Hoffer et al. 2020, section 4.5). With R = 1 a rank is a group by itself and computes all M. Groups have batches
    of their own: a sampler gets `num_groups` shards, of which this rank reads `index`.

    Args:
        num_copies: M.
        rank: of this process, from 0.
        world_size: W, the number of ranks.
        ranks_per_group: R.

    Raises:
        ValueError: M, W or R below 1, a rank outside of W, W no multiple of R, or M no multiple of R.

    >>> second = CopyGroup(num_copies=4, rank=1, world_size=4, ranks_per_group=2)
    >>> second.index, second.copies, second.num_groups
    (0, (2, 3), 2)
    >>> CopyGroup(num_copies=4, rank=3, world_size=4, ranks_per_group=2).shard(0, num_batches=3)
    3
    """

    num_copies: int
    rank: int = 0
    world_size: int = 1
    ranks_per_group: int = 1

    def __post_init__(self) -> None:
        for name in ("num_copies", "world_size", "ranks_per_group"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be from 0 to below world_size {self.world_size}, got {self.rank}")
        for said, total in (("the number of ranks", self.world_size), ("M, the number of copies,", self.num_copies)):
            if total % self.ranks_per_group:
                raise ValueError(f"{said} must be a multiple of ranks_per_group {self.ranks_per_group}, got {total}")

    @classmethod
    def of(cls, accelerator: Accelerator, num_copies: int, ranks_per_group: int = 1) -> "CopyGroup":
        """The part of the process that `accelerator` runs in."""
        return cls(num_copies, accelerator.process_index, accelerator.num_processes, ranks_per_group)

    @property
    def index(self) -> int:
        """The number of this rank's group."""
        return self.rank // self.ranks_per_group

    @property
    def num_groups(self) -> int:
        """How many groups there are: as many batches are read at a time."""
        return self.world_size // self.ranks_per_group

    @property
    def copies(self) -> tuple[int, ...]:
        """The copies that this rank computes, of each of its batches."""
        each = self.num_copies // self.ranks_per_group
        first = self.rank % self.ranks_per_group * each
        return tuple(range(first, first + each))

    @property
    def pair(self) -> tuple[int, int]:
        """Two copies to look at: the first of this rank's, and where it has one alone, another rank's."""
        first = self.copies[0]
        return first, self.copies[1] if len(self.copies) > 1 else (first + 1) % max(2, self.num_copies)

    @property
    def counts_samples(self) -> bool:
        """Whether this rank is the one of its group that counts samples, so that each is counted once."""
        return self.rank % self.ranks_per_group == 0

    def shard(self, batch: int, num_batches: int) -> int:
        """The number, among the batches of all groups in an update, of this rank's batch `batch` of `num_batches`."""
        return self.index * num_batches + batch
