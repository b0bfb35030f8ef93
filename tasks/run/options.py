"""The options of a run that all training scripts of ours share."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, Generic, TypeVar

from accelerate import Accelerator

from seqba.arguments import BatchAugmentationArguments
from seqba.groups import CopyGroup
from tasks.cli.errors import UserError
from tasks.cli.machine import MachineOptions
from tasks.cli.options import OptionParser, check_choices, check_least, option
from tasks.run.group_channel import GroupChannel


@dataclass(frozen=True)
class RunOptions:
    """How long a run trains, what it writes, and when."""

    max_updates: int = option(800, "updates (optimizer steps)", group="run")
    accumulation: int = option(1, "batches of a rank in one update")
    group_broadcast: str = option(
        "auto",
        "auto: the first rank of a group reads its batches and sends them to the others; off: each rank reads them",
        choices=("auto", "off"),
    )
    reduce_every_pass: bool = option(
        False,
        "reduce the gradients of ranks in each pass, and not in the last alone: the same update, with more traffic",
    )
    max_norm: float | None = option(None, "clip the gradient to this L2 norm; not clipped by default")
    num_workers: int = option(0, "processes that load batches; 0 loads them in the training process")
    output_dir: str | None = option(None, "the run folder; by default one under runs/, named by task, data, M and seed")
    seed: int = option(0, "seed of the weights, the data order and the masks")
    resume: bool = option(False, "continue the run in --output-dir from its newest good checkpoint, exactly")
    log_every: int = option(25, "updates between rows of metrics.jsonl")
    eval_every: int = option(100, "updates between validations")
    save_every: int = option(100, "updates between checkpoints")
    keep_checkpoints: int = option(2, "newest checkpoints that are kept, beside the best")
    report_to: str | None = option(None, "a tracker that accelerate knows, such as tensorboard")

    def __post_init__(self) -> None:
        at_least_1 = ("max_updates", "accumulation", "log_every", "eval_every", "save_every", "keep_checkpoints")
        check_least(self, {**dict.fromkeys(at_least_1, 1), "num_workers": 0, "seed": 0})
        check_choices(self)
        if self.max_norm is not None and not 0 < self.max_norm < float("inf"):
            raise UserError(f"--max-norm must be above 0 and finite, got {self.max_norm}")


# What a resumed run may change: nothing that reaches the weights.
MAY_DIFFER = (
    "resume", "output_dir", "report_to", "num_workers", "num_threads", "rank_timeout", "max_updates", "log_every",
    "save_every", "keep_checkpoints", "allow_identical_copies", "ranks_per_group", "group_broadcast", "noise_every",
)  # fmt: skip

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class TrainingOptions(Generic[ConfigT]):
    """All options of a training script: the task's own, and those that every task has."""

    config: ConfigT
    copies: BatchAugmentationArguments
    run: RunOptions
    machine: MachineOptions

    def group(self, accelerator: Accelerator) -> CopyGroup:
        """This rank's part in the copies.

        Raises:
            UserError: --ranks-per-group does not divide the ranks or M.
        """
        try:
            return CopyGroup.of(accelerator, self.copies.ba_m, self.copies.ranks_per_group)
        except ValueError as error:
            raise UserError(f"--ranks-per-group {self.copies.ranks_per_group}: {error}") from error

    def channel(self, accelerator: Accelerator) -> GroupChannel | None:
        """What a group's batches are sent through, where its first rank reads them for all."""
        if self.copies.ranks_per_group == 1 or self.run.group_broadcast == "off":
            return None
        return GroupChannel(self.group(accelerator), timedelta(seconds=self.machine.rank_timeout))

    def as_json(self) -> dict[str, Any]:
        """All options by name, for `config.json`."""
        return {name: value for part in vars(self).values() for name, value in asdict(part).items()}

    def changed(self, **values: Any) -> "TrainingOptions[ConfigT]":
        """The same with some options set otherwise, by name."""
        if unknown := values.keys() - self.as_json().keys():
            raise TypeError(f"there is no option {min(unknown)!r}")
        parts = {
            name: replace(part, **{option: x for option, x in values.items() if hasattr(part, option)})
            for name, part in vars(self).items()
        }
        return TrainingOptions(**parts)


def training_parser(
    config_class: Any, presets: Mapping[str, Mapping[str, Any]], argv: Sequence[str] | None, description: str
) -> tuple[OptionParser, str]:
    """The parser of a training script's options, whose defaults are those of `--preset`, and that preset's name.

    Raises:
        UserError: there is no such preset.
    """
    preset = OptionParser.peek(argv, "preset")
    preset = config_class.preset if preset is None else preset
    if preset not in presets:
        raise UserError(f"--preset must be one of {', '.join(presets)}, got {preset}")
    parser = OptionParser(
        (config_class, BatchAugmentationArguments, RunOptions, MachineOptions),
        allow_abbrev=False,
        description=f"{description} Defaults are those of --preset {preset}.",
    )
    parser.set_defaults(**presets[preset])
    return parser, preset
