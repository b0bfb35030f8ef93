"""What only a CUDA device shows; `python -m pytest -m gpu`."""

import pytest
import torch
from torch import nn

from seqba import copy_streams, repeat_batch, unfold
from tiny_models import FAMILIES, batch_for, enable_checkpointing, gradients, summed_nll

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
    network = nn.LSTM(6, 8, num_layers=2, dropout=0.5).cuda()
    with pytest.raises(RuntimeError, match="_cudnn"), copy_streams((0, 1), seed=1, update=2):
        network(torch.randn(5, 2 * B, 6, device="cuda"))


def test_the_generators_of_the_device_are_as_before():
    torch.rand(3, device="cuda")
    state = torch.cuda.get_rng_state()
    with copy_streams((0, 1), seed=1, update=2):
        nn.functional.dropout(torch.ones(4, 8, device="cuda"), 0.5)
    assert torch.equal(torch.cuda.get_rng_state(), state)
