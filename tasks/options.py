"""The command line of a script: options from a dataclass, and complaints in one line."""

from typing import NoReturn

from transformers import HfArgumentParser

from tasks.errors import UserError


class OptionParser(HfArgumentParser):
    """`HfArgumentParser` whose complaints are `UserError`s that name the option, not pages of usage."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise UserError(f"{message.removeprefix('argument ')}; --help explains all options")
