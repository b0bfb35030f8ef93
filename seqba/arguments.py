"""The options of Batch Augmentation, for any command line: the Trainer's and the training scripts'."""

from argparse import ArgumentTypeError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from seqba.groups import CopyGroup
from seqba.passes import CopiesPerPass, plan_passes

if TYPE_CHECKING:
    _CopiesPerPass = CopiesPerPass
else:  # `HfArgumentParser` takes a field's type for what converts its text, and knows no union of a number and a word

    def _CopiesPerPass(text: str) -> CopiesPerPass:
        if text != "auto" and not text.isdecimal():
            raise ArgumentTypeError(f"must be auto or from 1 to ba_m, got {text}")
        return "auto" if text == "auto" else int(text)


@dataclass(frozen=True)
class BatchAugmentationArguments:
    """The options of Batch Augmentation, for `HfArgumentParser` beside `TrainingArguments` or a task's own.

    Raises:
        ValueError: M below 1, copies_per_pass neither auto nor from 1 to M, or M no multiple of ranks_per_group, or
            noise_every below 0.
    """

    ba_m: int = field(
        default=1, metadata={"help": "M, the paper's number of copies: how often a sample stands in an update"}
    )
    copies_per_pass: _CopiesPerPass = field(
        default="auto",
        metadata={
            "help": "copies in one forward and backward pass, 1 to M; auto starts at M and halves when memory runs out"
        },
    )
    reproducible_copies: bool = field(
        default=False,
        metadata={
            "help": "draw each copy's masks from (seed, update, batch, copy), so that no plan or rank changes them"
        },
    )
    allow_identical_copies: bool = field(
        default=False, metadata={"help": "train even where nothing random makes the copies of a sample differ"}
    )

    ranks_per_group: int = field(
        default=1,
        metadata={
            "help": "R: so many consecutive ranks share a batch, and each computes M / R of its copies; with 1 a rank "
            "has batches of its own"
        },
    )

    noise_every: int = field(
        default=0,
        metadata={
            "help": "updates between measures of noise_between, a gradient's noise between samples, and noise_within, "
            "that of T (also in every fourth update where copies run in several passes); 0 measures neither"
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.noise_every, bool) or not isinstance(self.noise_every, int) or self.noise_every < 0:
            raise ValueError(f"noise_every must be a whole number of at least 0, got {self.noise_every!r}")
        if isinstance(self.ba_m, bool) or not isinstance(self.ba_m, int) or self.ba_m < 1:
            raise ValueError(f"ba_m must be a whole number of at least 1, got {self.ba_m!r}")
        CopyGroup(self.ba_m, world_size=self.ranks_per_group, ranks_per_group=self.ranks_per_group)  # R divides M
        if self.copies_per_pass == "auto":
            return
        try:
            plan_passes(range(self.ba_m), self.copies_per_pass)
        except ValueError as error:
            raise ValueError(
                f"copies_per_pass must be auto or from 1 to ba_m {self.ba_m}, got {self.copies_per_pass}"
            ) from error


def choose_arguments(ba_args: BatchAugmentationArguments | None, **options: Any) -> BatchAugmentationArguments:
    """`ba_args`, or arguments of the options that are not None.

    Raises:
        ValueError: both are given, or an option is out of range.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if ba_args is None:
        return BatchAugmentationArguments(**given)
    if given:
        raise ValueError(f"ba_args holds {', '.join(given)} already; give one or the other")
    return ba_args
