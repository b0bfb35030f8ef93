"""Random state: what was drawn once is drawn again, and nothing else draws."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from checkpoints import assert_bitwise, make, save
from seqba import keyed_generators
from seqba.checkpoint import load_checkpoint, rng_state, set_rng_state


def draws():
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]


def test_draws_after_a_restored_random_state_are_the_same(tmp_path):
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        draws()  # leaves half a pair of Gaussians in Python and in numpy
        path = save(tmp_path, seed, model=nn.Linear(2, 3))
        want = [draws(), draws()]
        set_rng_state(load_checkpoint(path, model=nn.Linear(2, 3)).rng[0])
        assert [draws(), draws()] == want


def test_saving_draws_nothing(tmp_path):
    model, optimizer = make()
    before = rng_state()
    save(tmp_path, 1, model, optimizer)
    load_checkpoint(tmp_path / "update-000001", model=model, optimizer=optimizer)
    assert_bitwise(rng_state(), before)


def test_random_state_of_other_devices_is_refused_before_anything_is_set():
    state = rng_state()
    torch.rand(3)
    random.random()
    changed = rng_state()
    foreign = {**state, "cuda": [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)}
    with pytest.raises(ValueError, match=r"CUDA devices, but \d+ are visible: resume on as many"):
        set_rng_state(foreign)
    assert_bitwise(rng_state(), changed)
    set_rng_state({**foreign, "cuda": []})
    assert_bitwise(rng_state()["torch"], state["torch"])


def test_draws_in_a_keyed_block_are_the_keys_alone_and_those_around_it_go_on():
    def drawn(*key):
        with keyed_generators(*key):
            return draws()

    random.seed(0)
    np.random.seed(0)
    draws()  # leaves half a pair of Gaussians in Python and in numpy
    before = rng_state()
    want = draws()
    set_rng_state(before)
    keys = [(0, 0), (0, 1), (1, 0), (0, 0, 0), (2**40,), (-1,)]
    for values in zip(*[drawn(*key) for key in keys], strict=True):
        assert len({str(value) for value in values}) == len(keys)  # in each of the three
    with pytest.raises(ValueError, match="cannot be empty"), keyed_generators(0, 0):
        np.random.choice(draws()[:0])
    assert drawn(0, 1) == drawn(0, 1)
    assert_bitwise(rng_state(), before)
    assert draws() == want


def test_torch_and_numpy_do_not_draw_the_same_bits_under_a_key():
    with keyed_generators(5):
        torch_bits, numpy_bits = torch.randint(1 << 32, (4,)).tolist(), np.random.randint(1 << 32, size=4).tolist()
    assert not set(torch_bits) & set(numpy_bits)
