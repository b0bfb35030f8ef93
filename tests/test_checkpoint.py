"""Checkpoints: exact, verified, pruned, and free of pickles. (Kills and full disks: test_checkpoint_kills.)"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from checkpoints import FILES, OPTIMIZERS, VOCABULARY, WIDTH, assert_bitwise, make, names, save, step
from seqba.checkpoint import (
    checkpoint_fault,
    find_checkpoint,
    load_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from seqba.checkpoint import files as checkpoint_files
from seqba.sampler import TokenBatchSampler
from seqba.schedule import inverse_sqrt

# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_resumed_model_and_optimizer_are_bitwise_those_saved(tmp_path, optimizer, dtype):
    model, optim = make(optimizer, dtype)
    for update in range(3):
        step(model, optim, seed=update)
    save(tmp_path, 3, model, optim)
    again, optim_again = make(optimizer, dtype, seed=99)
    load_checkpoint(tmp_path / "update-000003", model=again, optimizer=optim_again)
    assert again.output.weight is again.embedding.weight
    assert_bitwise(optim_again.state_dict(), optim.state_dict())
    for m, o in ((model, optim), (again, optim_again)):
        step(m, o, seed=50)
    assert_bitwise(again.state_dict(), model.state_dict())
    assert_bitwise(optim_again.state_dict(), optim.state_dict())


def test_a_tensor_that_is_a_slice_of_another_is_saved_and_filled(tmp_path):
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3))
            self.register_buffer("head", self.weight.detach()[1:3])
            self.register_buffer("column", self.weight.detach()[:, 1])

    model, again = Sliced(), Sliced()
    save_checkpoint(tmp_path, 1, model=model, counters={}, rng=[rng_state()])
    load_checkpoint(tmp_path / "update-000001", model=again)
    assert_bitwise(again.state_dict(), model.state_dict())
    with torch.no_grad():
        again.weight[1] = 7.0
    assert float(again.head[0, 0]) == 7.0  # still a view


def test_two_writers_of_one_folder_do_not_meet(tmp_path):
    def write(update):
        for _ in range(5):
            save(tmp_path, update, keep=10)

    with ThreadPoolExecutor(2) as writers:
        list(writers.map(write, (3, 3)))
    assert names(tmp_path) == ["update-000003"]
    assert checkpoint_fault(tmp_path / "update-000003") is None


def test_the_rest_comes_back_as_it_was(tmp_path):
    tensors = {"hidden.0": torch.randn(2, 3, 5).transpose(0, 1), "cell.0": torch.randn(4).bfloat16()}
    counters = {"sampler": {"epoch": 2, "none": None}, "best": math.inf, "words": "größer", "unique": 2**40}
    rng = [rng_state(), rng_state()]
    path = save(tmp_path, 1_234_567, counters=counters, tensors=tensors, rng=rng)
    assert path.name == "update-1234567"
    loaded = load_checkpoint(path, model=make()[0])
    assert (loaded.path, loaded.update, loaded.counters, len(loaded.rng)) == (path, 1_234_567, counters, 2)
    assert_bitwise(loaded.tensors, tensors)
    assert names(path) == sorted(FILES)


def test_an_optimizer_is_optional_on_both_sides(tmp_path):
    model, optimizer = make()
    without = save(tmp_path, 1, model)
    assert load_checkpoint(save(tmp_path, 2), model=model).tensors == {}
    with pytest.raises(ValueError, match="holds no optimizer: load it without one"):
        load_checkpoint(without, model=model, optimizer=optimizer)


# Resuming a run


def run(folder, num_updates, *, resume=False):
    """A run on 2 copies: its ids and losses by update, and its weights. Everything is built anew."""
    seed = 77 if resume else 0
    random.seed(seed)
    np.random.seed(seed)
    model, optimizer = make(seed=seed)
    lengths = torch.randint(1, 9, (40,), generator=torch.Generator().manual_seed(5))
    sampler = TokenBatchSampler(lengths, 32, seed=3)
    data = DataLoader(range(40), batch_sampler=sampler, collate_fn=list, generator=torch.Generator())
    update = 0
    if resume:
        path, faults = find_checkpoint(folder)
        loaded = load_checkpoint(path, model=model, optimizer=optimizer)
        sampler.load_state_dict(loaded.counters["sampler"])
        set_rng_state(loaded.rng[0])
        update = loaded.update
        assert not faults
    trace = []
    while True:
        for batches_done, ids in enumerate(data, start=sampler.first_batch + 1):
            update += 1
            optimizer.param_groups[0]["lr"] = inverse_sqrt(update, peak_lr=0.1, warmup_updates=3)
            noise = random.random() + np.random.rand()
            loss = model(torch.tensor(ids * 2) % VOCABULARY).square().mean() * noise
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            trace.append((ids, loss.item()))
            if len(trace) == num_updates:
                counters = {"sampler": sampler.state_dict(batches_done)}
                save(folder, update, model, optimizer, counters=counters)
                return trace, model.state_dict()
        sampler.set_epoch(sampler.epoch + 1)


@pytest.mark.trap(24)
@pytest.mark.parametrize(("before", "after"), [(2, 2), (6, 7), (9, 6), (13, 13)])
def test_updates_and_updates_after_a_resume_equal_a_straight_run(tmp_path, before, after):
    """Ids, losses and weights, bitwise: inside the first epoch of 6 updates, at its end, and inside later ones."""
    straight, want = run(tmp_path / "straight", before + after)
    first, _ = run(tmp_path / "resumed", before)
    rest, got = run(tmp_path / "resumed", after, resume=True)
    assert first + rest == straight
    assert_bitwise(got, want)


# Damage


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "emptied", "one bit", "removed"])
def test_damage_is_found_named_and_passed_over(tmp_path, name, damage):
    good, bad = (save(tmp_path, update, tensors={"h": torch.ones(3)}) for update in (1, 2))
    file = bad / name
    content = bytearray(file.read_bytes())
    if damage == "one bit":
        content[len(content) // 2] ^= 1
    changed = {"truncated": content[:-1], "emptied": b"", "one bit": content, "removed": None}[damage]
    file.write_bytes(changed) if changed is not None else file.unlink()
    found, faults = find_checkpoint(tmp_path)
    assert found == good
    assert len(faults) == 1
    assert str(bad) in faults[0]
    assert name in faults[0]
    model, _ = make(seed=3)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"update-000002 is damaged: .*{name}"):
        load_checkpoint(bad, model=model)
    assert_bitwise(dict(model.state_dict()), before)


def test_every_bit_of_a_manifest_counts(tmp_path):
    path = save(tmp_path, 1) / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        assert find_checkpoint(tmp_path)[0] is None, content[position - 20 : position + 20]


def test_where_nothing_is_intact_nothing_is_found(tmp_path):
    assert find_checkpoint(tmp_path / "missing") == (None, [])
    (tmp_path / "update-000001").mkdir()
    (tmp_path / "update-best").mkdir()
    found, faults = find_checkpoint(tmp_path)
    assert found is None
    assert len(faults) == 1
    assert "manifest.json is missing" in faults[0]


class Bomb:
    def __reduce__(self):
        return (os.mkdir, (str(Path(os.environ["BOMB"])),))


@pytest.mark.parametrize("name", ["optimizer.pt", "rng.pt"])
def test_a_pickle_with_code_is_refused_though_its_manifest_fits(tmp_path, monkeypatch, name):
    monkeypatch.setenv("BOMB", str(tmp_path / "bomb"))
    path = save(tmp_path / "run", 1)
    torch.save({"state": Bomb(), "param_groups": []}, path / name)
    (path / "manifest.json").unlink()
    checkpoint_files.write_manifest(path, 1)
    assert find_checkpoint(tmp_path / "run") == (path, [])
    model, optimizer = make(seed=3)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{name} is refused: it is not a file of tensors and plain values"):
        load_checkpoint(path, model=model, optimizer=optimizer)
    assert not (tmp_path / "bomb").exists()
    assert_bitwise(dict(model.state_dict()), before)


def test_what_could_not_be_read_back_is_refused_when_it_is_saved(tmp_path):
    model, optimizer = make()
    save(tmp_path, 1)
    optimizer.param_groups[0]["lr"] = np.float64(0.1)
    with pytest.raises(ValueError, match=r"optimizer.pt could not be read back without unpickling: .* becomes a float"):
        save(tmp_path, 2, model, optimizer)
    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        save(tmp_path, 2, counters={"best": torch.ones(())})
    with pytest.raises(ValueError, match="tensors only, but 'best' is a float"):
        save(tmp_path, 2, tensors={"best": 0.5})
    assert names(tmp_path) == ["update-000001"]


# Other models


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: setattr(m, "more", nn.Linear(2, 2)), "more.bias is not in the checkpoint; more.weight is not"),
        (lambda m: delattr(m, "norm"), "norm.bias is not in the model; .*norm.weight is not in the model"),
        (
            lambda m: setattr(m.output, "bias", nn.Parameter(torch.ones(5))),
            r"output.bias is \(11,\) float32 .*, \(5,\)",
        ),
        (lambda m: m.bfloat16(), r"embedding.weight is \(11, 6\) float32 in the checkpoint, \(11, 6\) bfloat16 in"),
        (
            lambda m: setattr(m.output, "weight", nn.Parameter(torch.ones(VOCABULARY, WIDTH))),
            "it ties {'output.weight': 'embedding.weight'}, the model nothing",
        ),
    ],
)
def test_another_model_is_refused_and_left_alone(tmp_path, change, text):
    path = save(tmp_path, 1)
    model, optimizer = make(seed=3)
    change(model)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"update-000001 is not of this model: .*{text}"):
        load_checkpoint(path, model=model, optimizer=optimizer)
    assert_bitwise(dict(model.state_dict()), before)
    assert not optimizer.state


def test_an_optimizer_over_other_parameters_is_refused_and_nothing_is_loaded(tmp_path):
    path = save(tmp_path, 1)
    model, _ = make(seed=3)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"groups hold \[4\] parameters, not \[1\]"):
        load_checkpoint(path, model=model, optimizer=torch.optim.Adam([model.output.bias]))
    assert_bitwise(dict(model.state_dict()), before)


# Housekeeping


def test_pruning_keeps_the_newest_and_the_pinned(tmp_path):
    for update in (1, 2, 3, 10, 11):
        save(tmp_path, update, keep=2, pinned=[2])
    assert names(tmp_path) == ["update-000002", "update-000010", "update-000011"]
    save(tmp_path, 12, keep=1)
    assert names(tmp_path) == ["update-000012"]


def test_checkpoints_are_ordered_by_number_also_where_it_has_a_digit_more(tmp_path):
    for update in (999_999, 1_000_000):
        save(tmp_path, update, keep=2)
    assert find_checkpoint(tmp_path) == (tmp_path / "update-1000000", [])
    save(tmp_path, 1_000_001, keep=1)
    assert names(tmp_path) == ["update-1000001"]


def test_an_update_saved_again_replaces_the_old_one(tmp_path):
    save(tmp_path, 5, counters={"try": 1})
    path = save(tmp_path, 5, counters={"try": 2})
    assert names(tmp_path) == ["update-000005"]
    assert load_checkpoint(path, model=make()[0]).counters == {"try": 2}


def test_checkpoints_of_a_future_that_was_given_up_go(tmp_path):
    """A run that fell back before a damaged checkpoint must never resume from what came after."""
    for update in (10, 20, 30):
        save(tmp_path, update, keep=3)
    (tmp_path / "update-000020" / "counters.json").write_text("{}")
    save(tmp_path, 15, keep=1, pinned=[30])
    assert names(tmp_path) == ["update-000015", "update-000030"]


def test_what_a_killed_save_left_is_cleared_by_the_next(tmp_path):
    shutil.copytree(save(tmp_path, 1), tmp_path / ".tmp-update-000002")
    (tmp_path / "update-000001").rename(tmp_path / "update-000001.replaced")
    assert find_checkpoint(tmp_path) == (tmp_path / "update-000001.replaced", [])
    save(tmp_path, 2)
    assert names(tmp_path) == ["update-000001", "update-000002"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"update": -1}, "update must be at least 0 and keep at least 1, got update=-1"),
        ({"keep": 0}, "got update=1 and keep=0"),
        ({"rng": []}, "rng must be a list with the rng_state"),
        ({"rng": {"python": 3}}, "rng must be a list with the rng_state"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        save(tmp_path, **({"update": 1} | options))


def test_a_manifest_is_readable(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["update"] == 1
    assert manifest["files"]["counters.json"]["bytes"] == (path / "counters.json").stat().st_size
