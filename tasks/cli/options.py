"""The command line of a script: options from dataclasses, and complaints in one line."""

import re
from argparse import ArgumentParser
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field
from typing import Any, NoReturn

from transformers import HfArgumentParser

from tasks.cli.errors import UserError


class OptionParser(HfArgumentParser):
    """`HfArgumentParser` whose complaints are `UserError`s that name the option, not pages of usage."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise UserError(f"{message.removeprefix('argument ')}; --help explains all options")

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


def option(default: Any, text: str) -> Any:
    """A field of a dataclass of options, with its help."""
    return field(default=default, metadata={"help": text})


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


def check_choices(options: Any, choices: Mapping[str, Collection[str]]) -> None:
    """Refuse options that are none of their choices by a UserError; one that is None is not looked at."""
    for name, known in choices.items():
        value = getattr(options, name)
        if value is not None and value not in known:
            raise UserError(f"{flag(name)} must be one of {', '.join(known)}, got {value}")
