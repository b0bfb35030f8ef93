"""scripts/plan_cluster.py: the costs of a cluster from measured runs."""

import json

import matplotlib.image
import pytest
import torch
from safetensors.torch import save_file

from bad_input import call
from distributed import run_ranks
from seqba.groups import CopyGroup
from tasks.cluster.costs import Costs, Network, fit_costs, predict


def ring(num_bytes, world, bandwidth, latency):
    """Step by step: in each a rank sends one part to its neighbour, and all do so at once."""
    seconds, part = 0.0, num_bytes / world
    for _ in range(2):  # sums are scattered, and then gathered
        for _ in range(world - 1):
            seconds += latency + part / bandwidth
    return seconds


@pytest.mark.parametrize("world", [1, 2, 3, 40, 5_000])
def test_a_ring_is_its_steps(world):
    assert Network(3e6, 1e-4).all_reduce(5e6, world) == pytest.approx(ring(5e6, world, 3e6, 1e-4))


def test_copies_and_the_rest_of_an_update_are_told_apart():
    assert fit_costs([(1, 1.5), (4, 4.5), (10, 10.5)]) == pytest.approx((1.0, 0.5))
    assert fit_costs([(4, 2.0)]) == (0.5, 0.0)
    assert fit_costs([(1, 2.0), (4, 1.0)]) == (1.125, 0.0)  # noise tells nothing


def test_rates_count_each_sample_once_and_copies_by_their_rank():
    costs, network = Costs(0.1, 0.02, 1e6, 64, overlap=0.25), Network(1e7, 1e-3)
    alone = predict(costs, network, CopyGroup(4))
    assert alone.updates == pytest.approx(1 / 0.42)
    assert alone.samples == alone.reads == pytest.approx(64 / 0.42)
    spread = predict(costs, network, CopyGroup(4, world_size=8, ranks_per_group=4))
    seconds = 0.12 + 0.75 * ring(1e6, 8, 1e7, 1e-3)
    assert spread.updates == pytest.approx(1 / seconds)
    assert spread.samples == pytest.approx(2 * 64 / seconds)
    assert spread.reduction_share == pytest.approx(1 - 0.12 / seconds)
    crowded = predict(costs, Network(1e12, 0.0), CopyGroup(4, world_size=8, ranks_per_group=4), cores=2)
    assert crowded.updates == pytest.approx(1 / (4 * 0.12), rel=1e-4)


def test_more_copies_on_more_ranks_do_as_many_updates_as_in_the_papers_figure_5():
    # ResNet-50: 25.6 million weights; 64 images a node; 1.43 steps/s for the baseline of four nodes
    costs, network = Costs(0.69, 0.0, 4 * 25.6e6, 64), Network(1.25e9, 2e-5)
    four, ten = (predict(costs, network, CopyGroup(m, world_size=4 * m, ranks_per_group=m)) for m in (4, 10))
    assert ten.updates == pytest.approx(four.updates, rel=0.02)
    assert four.samples == pytest.approx(4 * 64 * four.updates)


def finished_run(folder, num_copies, seconds, processes=1):
    folder.mkdir()
    results = {
        "num_processes": processes,
        "num_copies": num_copies,
        "seconds": seconds,
        "updates": 10,
        "unique_samples": 80,
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "model").mkdir()
    save_file({"weight": torch.zeros(1_000)}, folder / "model" / "model.safetensors")
    return folder


def test_the_script_tells_a_table_and_draws_it(tmp_path, monkeypatch, capsys):
    runs = [finished_run(tmp_path / f"m{m}", m, 10 * (0.1 * m + 0.05)) for m in (1, 4)]
    argv = ["--run", *runs, "--bandwidth", "1e9", "--ba-m", "1", "4", "--ranks", "1", "2", "4", "8", "--cpu"]
    argv += ["--ranks-per-group", "1", "0", "--output-dir", tmp_path / "plan"]
    verdict = call("plan_cluster.py", argv, monkeypatch, capsys)
    assert verdict.status == 0, verdict.error
    written = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert written["costs"]["copy_seconds"] == pytest.approx(0.1)
    assert written["costs"]["update_seconds"] == pytest.approx(0.05)
    assert written["costs"]["batch_size"] == 8
    assert 4_000 < written["costs"]["gradient_bytes"] < 4_400
    rows = {(row["M"], row["R"], row["W"]): row for row in written["rows"]}
    assert rows.keys() == {(1, 1, w) for w in (1, 2, 4, 8)} | {(4, 1, w) for w in (1, 2, 4, 8)} | {(4, 4, 4), (4, 4, 8)}
    assert rows[4, 1, 1]["updates"] == pytest.approx(1 / 0.45)
    assert rows[4, 4, 4]["updates"] == pytest.approx(1 / 0.15, rel=0.01)
    assert matplotlib.image.imread(tmp_path / "plan" / "plan.png").std() > 0.05
    assert f"{rows[4, 1, 1]['updates']:.3f}" in verdict.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--bandwidth 1e9", "no measured run: give --run"),
        ("--run {tmp} --bandwidth 1e9", "holds no finished run of a training script"),
        ("--run {tmp}/two --bandwidth 1e9", "is of 2 ranks; give runs on one"),
        ("--run {tmp}/one", "--bandwidth must be above 0 bytes a second and finite, got None"),
        ("--run {tmp}/one --bandwidth 0", "--bandwidth must be above 0"),
        ("--run {tmp}/one --bandwidth 1e9 --overlap 2", "--overlap must be from 0 to 1, got 2.0"),
        ("--run {tmp}/one --bandwidth 1e9 --ranks 0", "--ranks must be at least 1, got 0"),
        ("--run {tmp}/one --bandwidth 1e9 --ranks 3 --ranks-per-group 2", "no --ranks is a multiple of a --ranks-per"),
        ("--measure-network", "--measure-network needs ranks: torchrun"),
    ],
)
def test_bad_input_is_one_line(options, message, tmp_path, monkeypatch, capsys):
    finished_run(tmp_path / "one", 1, 1.0)
    finished_run(tmp_path / "two", 1, 1.0, processes=2)
    verdict = call("plan_cluster.py", [*options.format(tmp=tmp_path).split(), "--cpu"], monkeypatch, capsys)
    assert verdict.status == 1
    assert message in verdict.error
    assert "\n" not in verdict.error


MEASURED = """
from accelerate import Accelerator
from distributed import report
from tasks.cluster.plan import measure_network

accelerator = Accelerator(cpu=True)
network = measure_network(accelerator.device, repeats=3)
report({"world": accelerator.num_processes, "bandwidth": network.bandwidth, "latency": network.latency})
"""


@pytest.mark.trap(43)
def test_the_network_between_ranks_is_measured():
    for rank in run_ranks(MEASURED, 2):
        assert rank["world"] == 2
        assert 1e6 < rank["bandwidth"] < 1e12
        assert 0 < rank["latency"] < 0.1
