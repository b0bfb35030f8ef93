"""Folders that their name determines: made once, whole, and made again where they are damaged."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from seqba.checkpoint.files import manifest_fault, write_manifest

logger = logging.getLogger(__name__)


def fill_cache(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make sure that a cached folder is there, intact.

    `fill` writes its files into an empty folder, which then is sealed with the sizes and checksums of all files and
    moved to `folder` in one step. One process fills, others wait for it. A folder that is damaged is made again, and
    the log says so; what a killed process left behind is removed.
    """
    if folder.is_dir() and manifest_fault(folder) is None:  # also where the cache may only be read
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        unfinished = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        if folder.is_dir():
            fault = manifest_fault(folder)
            if fault is None:
                return
            logger.info("the cached folder %s is damaged (%s); it is made again", folder, fault)
            shutil.rmtree(folder)
        unfinished.mkdir()
        try:
            fill(unfinished)
            write_manifest(unfinished)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
