"""Errors that a script prints in one line, without a traceback."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from seqba.audit import IdenticalCopiesError
from seqba.checkpoint.files import disk_error


class UserError(ValueError):
    """Something the user asked for or supplied cannot be used; the message says what, and what to do, in one line.

    Its line ends become spaces. Scripts print `details`, such as a table, as they are, above the message.
    """

    def __init__(self, message: str, *, details: str = "") -> None:
        # a loader's process hands its error over as a traceback in text, which ends with the message
        message = message.rpartition(f"{type(self).__module__}.{type(self).__qualname__}: ")[2]
        super().__init__(" ".join(line.strip() for line in message.splitlines() if line.strip()))
        self.details = details


class DataError(UserError):
    """The user's data or a setting about it is unusable; the message says which and what to do."""


class RunError(UserError):
    """A run that cannot start or go on as asked; the message says what to change."""


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def identical_copies(error: IdenticalCopiesError, remedy: str) -> UserError:
    """What a script says of them: the table of the audit, and `remedy`, the option that makes copies differ."""
    return UserError(
        f"identical copies are refused; give {remedy}, --ba-m 1, or --allow-identical-copies to train all the same",
        details=str(error.audit),
    )


@contextmanager
def explained() -> Iterator[None]:
    """The body of a script: an error ends it with status 1 and one line on stderr, Ctrl-C with status 130.

    With `--traceback` on the command line, an error that is no `UserError` is shown with its traceback.
    """
    if traceback := "--traceback" in sys.argv:
        sys.argv.remove("--traceback")
    try:
        yield
    except UserError as error:
        sys.exit(f"{error.details}\n\nerror: {error}" if error.details else f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if traceback:
            raise
        if is_lost_rank(error):
            sys.exit(
                f"error: another rank ended or did not answer in time ({reason_of(error)}); its own output says why. "
                "Checkpoints are kept: --resume goes on from the newest, and torchrun --max-restarts does so by itself"
            )
        name = type(error).__name__
        sys.exit(
            f"error: {name}: {reason_of(error)}; add --traceback to see where, and report it if the input is right"
        )


def is_lost_rank(error: Exception) -> bool:
    """Whether an error is that of a collective operation whose other ranks did not come."""
    said = ("Connection closed", "Connection reset", "Timed out", "timed out", "Timeout", "Broken pipe", "NCCL")
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    return started and isinstance(error, RuntimeError) and any(words in str(error) for words in said)


@contextmanager
def writing(path: str | Path, *, remedy: str) -> Iterator[None]:
    """Say in a line why the system would not let the block write `path`, and the remedy, a half sentence.

    Raises:
        RunError: the block met an OSError (a full disk, no permission, a file where a folder should be), or one
            that safetensors hides in its own.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = disk_error(error)
        if cause is None:
            raise
        where = cause.filename if cause.filename and Path(cause.filename) != Path(path) else None
        reason = (cause.strerror or str(cause)) + (f": {where}" if where else "")
        raise RunError(f"cannot write {path} ({reason}{_free(Path(path), cause)}); {remedy}") from error


def _free(path: Path, error: OSError) -> str:
    """How much room is left, where that is the trouble."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    folder = next(p for p in (path, *path.absolute().parents) if p.is_dir())
    return f", {shutil.disk_usage(folder).free:,} bytes are free"


def make_folder(folder: Path, *, remedy: str) -> None:
    """Make a folder that can be written into, before there is anything to lose; else a RunError as of `writing`."""
    with writing(folder, remedy=remedy):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
