"""Files written whole: a kill leaves the old one or the new one."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_text(file: Path, text: str) -> None:
    """Replace a file in one step, so that a kill leaves the old one or the new one."""
    partial = file.with_name(f".{file.name}.part")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
