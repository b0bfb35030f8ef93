"""Which versions made a result: of the libraries, and of the checkout."""

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from accelerate import Accelerator

import seqba

_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "torchvision", "timm", "sacrebleu", "sentencepiece")


@cache
def software() -> dict[str, str]:
    """Versions by name, of the installed libraries alone; `commit` where the code is a git checkout."""
    found = {"seqba": seqba.__version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = _git("describe", "--always", "--abbrev=12", "--exclude=*", "--dirty")
    return found | ({"commit": commit} if commit else {})


def describe_machine(accelerator: Accelerator) -> dict[str, str]:
    """Precision, processes and software, for a model's card."""
    return {
        "mixed precision": f"{accelerator.mixed_precision}, {accelerator.num_processes} process(es) on "
        f"{accelerator.device.type}",
        "software": ", ".join(f"{name} {found}" for name, found in software().items()),
    }


def _git(*command: str) -> str:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # else git would look in the folders above
        return ""
    try:
        done = subprocess.run(("git", "-C", str(root), *command), capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()  # nothing where git failed
