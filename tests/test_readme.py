"""README.md: its names and options exist, and what it shows as code runs."""

import contextlib
import io
import pydoc
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from torch.utils.data import DataLoader

import seqba
from bad_input import SCRIPTS
from tiny_models import llama
from trainers import Pad, Samples

README = Path(__file__).parents[1].joinpath("README.md").read_text("utf-8")
OWN_LOOP = README.partition("## In your own loop")[2].partition("\n## ")[0]


def help_of(script, *argv):
    main = runpy.run_path(str(SCRIPTS / script))["main"]
    before, out = sys.argv, io.StringIO()
    sys.argv = [script, *argv, "--help"]
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main()
    finally:
        sys.argv = before
    return out.getvalue()


def test_every_option_is_one_of_the_scripts():
    names = (
        "train_wmt.py",
        "eval_bleu.py",
        "train_ptb.py",
        "eval_ppl.py",
        "train_vision.py",
        "eval_vision.py",
        "finetune.py",
        "audit_masks.py",
        "measure_gradients.py",
        "plan_cluster.py",
        "experiment.py",
        "report.py",
    )
    tasks = ("translation", "finetuning", "language-modelling", "vision")
    scripts = [*((name,) for name in names), *(("benchmark.py", task) for task in tasks)]
    launchers = [*get_args_parser()._actions, *launch_command_parser()._actions]
    of_launchers = {name.replace("_", "-") for action in launchers for name in action.option_strings}
    known = of_launchers | set(re.findall(r"--[a-z][\w-]*", " ".join(help_of(*script) for script in scripts)))
    named = {name.replace("_", "-") for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", README)}
    assert len(named) > 30
    assert not named - known


def test_the_table_of_the_library_and_its_public_names_are_the_same():
    rows = [line for line in OWN_LOOP.splitlines() if line.startswith("| `")]
    named = [name.removeprefix("seqba.") for row in rows for name in re.findall(r"`([\w.]+)`", row.split("|")[1])]
    assert len(named) == len(set(named)) > 30
    assert set(named) - set(seqba.__all__) == set(), "these are in the README's table, and not in seqba.__all__"
    assert set(seqba.__all__) - set(named) == set(), "these are in seqba.__all__, and not in the README's table"
    assert all(hasattr(seqba, name) for name in named)


def test_what_the_library_holds_beside_its_modules_is_public():
    held = {name for name, value in vars(seqba).items() if getattr(value, "__module__", "").startswith("seqba")}
    assert {name for name in held if not name.startswith("_")} <= set(seqba.__all__)


def test_pydoc_lists_every_public_name():
    text = pydoc.plain(pydoc.render_doc(seqba))
    for name in seqba.__all__:
        assert re.search(rf"^    (class )?{name}(\(|$)", text, re.MULTILINE), name


def test_the_code_of_an_own_loop_runs_and_counts_the_targets_of_a_causal_model():
    collate, loop = re.findall(r"```python\n(.*?)```", OWN_LOOP, re.DOTALL)
    data, model = Samples("llama", 6), llama()
    given: dict[str, Any] = {"DataLoader": DataLoader, "data": data, "collate_fn": Pad()}
    exec(collate, given)
    assert next(iter(given["loader"]))["input_ids"].shape[0] == 4 * 6
    given |= {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1), "plain_loader": [Pad()(data.rows)]}
    exec(loop, given)
    assert int(given["result"].num_targets) == 4 * sum(len(row["labels"]) - 1 for row in data.rows)
