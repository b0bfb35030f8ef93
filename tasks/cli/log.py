"""The messages of the project's loggers, printed by the first rank."""

import logging
import sys
from typing import Any

from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar


class _Lines(logging.Handler):
    """Writes messages alone to standard output, without tearing a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        tqdm.write(self.format(record), file=sys.stdout)


def show_log(is_main_process: bool = True) -> None:
    """Show the messages of `tasks`: all of them on the main process, warnings elsewhere."""
    logger = logging.getLogger("tasks")
    if not any(isinstance(handler, _Lines) for handler in logger.handlers):
        logger.addHandler(_Lines())
    logger.setLevel(logging.INFO if is_main_process else logging.WARNING)
    disable_progress_bar()  # of transformers, for weights that are loaded or saved in a moment


def progress_bar(unit: str, total: int, is_main_process: bool, **more: Any) -> tqdm:
    """A bar on the main process, whose lines are few where they go into a file; `more` goes to tqdm."""
    pause = 0.2 if sys.stderr.isatty() else 10  # seconds
    return tqdm(total=total, unit=unit, mininterval=pause, disable=not is_main_process, **more)
