"""What a script says to its user: plain lines on stdout, from the loggers of `tasks`."""

import logging
import sys

from tqdm import tqdm


class _Lines(logging.Handler):
    """Prints messages above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def show_log(is_main_process: bool) -> None:
    """Let the loggers of `tasks` print their messages, on the main process alone; warnings are printed by all."""
    logger = logging.getLogger("tasks")
    logger.setLevel(logging.INFO if is_main_process else logging.WARNING)
    if not any(isinstance(handler, _Lines) for handler in logger.handlers):
        logger.addHandler(_Lines())
