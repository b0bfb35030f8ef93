"""What only a CUDA device shows; `python -m pytest -m gpu`."""

import pytest
import torch
from torch import nn

from seqba import copy_streams, repeat_batch, unfold
from seqba.draws.generators import seeded_generators
from tiny_models import FAMILIES, batch_for, enable_checkpointing, gradients, summed_nll
from trainers import Samples, batches_of, make, token_gradient, trainer_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
M, B = 4, 3


def plan_gradients(model, batch, copies_per_pass):
    model.train()
    model.zero_grad()
    for start in range(0, M, copies_per_pass):
        copies = tuple(range(start, min(start + copies_per_pass, M)))
        with copy_streams(copies, seed=1, update=2, num_samples=B):
            summed_nll(model, repeat_batch(batch, len(copies))).backward()
    return gradients(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_equals_accumulated_on_a_gpu_also_when_checkpointing_replays_on_another_thread(family, checkpointing):
    model = FAMILIES[family]().cuda()
    batch = {name: x.cuda() for name, x in batch_for(family).items()}
    want = plan_gradients(model, batch, M)
    if checkpointing:
        enable_checkpointing(model, use_reentrant=False)
    for copies_per_pass in (1, 3, 4):
        got = plan_gradients(model, batch, copies_per_pass)
        scale = max(float(g.abs().max()) for g in want.values())
        for name in want:
            torch.testing.assert_close(got[name] / scale, want[name] / scale, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("width", [16, 33])  # aligned for the vectorised kernel, and not
def test_masks_on_a_gpu_do_not_depend_on_who_else_is_in_the_pass(width):
    x = torch.ones(B, 5, width, device="cuda")
    with copy_streams(range(M), seed=1, update=2):
        fused = unfold(nn.functional.dropout(repeat_batch(x, M), 0.5), M)
    for copy in range(M):
        with copy_streams((copy,), seed=1, update=2):
            assert torch.equal(nn.functional.dropout(x, 0.5), fused[copy])


def test_cudnns_recurrent_dropout_is_refused_by_name():
    network, x = nn.LSTM(6, 8, num_layers=2, dropout=0.5).cuda(), torch.randn(5, 2 * B, 6, device="cuda")
    with pytest.raises(RuntimeError, match="_cudnn"), copy_streams((0, 1), seed=1, update=2):
        network(x)


def test_the_generators_of_the_device_are_as_before():
    torch.rand(3, device="cuda")
    state = torch.cuda.get_rng_state()
    with copy_streams((0, 1), seed=1, update=2):
        nn.functional.dropout(torch.ones(4, 8, device="cuda"), 0.5)
    assert torch.equal(torch.cuda.get_rng_state(), state)


# ---- the Trainer


def cuda_gradients(folder, model, **more):
    """A Trainer's gradients on the GPU, of two accumulated batches of an update."""
    settings = {"use_cpu": False, "gradient_accumulation_steps": 2, **more.pop("settings", {})}
    return trainer_gradients(folder, model, Samples("llama", 5), settings=settings, **more)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
@pytest.mark.parametrize("copies_per_pass", [1, 3])
def test_a_trainers_gradient_on_a_gpu_is_the_mean_token_loss_also_behind_the_loss_scaler(
    precision, copies_per_pass, tmp_path
):
    model = FAMILIES["llama"](dropout=0.0)
    want = token_gradient(model, batches_of(Samples("llama", 5)))
    options = {"ba_m": 3, "copies_per_pass": copies_per_pass, "allow_identical_copies": True, "settings": precision}
    (got,) = cuda_gradients(tmp_path, model, **options)
    scale = max(float(x.norm()) for x in want.values())
    for name in want:
        assert float((got[name].cpu() - want[name]).norm()) / scale < (2e-2 if precision else 1e-4), name


def test_a_trainers_streams_on_a_gpu_do_not_see_the_plan(tmp_path):
    model = FAMILIES["llama"](dropout=0.3)
    found = [cuda_gradients(tmp_path, model, ba_m=4, copies_per_pass=k, reproducible_copies=True)[0] for k in (1, 3, 4)]
    for got in found[1:]:
        for name in got:
            torch.testing.assert_close(got[name], found[0][name], rtol=1e-3, atol=1e-5)


def test_the_generators_of_a_rank_reach_the_gpu_and_are_put_back():
    state = torch.cuda.get_rng_state()
    drawn = []
    for shard in (0, 1, 0):
        with seeded_generators(7, 1, shard):
            drawn.append(torch.rand(4, device="cuda"))
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_auto_halves_where_the_gpus_memory_ends(tmp_path):
    model = FAMILIES["llama"](dropout=0.3)
    free, _ = torch.cuda.mem_get_info()

    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, input_ids, labels=None, attention_mask=None, **kwargs):
            if torch.is_grad_enabled():
                torch.empty(len(input_ids) * free // 8, dtype=torch.uint8, device="cuda")
            return self.model(input_ids=input_ids, labels=labels, attention_mask=attention_mask, **kwargs)

    trainer = make(tmp_path, Large(), Samples("llama", 3), ba_m=4, settings={"use_cpu": False})
    trainer.train()
    assert trainer.counters.copies_per_pass == 2  # 6 of 8 parts; 12 are too many
