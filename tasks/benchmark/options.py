"""The options that every benchmark has."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tasks.cli.machine import PRECISIONS
from tasks.cli.options import check_choices, check_least, option


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options that all benchmarks have: the rows, and how often each is timed."""

    rows: list[str] = option([], "what is measured")
    ba_m: int = option(4, "M of the rows about Batch Augmentation")
    updates: int = option(16, "updates in one timing")
    pairs: int = option(7, "timed pairs, A B A B")
    mixed_precision: str = option("no", "of all that is compared", choices=PRECISIONS)
    cache_dir: str = option("runs/cache", "folder of vocabularies and preprocessed text")
    cpu: bool = option(False, "measure on the processor even where an accelerator is at hand")
    num_threads: int | None = option(None, "threads on the processor; by default all cores")

    def __str__(self) -> str:
        return f"options: {asdict(self)}"

    def check(self, **least: int) -> None:
        """Refuse rows and other choices that are not known, and options below their least value.

        Raises:
            UserError: it names the option, what it may be and what it is.
        """
        check_least(self, {"ba_m": 2, "updates": 1, "pairs": 2, "num_threads": 1, **least})
        check_choices(self)
