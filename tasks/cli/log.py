"""The messages of the project's loggers, printed by the first rank."""

import logging
import sys

from tqdm import tqdm


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
