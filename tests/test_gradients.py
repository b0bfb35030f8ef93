"""Correlations and norms of a run's gradients: Table 1 and Figure 1."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_analysis_live import TINY

from seqba.analysis import pearson
from tasks.cli.errors import UserError
from tasks.cli.machine import MachineOptions, start_accelerator
from tasks.gradients.measure import GradientConfig, _load, measure_gradients, sample_gradients
from tasks.gradients.subject import PLAIN, load_subject

HERE = MachineOptions(cpu=True, num_threads=1)


def trained(task, folder, cache):
    train, parse, sizes = TINY[task]
    cadence = ["--max-updates", "2", "--eval-every", "2", "--save-every", "1"]
    own = ["--cache-dir", str(cache)] if task == "translation" else []
    train(parse([*sizes, *cadence, *own, "--output-dir", str(folder), "--ba-m", "2"]))


def test_pearson_is_numpys():
    torch.manual_seed(0)
    a, b = torch.randn(3, 7), torch.randn(3, 7) + 5
    want = [np.corrcoef(x, y)[0, 1] for x, y in zip(a.double(), b.double(), strict=True)]
    assert pearson(a, b).tolist() == pytest.approx(want)
    with pytest.raises(ValueError, match=r"one shape \(n, D\), got \(3, 7\) and \(2, 7\)"):
        pearson(a, b[:2])


@pytest.mark.parametrize(
    "task", ["language", *(pytest.param(t, marks=pytest.mark.slow) for t in ("translation", "vision"))]
)
def test_every_task_has_its_table_and_its_figure(task, tmp_path):
    run = tmp_path / "run"
    trained(task, run, tmp_path / "cache")
    config = GradientConfig(run=str(run), pairs=6, ba_m=[1, 3], batches=4, chunk=4)
    points = measure_gradients(config, HERE)
    assert [point["update"] for point in points] == [0, 1, 2, None]
    kinds = ["x and T(x)", "same class", "different classes"] if task == "vision" else ["two masks", "two samples"]
    for point in points:
        assert list(point["correlations"]) == kinds
        first, *_, last = (x["median"] for x in point["correlations"].values())
        assert -1 <= last < first <= 1
        assert 1 <= point["num_copies"] <= 3
        assert point["noise"]["within"] > 0
        assert len(point["noise"]["between_interval"]) == 2
        one, three = point["norms"]
        assert one["copies"] == pytest.approx(one["distinct"], rel=0.5)
        assert three["distinct"] < three["copies"] < 1.2 * one["copies"]
    assert points[2]["norms"] == points[3]["norms"]  # the best of two updates is the second
    written = json.loads((run / "gradients" / "gradients.json").read_text("utf-8"))
    assert written["points"] == points
    assert all((run / "gradients" / f"gradients.{ending}").stat().st_size > 1_000 for ending in ("png", "svg"))
    if task == "vision":
        check_vectorised(run)


def check_vectorised(run):
    subject = load_subject(run, start_accelerator(HERE, seed=0), 3)
    subject.loss_model.train()
    for module in subject.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    batches, views = subject.stream.take(2), [(0, 1, PLAIN), (1, 3, 0), (0, 0, 2)]
    fast = sample_gradients(subject, batches, views, 0)
    object.__setattr__(subject, "row_loss", None)
    torch.testing.assert_close(fast, sample_gradients(subject, batches, views, 0), rtol=1e-3, atol=1e-5)


def test_weights_of_another_model_are_refused(tmp_path):
    model, file = torch.nn.Linear(2, 1), tmp_path / "model.safetensors"
    for state, odd in [({"weight": model.weight}, "bias"), ({**model.state_dict(), "scale": torch.ones(1)}, "scale")]:
        save_file(state, str(file))
        with pytest.raises(UserError, match=f"is of another model than the run: {odd} is in one of them alone"):
            _load(model, str(tmp_path))
    file.write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read into the run's model"):
        _load(model, str(tmp_path))


def test_what_is_no_run_and_no_weights_of_it_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="--run DIR names the run folder"):
        GradientConfig()
    with pytest.raises(UserError, match=r"--ba-m must be numbers of at least 1, got .0."):
        GradientConfig(run="x", ba_m=[0])
    with pytest.raises(UserError, match=r"holds no config.json of train_wmt.py, train_ptb.py or train_vision.py"):
        load_subject(tmp_path, start_accelerator(HERE, seed=0), 3)
