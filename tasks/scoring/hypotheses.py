"""The files of translations: `hyp.NAME.txt`, a translation a line."""

import re
from collections.abc import Sequence

_LONGEST = 200  # characters of a name; file systems end at 255 bytes


def hypothesis_files(names: Sequence[str]) -> list[str]:
    """A file name for each test set's translations: ASCII letters, digits, `.`, `_` and `-`, others become `_`.

    A name that an earlier one has taken, in capitals or not, gets a number; of a very long one the end is kept.

    >>> hypothesis_files(["wmt16:test", "news/test", "news:test"])
    ['hyp.wmt16_test.txt', 'hyp.news_test.txt', 'hyp.news_test-2.txt']
    """
    files: list[str] = []
    taken: set[str] = set()
    for name in names:
        safe = unnumbered = re.sub(r"[^A-Za-z0-9._-]", "_", name)[-_LONGEST:]
        number = 1
        while safe.lower() in taken:
            number += 1
            safe = f"{unnumbered}-{number}"
        taken.add(safe.lower())
        files.append(f"hyp.{safe}.txt")
    return files
