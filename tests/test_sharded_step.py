"""FSDP2 (`fully_shard`): the same update as one process does, under every plan; and reduction in each pass."""

import pytest
import torch

from distributed import run_ranks

RANKS = """
import torch
from accelerate import Accelerator
from distributed import report
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from test_sharded_step import ROWS, network, rows_of, summed
from seqba import TrainStep

accelerator = Accelerator(cpu=True)
rank, world = accelerator.process_index, accelerator.num_processes
found = {"world": world}

def full(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).flatten().tolist()

for engine in ("fsdp2", "ddp"):
    for group, every, copies in ((1, None, 2), (1, False, 1), (1, True, 1), (2, None, 1), (2, None, 2)):
        model = network()
        calls = []
        if engine == "fsdp2":
            mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
            for layer in model:
                if isinstance(layer, torch.nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert isinstance(model, FSDPModule)
        else:
            model = DistributedDataParallel(model)
            def hook(state, bucket):
                calls.append(1)
                work = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
                return work.then(lambda done: bucket.buffer().div_(world))
            model.register_comm_hook(None, hook)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        step = TrainStep(accelerator, model, optimizer, loss_fn=summed, count_fn=len, num_copies=4,
                         copies_per_pass=copies, ranks_per_group=group, copy_seed=5, max_norm=0.5,
                         reduce_every_pass=every)
        shard = rank // group
        norms = []
        for update in (1, 2, 3):
            mine = rows_of(update, shard, world // group)
            norms.append(float(step([mine], update=update).grad_norm))
        name = f"{engine}-{group}-{every}-{copies}"
        found[name] = {"norms": norms, "weights": [full(p) for p in model.parameters()], "calls": len(calls)}
report(found)
"""
ROWS = 8


def network() -> torch.nn.Sequential:
    torch.manual_seed(3)
    linear = torch.nn.Linear
    return torch.nn.Sequential(linear(6, 16), torch.nn.Dropout(0.3), torch.nn.Tanh(), linear(16, 5)).double()


def rows_of(update: int, shard: int, shards: int) -> torch.Tensor:
    rows = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(update)).double()
    return rows[shard * ROWS // shards : (shard + 1) * ROWS // shards]


def summed(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return model(rows).square().sum()


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(RANKS, 2)


def alone(group: int) -> tuple[list[float], list[torch.Tensor]]:
    from accelerate import Accelerator

    from seqba import TrainStep

    model = network()
    step = TrainStep(
        Accelerator(cpu=True),
        model,
        torch.optim.Adam(model.parameters(), lr=0.01),
        loss_fn=summed,
        count_fn=len,
        num_copies=4,
        copy_seed=5,
        max_norm=0.5,
    )
    shards = 2 // group
    norms = []
    for update in (1, 2, 3):
        batches = [rows_of(update, shard, shards) for shard in range(shards)]
        norms.append(float(step(batches, update=update).grad_norm))
    return norms, list(model.parameters())


@pytest.mark.trap(43)
@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
@pytest.mark.parametrize(
    ("group", "every", "copies"), [(1, None, 2), (1, False, 1), (1, True, 1), (2, None, 1), (2, None, 2)]
)
def test_every_engine_and_plan_does_the_update_of_one_process(engine, group, every, copies, ranks):
    norms, weights = alone(group)
    for rank in ranks:
        assert rank["world"] == 2
        seen = rank[f"{engine}-{group}-{every}-{copies}"]
        assert seen["norms"] == pytest.approx(norms, rel=1e-6)
        for got, want in zip(seen["weights"], weights, strict=True):
            assert got == pytest.approx(want.flatten().tolist(), abs=1e-6)


@pytest.mark.trap(39)
def test_ddp_reduces_in_the_last_pass_alone_unless_it_is_told_to_in_each(ranks):
    calls = {
        (every, copies): ranks[0][f"ddp-1-{every}-{copies}"]["calls"]
        for every, copies in ((None, 2), (False, 1), (True, 1))
    }
    buckets = calls[False, 1] // 3  # updates
    assert calls == {(None, 2): 3 * buckets, (False, 1): 3 * buckets, (True, 1): 3 * 4 * buckets}
