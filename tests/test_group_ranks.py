"""Groups of ranks: M copies spread over R ranks are those that one rank would compute, and nothing is read twice."""

import json
from pathlib import Path

import pytest
import torch
from group_runs import SCRIPTS, run, run_trainer, write_text

from distributed import run_ranks

pytestmark = pytest.mark.slow
TASKS = list(SCRIPTS)
FAMILIES = ("marian", "llama")  # of Trainers
STREAMS = "--ba-m 4 --reproducible-copies"

RANKS = """
import json, os, sys, torch
from pathlib import Path
from distributed import report
from group_runs import run, run_trainer

folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
found = {}
for name, (task, options, updates) in cases.items():
    (folder / name).mkdir(exist_ok=True)
    for side in ("en", "de"):
        text = folder / name / f"text.{side}"
        if os.environ["RANK"] == "0":
            text.write_text((folder / f"text.{side}").read_text())
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if task in ("marian", "llama"):
        seen = run_trainer(task, *options, str(folder / name))
    else:
        seen = run(task, options, str(folder / name), updates)
    tensors = {"weights": seen.pop("weights"), "gradients": seen.pop("gradients")}
    if os.environ["RANK"] == "0":
        torch.save(tensors, folder / f"{name}.pt")
    found[name] = seen
report(found)
"""


def cases(**options):
    return {f"{task}-{name}": (task, text, count) for task in TASKS for name, (text, count) in options.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each rank saw of each run, by name; and the folder of their weights."""
    folder = tmp_path_factory.mktemp("groups")
    write_text(folder)
    found = {}
    four = cases(w4r4=(f"{STREAMS} --ranks-per-group 4", 5), w4r2=(f"{STREAMS} --ranks-per-group 2", 5))
    two = cases(
        w2r2=(f"{STREAMS} --ranks-per-group 2", 5),
        w2r1=(STREAMS, 5),
        masks=("--ba-m 2 --ranks-per-group 2", 12),
        each=("--ba-m 2 --ranks-per-group 2 --group-broadcast off", 12),
    )
    four |= {f"{family}-w4r2": (family, (2, 1), 5) for family in FAMILIES}
    two |= {f"{family}-w2r2": (family, (2, 1), 5) for family in FAMILIES}
    for world, chosen in ((4, four), (2, two)):
        ranks = run_ranks(RANKS, world, args=[str(folder), json.dumps(chosen)], timeout=400)
        for name in chosen:
            found[name] = [rank[name] for rank in ranks]
            assert [seen["world"] for seen in found[name]] == [world] * world
    for name, (task, text, count) in cases(alone=(STREAMS, 5), accumulated=(f"{STREAMS} --accumulation 2", 5)).items():
        (folder / name).mkdir()
        write_text(folder / name)
        found[name] = [run(task, text, str(folder / name), count)]
    for family in FAMILIES:
        found[f"{family}-alone"] = [run_trainer(family, 1, 1, str(folder / f"{family}-alone"))]
        found[f"{family}-accumulated"] = [run_trainer(family, 1, 2, str(folder / f"{family}-accumulated"))]
    for name, seen in found.items():
        if "weights" in seen[0]:
            torch.save({key: seen[0].pop(key) for key in ("weights", "gradients")}, folder / f"{name}.pt")
    return found, folder


def tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    found = torch.load(folder / f"{name}.pt")
    return {f"{kind} {name}": x for kind, named in found.items() for name, x in named.items()}


@pytest.mark.trap(43)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("spread", "alone"), [("w4r4", "alone"), ("w2r2", "alone"), ("w4r2", "accumulated"), ("w2r1", "accumulated")]
)
def test_copies_spread_over_ranks_learn_what_one_rank_does(task, spread, alone, runs):
    want, got = (tensors(runs[1], f"{task}-{name}") for name in (alone, spread))
    assert want.keys() == got.keys()
    for name, x in want.items():
        if name.endswith("attn.k_proj.bias"):
            continue  # softmax does not see it: its gradient is rounding alone, which Adam makes steps of
        torch.testing.assert_close(got[name], x, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", ["marian", "llama"])
@pytest.mark.parametrize(("spread", "alone"), [("w2r2", "alone"), ("w4r2", "accumulated")])
def test_a_trainer_learns_the_same_on_groups_of_ranks(family, spread, alone, runs):
    want, got = (tensors(runs[1], f"{family}-{name}") for name in (alone, spread))
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    counted = [
        {tuple(seen["counters"][name] for name in ("unique_samples", "seen_instances")) for seen in runs[0][name]}
        for name in (f"{family}-{alone}", f"{family}-{spread}")
    ]
    assert counted[0] == counted[1]
    ((samples, instances),) = counted[0]
    assert instances == 4 * samples > 0


@pytest.mark.trap(15)
@pytest.mark.parametrize("task", TASKS)
def test_ranks_share_a_batch_iff_they_are_in_one_group(task, runs):
    ranks = [seen["samples"] for seen in runs[0][f"{task}-w4r2"]]
    assert ranks[0] == ranks[1]
    assert ranks[2] == ranks[3]
    assert all(a != b for a, b in zip(ranks[0], ranks[2], strict=True))
    accumulated = runs[0][f"{task}-accumulated"][0]["samples"]
    assert [[*a, *b] for a, b in zip(ranks[0], ranks[2], strict=True)] == accumulated  # the data order knows no R


@pytest.mark.trap(13)
@pytest.mark.trap(14)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("how", ["masks", "each"])
def test_ranks_of_a_group_never_draw_the_same(task, how, runs):
    first, second = (seen["masks"] for seen in runs[0][f"{task}-{how}"])
    assert len(first) == len(second) >= 12
    assert not set(first) & set(second)
    if task != "language_modelling":  # lengths of windows vary, and few units may draw one mask twice
        assert len(set(first)) > 0.9 * len(first)


@pytest.mark.parametrize("task", TASKS)
def test_the_first_rank_of_a_group_reads_for_all(task, runs):
    reader, other = runs[0][f"{task}-masks"]
    met = sum(len(batch) for update in reader["samples"] for batch in update)
    ahead = max(len(batch) for update in reader["samples"] for batch in update)
    if task == "vision":  # its images lie in memory as one tensor
        assert (reader["read"], other["read"]) == (met, met)
    else:
        assert met <= reader["read"] <= met + 2 * ahead
        assert other["read"] == 0
    both = runs[0][f"{task}-each"]
    assert [seen["samples"] for seen in both] == [reader["samples"], other["samples"]]
    assert [seen["masks"] for seen in both] == [reader["masks"], other["masks"]]
    assert both[0]["read"] == both[1]["read"] >= met


def test_a_sample_of_an_epoch_is_met_by_one_group_and_counted_once(runs):
    ranks = runs[0]["translation-w2r1"]
    met = [n for seen in ranks for update in seen["samples"] for batch in update for n in batch]
    assert ranks[0]["counted"] == ranks[1]["counted"] == len(met)
    grouped = runs[0]["translation-w4r2"]
    updates = [[n for group in both for batch in group for n in batch]
               for both in zip(grouped[0]["samples"], grouped[2]["samples"], strict=True)]  # fmt: skip
    assert {seen["counted"] for seen in grouped} == {sum(map(len, updates))}
    epoch: list[int] = []
    while set(epoch) != set(range(40)):
        assert len(epoch) == len(set(epoch))  # only its last update is filled with samples that were met
        epoch += updates.pop(0)
