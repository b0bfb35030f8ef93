"""Checkpoints of a model that is sharded over ranks: gathered by all of them, read on any number."""

import json

import pytest
import torch
from torch import nn

from distributed import run_ranks
from seqba.checkpoint import full_state_dict, load_checkpoint, rng_state, save_checkpoint


class Tied(nn.Module):
    """Rows that two ranks cannot share evenly, an output layer that is the embedding, a buffer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.output = nn.Linear(5, 7, bias=False)
        self.output.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(1))  # smaller than the number of ranks
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, ids):
        self.seen += 1
        return self.output(self.embedding(ids)) * self.scale


def updates(model, optimizer, numbers):
    for number in numbers:
        ids = torch.randint(7, (4,), generator=torch.Generator().manual_seed(number))
        model(ids).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def make(seed=0):
    torch.manual_seed(seed)
    model = Tied()
    return model, torch.optim.Adam(model.parameters(), lr=0.1)


RANKS = """
import sys
import torch
from accelerate import Accelerator
from distributed import report
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from seqba.checkpoint import full_state_dict, load_checkpoint, rng_state, save_checkpoint
from test_checkpoint_shards import Tied, updates

folder, = sys.argv[1:]
accelerator = Accelerator(cpu=True)

def make(seed):
    torch.manual_seed(seed)
    model = Tied()
    fully_shard(model, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    return model, torch.optim.Adam(model.parameters(), lr=0.1)

model, optimizer = make(0)
updates(model, optimizer, (1, 2))
main = accelerator.is_main_process
state, moments = (full_state_dict(x, keep=main) for x in (model, optimizer))
if main:
    save_checkpoint(folder, 2, model=state, optimizer=moments, counters={}, rng=[rng_state()] * 2)
accelerator.wait_for_everyone()
again, resumed = make(1)
load_checkpoint(f"{folder}/update-000002", model=again, optimizer=resumed)
for one, its in ((model, optimizer), (again, resumed)):
    updates(one, its, (3, 4))
gathered = [full_state_dict(x) for x in (model, again)]
report({
    "num_processes": accelerator.num_processes,
    "sharded": [isinstance(p, DTensor) for p in again.parameters()],
    "same": [torch.equal(a, b) for a, b in zip(gathered[0].values(), gathered[1].values(), strict=True)],
    "weights": gathered[0]["embedding.weight"].tolist(),
    "kept": [x.numel() for x in state.values()],
})
"""


@pytest.mark.trap(43)
def test_two_ranks_of_shards_write_what_one_rank_reads_and_go_on_bitwise(tmp_path):
    ranks = run_ranks(RANKS, 2, args=[str(tmp_path)])
    assert [rank["num_processes"] for rank in ranks] == [2, 2]
    assert all(all(rank["sharded"]) and all(rank["same"]) for rank in ranks)
    assert ranks[0]["kept"] == [1, 3, 35, 35]
    assert ranks[1]["kept"] == [0, 3, 0, 0]  # it helps to gather, and holds nothing of what is sharded
    model, optimizer = make(seed=5)
    load_checkpoint(tmp_path / "update-000002", model=model, optimizer=optimizer)
    straight, its = make()
    updates(straight, its, (1, 2))
    torch.testing.assert_close(model.embedding.weight, straight.embedding.weight)
    updates(model, optimizer, (3, 4))
    torch.testing.assert_close(model.embedding.weight, torch.tensor(ranks[0]["weights"]))
    assert model.output.weight is model.embedding.weight


def test_a_model_on_one_rank_is_gathered_without_a_copy_and_an_optimizer_without_a_step(tmp_path):
    model, optimizer = make()
    state = full_state_dict(model)
    assert state.keys() == model.state_dict().keys()
    assert all(x.data_ptr() == y.data_ptr() and not x.requires_grad for x, y in zip(
        state.values(), model.state_dict().values(), strict=True
    ))  # fmt: skip
    assert full_state_dict(optimizer)["state"] == {} == optimizer.state_dict()["state"]
    save_checkpoint(tmp_path, 1, model=state, optimizer=full_state_dict(optimizer), counters={}, rng=[rng_state()])
    save_checkpoint(tmp_path, 2, model=model, optimizer=optimizer, counters={}, rng=[rng_state()])
    one, two = (
        json.loads((tmp_path / f"update-00000{n}" / "manifest.json").read_text())["files"]["optimizer.pt"]
        for n in (1, 2)
    )
    assert one == two
