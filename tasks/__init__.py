"""The training tasks, one folder each, and the rooms that they share; scripts call them, and they call the library."""

from importlib.util import find_spec

if missing := [
    name
    for name in ("datasets", "matplotlib", "pyarrow", "sacrebleu", "sacremoses", "sentencepiece", "torchvision", "tqdm")
    if not find_spec(name)
]:
    raise ImportError(f"{', '.join(missing)} not installed; the scripts need: python -m pip install -e '.[tasks]'")
