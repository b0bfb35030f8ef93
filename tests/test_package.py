"""The library is light: its Trainer trains where nothing but torch, transformers, accelerate and numpy is installed."""

import ast
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import seqba

HERE = Path(__file__).parent
NEEDED = ["torch", "transformers", "accelerate", "numpy"]
LIBRARY = sorted((HERE.parent / "seqba").rglob("*.py"))


def imported(file):
    """The top-level names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield str(node.module).partition(".")[0]


def brought(names):
    """The distributions that installing `names` brings, themselves too."""
    found, left = set(), list(names)
    while left:
        name = canonicalize_name(left.pop())
        if name in found:
            continue
        try:
            needs = [Requirement(text) for text in requires(name) or []]
        except PackageNotFoundError:  # for another system or Python
            continue
        found.add(name)
        left += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def test_the_library_imports_torch_transformers_accelerate_and_numpy_alone():
    # safetensors comes with transformers, filelock with torch
    allowed = {*NEEDED, "safetensors", "filelock", "seqba", *sys.stdlib_module_names}
    assert len(LIBRARY) > 20
    assert "safetensors" in brought(["transformers"])
    assert "filelock" in brought(["torch"])
    assert {file.name: names for file in LIBRARY if (names := set(imported(file)) - allowed)} == {}


ALONE = """
import json, os, sys

hidden = set(json.loads(os.environ["HIDDEN"]))


class Without:
    "A finder that does not know the hidden packages."

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = map(Without, sys.meta_path)
for name in ("datasets", "sacrebleu", "sentencepiece", "matplotlib", "pytest"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} is not hidden")

import seqba
import torch
from tiny_models import llama
from transformers import TrainingArguments

rows = [{"input_ids": torch.arange(5) + n, "labels": torch.arange(5) + n} for n in range(3)]
args = TrainingArguments(sys.argv[1], max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no")
trainer = seqba.BatchAugmentationTrainer(model=llama(), args=args, train_dataset=rows, ba_m=2, copies_per_pass=1)
trainer.train()
assert trainer.state.global_step == 1
assert not hidden & {name.partition(".")[0] for name in sys.modules}
"""


def test_the_trainer_trains_where_nothing_else_is_installed(tmp_path):
    kept = {*brought(NEEDED), "seqba"}
    hidden = [
        package
        for package, distributions in packages_distributions().items()
        if not any(canonicalize_name(name) in kept for name in distributions)
    ]
    assert {"datasets", "sacrebleu", "sentencepiece", "matplotlib"} <= set(hidden)
    importable = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(importable), "HIDDEN": json.dumps(hidden)}
    command = [sys.executable, "-c", ALONE, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]


def test_a_name_that_is_not_public_is_no_attribute():
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        getattr(seqba, "nothing_of_this_name")  # noqa: B009


def test_a_script_without_the_extra_names_what_is_missing_and_the_remedy(monkeypatch):
    import importlib.util

    import tasks

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sacrebleu" else find(name))
    with pytest.raises(ImportError, match=r"sacrebleu not installed; .* pip install -e '\.\[tasks\]'"):
        importlib.reload(tasks)
