"""The command line of a script: options from dataclasses, and complaints in one line."""

import re
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import Field, field, fields
from types import MappingProxyType
from typing import Any, NoReturn

from transformers import HfArgumentParser

from tasks.cli.errors import UserError

_MAX_SEED = 2**32 - 2**16  # numpy's is 2^32 - 1, and every rank adds its number

# The groups of `--help` for dataclasses whose fields name none.
_GROUPS = {
    "BatchAugmentationArguments": "Batch Augmentation",
    "TrainingArguments": "training: the options of transformers' Trainer",
}


class _HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Each option by one spelling, and no default where there is none."""

    def _format_action_invocation(self, action: Action) -> str:
        plain = copy(action)
        plain.option_strings = [text for text in action.option_strings if "_" not in text] or action.option_strings
        return super()._format_action_invocation(plain)

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default in (None, "", []) else super()._get_help_string(action)


class OptionParser(HfArgumentParser):
    """`HfArgumentParser` with options in groups, whose complaints are `UserError`s that name the option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, usage="%(prog)s [options]", formatter_class=_HelpFormatter, **kwargs)
        self.add_argument(
            "--traceback",
            action="store_true",
            default=SUPPRESS,  # `explained` takes it off the command line
            help="show the traceback of an unexpected error, which is one line otherwise",
        )

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        title = _GROUPS.get(dtype.__name__)
        self._group = self.add_argument_group(title) if title else self
        super()._add_dataclass_arguments(dtype)

    def _parse_dataclass_field(self, parser: ArgumentParser, field: Field) -> None:
        """Add a field's option to the group that it, or the last field with one, names."""
        metadata = dict(field.metadata)
        if title := metadata.pop("group", None):
            self._group = self.add_argument_group(title)
        if choices := metadata.pop("choices", None):
            metadata["metavar"] = f"{{{','.join(choices)}}}"
        named = copy(field)
        named.metadata = MappingProxyType(metadata)
        super()._parse_dataclass_field(self._group, named)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        message = re.sub(r"--\w+/(?=--)", "", message.removeprefix("argument "))  # of two spellings the one with dashes
        raise UserError(f"{message}; --help explains all options")

    @staticmethod
    def peek(argv: Sequence[str] | None, name: str) -> str | None:
        """The first value of a field's option, before `--help` ends the parsing; None where it is not there.

        >>> OptionParser.peek(["--ba-m=4", "--help"], "ba_m")
        '4'
        """
        parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument(flag(name), f"--{name}", nargs="?", dest="value")
        value: str | None = parser.parse_known_args(argv)[0].value
        return value

    def parse_args_into_dataclasses(self, *args: Any, **kwargs: Any) -> Any:
        """As `HfArgumentParser`'s; what a dataclass refuses is a `UserError` too."""
        try:
            return super().parse_args_into_dataclasses(*args, **kwargs)
        except UserError:
            raise
        except (ValueError, RuntimeError, ImportError) as error:  # of dataclasses that are not the tasks' own
            names = "|".join(action.dest for action in self._actions if "_" in action.dest)
            raise UserError(re.sub(rf"(?<![-\w])({names})\b", lambda name: flag(name[0]), str(error))) from error

    def parse_known_options(self, argv: Sequence[str] | None) -> Any:
        """What is on the command line, before dataclasses look at it; UserError where an option is unknown."""
        named, unknown = self.parse_known_args(argv)
        if unknown:
            raise UserError(f"unknown option {' '.join(unknown)}; --help lists them all")
        return named


def option(default: Any, text: str, *, group: str | None = None, choices: Collection[str] = ()) -> Any:
    """A field of a dataclass of options, with its help.

    Args:
        default: a list is copied for every instance.
        text: the help.
        group: the title of the group of `--help` that begins with this option.
        choices: what the value (of a list, each value) may be; `check_choices` holds it to them.
    """
    metadata = {"help": text, "group": group, "choices": tuple(choices)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """A field's name as it is written on the command line.

    >>> flag("ba_m")
    '--ba-m'
    """
    return "--" + name.replace("_", "-")


def check_least(options: Any, least: Mapping[str, int]) -> None:
    """Refuse options below their least value by a UserError; one that is None is not looked at."""
    for name, limit in least.items():
        value = getattr(options, name)
        if value is not None and value < limit:
            raise UserError(f"{flag(name)} must be at least {limit}, got {value}")
        if value is not None and name.endswith("seed") and value > _MAX_SEED:
            raise UserError(f"{flag(name)} must be at most {_MAX_SEED}, got {value}")


def check_not_blank(options: Any, *names: str) -> None:
    """Refuse an option that is there without a value ("$DATA" where DATA is not set) by a UserError."""
    for name in names:
        if getattr(options, name) is not None and not getattr(options, name).strip():
            raise UserError(f"{flag(name)} is blank; give its value, or leave it out")


def check_choices(options: Any) -> None:
    """Refuse a value that is none of its option's `choices` by a UserError; one that is None is not looked at."""
    for named in fields(options):
        known, value = named.metadata.get("choices"), getattr(options, named.name)
        for one in value if isinstance(value, list) else [value]:
            if known and one is not None and one not in known:
                raise UserError(f"{flag(named.name)} must be one of {', '.join(known)}, got {one}")
