"""Samplers of batches: budget or fixed size, order, shards, resuming, and what accelerate makes of them."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState, PartialState
from torch.utils.data import DataLoader, default_collate

from seqba.collator import BatchAugmentationCollator
from seqba.sampler import FixedBatchSampler, TokenBatchSampler

NUM_SAMPLES = 207
MAX_TOKENS = 64


@pytest.fixture(scope="module")
def lengths():
    return np.clip(np.random.default_rng(5).lognormal(2.2, 0.6, NUM_SAMPLES).astype(int), 1, 50)


@pytest.fixture
def one_process():
    """Accelerate's process state, CPU, left as it was found."""
    fresh = not PartialState._shared_state
    PartialState(cpu=True)
    yield
    if fresh:
        AcceleratorState._reset_state(reset_partial_state=True)


def epoch_of(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return list(sampler)


def ids(batches):
    return list(itertools.chain.from_iterable(batches))


def loader_of(lengths, num_copies, **options):
    """The loader of a run: B samples by the token budget, then each of them M times."""
    return DataLoader(
        [{"input_ids": n} for n in range(len(lengths))],
        batch_sampler=TokenBatchSampler(lengths, MAX_TOKENS, seed=3, **options),
        collate_fn=BatchAugmentationCollator(default_collate, num_copies),
        generator=torch.Generator(),
    )


# Budget and order


@pytest.mark.parametrize("max_tokens", [50, 64, 777, 100_000])
@pytest.mark.parametrize("max_samples", [None, 1, 3])
def test_every_sample_once_and_the_budget_never_exceeded(lengths, max_tokens, max_samples):
    batches = epoch_of(TokenBatchSampler(lengths, max_tokens, max_samples=max_samples))
    assert sorted(ids(batches)) == list(range(NUM_SAMPLES))
    assert max(max(lengths[batch]) * len(batch) for batch in batches) <= max_tokens
    assert max_samples is None or max(map(len, batches)) <= max_samples


def test_batches_are_as_large_as_the_budget_allows(lengths):
    """Greedy: no two batches that are neighbours in length would fit into one."""
    batches = epoch_of(TokenBatchSampler(lengths, MAX_TOKENS))
    batches.sort(key=lambda batch: (max(lengths[batch]), min(lengths[batch])), reverse=True)
    for longer, shorter in itertools.pairwise(batches):
        assert max(lengths[longer]) * (len(longer) + 1) > MAX_TOKENS
        assert min(lengths[longer]) >= max(lengths[shorter])


def test_bucketing_wastes_little_of_the_budget():
    lengths = np.clip(np.random.default_rng(0).lognormal(3.2, 0.6, 20_000).astype(int), 1, 400)
    order = np.random.default_rng(1).permutation(len(lengths))
    at_random = [order[start : start + 100] for start in range(0, len(order), 100)]

    def efficiency(batches):
        return lengths.sum() / sum(max(lengths[batch]) * len(batch) for batch in batches)

    assert efficiency(at_random) < 0.4
    assert efficiency(epoch_of(TokenBatchSampler(lengths, 4096))) > 0.98


def test_order_is_a_function_of_seed_and_epoch_alone(lengths):
    def orders(seed):
        sampler = TokenBatchSampler(lengths, MAX_TOKENS, seed=seed)
        return [epoch_of(sampler, epoch) for epoch in range(3)]

    torch.manual_seed(1)
    want = orders(seed=7)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert orders(seed=7) == want
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert len({str(order) for order in want + orders(seed=8)}) == 6


def test_composition_changes_with_the_epoch_but_the_number_of_batches_does_not(lengths):
    sampler = TokenBatchSampler(lengths, MAX_TOKENS)
    first, second = ({frozenset(batch) for batch in epoch_of(sampler, epoch)} for epoch in (0, 1))
    assert len(first) == len(second) == len(sampler)
    assert len(first & second) < len(first) / 2


def test_equal_lengths_are_a_plain_shuffle():
    first, second = (epoch_of(TokenBatchSampler([4] * 30, 20), epoch) for epoch in (0, 1))
    assert [len(batch) for batch in first] == [5] * 6
    assert ids(first) != ids(second) != list(range(30))


def test_the_order_is_pinned_so_that_a_new_release_resumes_an_old_run():
    sampler = TokenBatchSampler([4, 4, 2, 4, 2, 4, 3, 1], 8, seed=11)
    assert epoch_of(sampler, 2) == [[2, 7], [3, 0], [6, 4], [1, 5]]


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda x: np.array(x, dtype=np.uint8)])
def test_lengths_may_be_any_sequence_of_integers(kind):
    lengths = [4, 112, 2, 4, 9]
    assert epoch_of(TokenBatchSampler(kind(lengths), 300)) == epoch_of(TokenBatchSampler(lengths, 300))


def test_one_sample_and_lengths_beyond_16_bits():
    assert epoch_of(TokenBatchSampler([7], 7)) == [[0]]
    lengths = [200_000, 3, 70_000, 200_000]
    assert sorted(map(sorted, epoch_of(TokenBatchSampler(lengths, 400_000)))) == [[0, 3], [1, 2]]


def test_more_shards_than_batches_all_read_something():
    samplers = [TokenBatchSampler([7], 7, num_shards=3, shard=shard) for shard in range(3)]
    assert [epoch_of(sampler) for sampler in samplers] == [[[0]]] * 3
    assert (samplers[0].wrapped_batches, samplers[0].wrapped_samples) == (2, 2)


# A fixed size


@pytest.mark.parametrize(("num_samples", "batch_size", "left_out"), [(23, 5, 3), (20, 5, 0), (7, 7, 0), (9, 1, 0)])
def test_every_batch_is_full_and_what_fills_none_is_counted(num_samples, batch_size, left_out):
    sampler = FixedBatchSampler(num_samples, batch_size, seed=3)
    assert sampler.left_out == left_out
    missed = []
    for epoch in range(3):
        batches = epoch_of(sampler, epoch)
        assert [len(batch) for batch in batches] == [batch_size] * len(sampler)
        met = set(ids(batches))
        assert len(met) == len(ids(batches)) == num_samples - left_out
        missed.append(frozenset(range(num_samples)) - met)
    assert len(set(missed)) == (3 if left_out else 1)


def test_the_fixed_order_is_a_function_of_seed_and_epoch_alone_and_pinned():
    assert epoch_of(FixedBatchSampler(8, 3, seed=11), 2) == [[7, 4, 0], [6, 3, 1]]
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    orders = [epoch_of(FixedBatchSampler(23, 5, seed=seed), epoch) for seed in (7, 8) for epoch in (0, 1)]
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()
    assert len({str(order) for order in orders}) == 4
    assert not hasattr(FixedBatchSampler(23, 5), "batch_size")


@pytest.mark.parametrize(("num_shards", "per_update"), [(1, 4), (2, 2), (4, 1), (3, 1)])
def test_ranks_share_a_fixed_epoch_as_they_share_a_budgeted_one(num_shards, per_update):
    """The same blocks of the same epoch, whoever cut it: 9 batches, the last update filled with the first ones."""
    options = {"num_shards": num_shards, "batches_per_update": per_update}
    whole = epoch_of(FixedBatchSampler(47, 5), 1)
    samplers = [FixedBatchSampler(47, 5, shard=shard, **options) for shard in range(num_shards)]
    shards = [epoch_of(sampler, 1) for sampler in samplers]
    in_order = [b for i in range(0, len(shards[0]), per_update) for shard in shards for b in shard[i : i + per_update]]
    wrapped = -len(whole) % (num_shards * per_update)
    assert in_order == whole + whole[:wrapped]
    assert {(s.wrapped_batches, s.wrapped_samples) for s in samplers} == {(wrapped, 5 * wrapped)}


def test_a_fixed_sampler_resumes_in_mid_epoch_and_refuses_other_data_by_name(lengths):
    made = {"num_samples": 23, "batch_size": 4, "seed": 2}
    sampler = FixedBatchSampler(**made)
    sampler.set_epoch(3)
    state = json.loads(json.dumps(sampler.state_dict(2)))
    resumed = FixedBatchSampler(**made)
    resumed.load_state_dict(state)
    assert list(resumed) == list(sampler)[2:]
    for name, value, said in (
        ("num_samples", 22, "samples: 23 then, 22 now"),
        ("batch_size", 5, "batch_size: 4 then, 5 now"),
        ("seed", 4, "seed: 2 then, 4 now"),
    ):
        with pytest.raises(ValueError, match=said):
            FixedBatchSampler(**made | {name: value}).load_state_dict(state)
    with pytest.raises(ValueError, match="batch_size: 4 then, None now; lengths: None then"):
        TokenBatchSampler(lengths, MAX_TOKENS).load_state_dict(state)
    with pytest.raises(ValueError, match="not the state of a FixedBatchSampler"):
        sampler.load_state_dict({})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((3, 5), "num_samples=3 do not fill one batch of batch_size=5: lower batch_size"),
        ((0, 5), "num_samples must be an integer of at least 1, got 0"),
        ((3, 0), "batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_sizes_that_give_no_batch_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        FixedBatchSampler(*arguments)


# Copies


@pytest.mark.trap(20)
@pytest.mark.parametrize("num_copies", [2, 5])
def test_unique_samples_of_an_update_are_the_same_for_every_number_of_copies(lengths, num_copies):
    once, repeated = loader_of(lengths, 1), loader_of(lengths, num_copies)
    assert len(once) == len(repeated)
    for one, many in zip(once, repeated, strict=True):
        assert many["input_ids"].tolist() == num_copies * one["input_ids"].tolist()
        assert max(lengths[one["input_ids"].numpy()]) * len(one["input_ids"]) <= MAX_TOKENS


@pytest.mark.trap(22)
@pytest.mark.trap(23)
@pytest.mark.parametrize("num_shards", [1, 2, 3])
@pytest.mark.parametrize("num_copies", [1, 2, 5])
def test_every_update_meets_each_of_its_samples_exactly_m_times(lengths, num_copies, num_shards):
    """In every update, the last of an epoch too: the wrap adds whole planned batches, never loose copies."""
    loaders = [loader_of(lengths, num_copies, num_shards=num_shards, shard=shard) for shard in range(num_shards)]
    for epoch in range(3):
        for loader in loaders:
            loader.batch_sampler.set_epoch(epoch)
        seen = Counter()
        for batches in zip(*loaders, strict=True):  # an update; strict: every rank has as many
            counts = Counter(torch.cat([batch["input_ids"] for batch in batches]).tolist())
            assert set(counts.values()) == {num_copies}
            seen.update(counts)
        assert set(seen) == set(range(NUM_SAMPLES))
        wrapped = sum(count > num_copies for count in seen.values())
        assert (wrapped > 0) == (num_shards > 1)
        assert wrapped == loaders[0].batch_sampler.wrapped_samples
        assert sum(seen.values()) == num_copies * (NUM_SAMPLES + wrapped)


# Shards


@pytest.mark.trap(41)
@pytest.mark.trap(23)
@pytest.mark.parametrize(("num_shards", "per_update"), [(1, 1), (2, 1), (3, 2), (7, 1), (5, 3)])
def test_shards_together_see_every_sample_once_besides_the_counted_wrap(lengths, num_shards, per_update):
    samplers = [
        TokenBatchSampler(lengths, MAX_TOKENS, num_shards=num_shards, shard=shard, batches_per_update=per_update)
        for shard in range(num_shards)
    ]
    for epoch in range(2):
        shards = [epoch_of(sampler, epoch) for sampler in samplers]
        assert {len(shard) for shard in shards} == {len(samplers[0])}
        whole = epoch_of(TokenBatchSampler(lengths, MAX_TOKENS), epoch)
        blocks = [shard[i : i + per_update] for i in range(0, len(shards[0]), per_update) for shard in shards]
        in_order = ids(blocks)  # the batches of update 0, 1, ..., shard by shard in each
        wrapped = samplers[0].wrapped_batches
        assert (0 < wrapped < num_shards * per_update) or num_shards == 1
        assert in_order == whole + whole[:wrapped]
        assert len(ids(whole[:wrapped])) == samplers[0].wrapped_samples


def test_ranks_and_accumulated_batches_read_the_same_data_in_an_update(lengths):
    def updates(num_shards, per_update):
        options = {"num_shards": num_shards, "batches_per_update": per_update}
        shards = [epoch_of(TokenBatchSampler(lengths, MAX_TOKENS, shard=s, **options)) for s in range(num_shards)]
        count = len(shards[0]) // per_update
        return [[b for shard in shards for b in shard[u * per_update : (u + 1) * per_update]] for u in range(count)]

    assert updates(4, 1) == updates(2, 2) == updates(1, 4)


@pytest.mark.trap(41)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_accelerate_loses_no_sample_when_it_shards(lengths, num_ranks, one_process):
    """By its own rules: batches go round the ranks and the tail wraps; batch sizes are left alone."""
    batches = []
    for rank in range(num_ranks):
        loader = DataLoader(range(NUM_SAMPLES), batch_sampler=TokenBatchSampler(lengths, MAX_TOKENS), collate_fn=list)
        batches.append(list(prepare_data_loader(loader, num_processes=num_ranks, process_index=rank)))
    assert not hasattr(loader.batch_sampler, "batch_size")
    whole = epoch_of(TokenBatchSampler(lengths, MAX_TOKENS))
    in_order = [batch for update in zip(*batches, strict=True) for batch in update]
    assert set(ids(in_order)) == set(range(NUM_SAMPLES))
    assert in_order == whole + whole[: -len(whole) % num_ranks]


# Resuming


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("num_shards", "per_update"), [(1, 1), (2, 1), (2, 3)])
def test_a_resumed_run_reads_the_same_rest(lengths, num_workers, num_shards, per_update):
    def run(sampler, num_batches):
        loader = DataLoader(range(NUM_SAMPLES), batch_sampler=sampler, collate_fn=list, num_workers=num_workers)
        while True:
            for batches_done, batch in enumerate(loader, start=sampler.first_batch + 1):
                yield batch
                num_batches -= 1
                if not num_batches:
                    states.append(json.dumps(sampler.state_dict(batches_done)))
                    return
            sampler.set_epoch(sampler.epoch + 1)

    def make():
        options = {"seed": 9, "num_shards": num_shards, "shard": num_shards - 1, "batches_per_update": per_update}
        return TokenBatchSampler(lengths, MAX_TOKENS, **options)

    in_epoch = len(make())
    for stop in (per_update, in_epoch - per_update, in_epoch, in_epoch + 2 * per_update):
        states: list[str] = []
        straight = list(run(make(), stop + in_epoch))
        first = list(run(make(), stop))
        resumed = make()
        resumed.load_state_dict(json.loads(states[-1]))
        assert first + list(run(resumed, in_epoch)) == straight


def test_the_common_epoch_loop_keeps_a_loaded_position(lengths):
    sampler = TokenBatchSampler(lengths, MAX_TOKENS)
    sampler.set_epoch(3)
    state = sampler.state_dict(5)
    want = [list(sampler)[5:], epoch_of(sampler, 4)]
    sampler = TokenBatchSampler(lengths, MAX_TOKENS)
    sampler.load_state_dict(state)
    got = []
    for epoch in range(sampler.epoch, 5):
        sampler.set_epoch(epoch)
        got.append(list(sampler))
    assert got == want
    assert len(sampler) == len(want[1])


@pytest.mark.trap(24)
@pytest.mark.parametrize("position", [(3, 0), (3, 5)])
def test_a_loader_that_counts_its_own_epochs_does_not_drop_a_loaded_position(lengths, position, one_process):
    """Accelerate's loader on one process calls set_epoch(0) at its first start: epoch 0's order again."""
    sampler = TokenBatchSampler(lengths, MAX_TOKENS)
    sampler.set_epoch(position[0])
    state = sampler.state_dict(position[1])
    sampler = TokenBatchSampler(lengths, MAX_TOKENS)
    sampler.load_state_dict(state)
    prepared = prepare_data_loader(DataLoader(range(NUM_SAMPLES), batch_sampler=sampler, collate_fn=list))
    with pytest.raises(ValueError, match=rf"set_epoch\(0\) would drop the position \(epoch 3, batch {position[1]}\)"):
        next(iter(prepared))
    sampler.set_epoch(0, first_batch=0)
    assert next(iter(sampler)) == epoch_of(TokenBatchSampler(lengths, MAX_TOKENS))[0]


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"max_tokens": 65}, "max_tokens: 64 then, 65 now"),
        ({"seed": 4}, "seed: 0 then, 4 now"),
        ({"max_samples": 9}, "max_samples: None then, 9 now"),
        ({"num_shards": 2}, "batches of all shards in an update: 6 then, 4 now"),
        ({"lengths": [5] * NUM_SAMPLES}, "lengths: [0-9a-f]{16} then, [0-9a-f]{16} now"),
        ({"lengths": [5] * 202}, "samples: 207 then, 202 now"),
    ],
)
def test_a_position_of_other_data_or_options_is_refused_and_says_what_differs(lengths, options, difference):
    made = {"lengths": lengths, "max_tokens": MAX_TOKENS, "num_shards": 3, "batches_per_update": 2}
    state = TokenBatchSampler(**made).state_dict(2)
    with pytest.raises(ValueError, match=difference):
        TokenBatchSampler(**(made | options)).load_state_dict(state)


def test_a_position_may_move_between_ranks_and_accumulated_batches(lengths):
    state = TokenBatchSampler(lengths, MAX_TOKENS, num_shards=3, batches_per_update=2).state_dict(4)
    moved = TokenBatchSampler(lengths, MAX_TOKENS, num_shards=1, batches_per_update=6)
    moved.load_state_dict(state)
    assert moved.first_batch == 12


@pytest.mark.parametrize("state", [{}, {"epoch": 1}, None, {"epoch": 1, "updates_in_epoch": 0, "made_with": 3}])
def test_what_is_no_state_is_refused(lengths, state):
    with pytest.raises(ValueError, match="not the state of a TokenBatchSampler"):
        TokenBatchSampler(lengths, MAX_TOKENS).load_state_dict(state)


# Bad input


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_tokens": 0}, "max_tokens must be an integer of at least 1, got 0"),
        ({"max_tokens": 8.5}, "max_tokens must be an integer of at least 1, got 8.5"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"num_shards": 0}, "num_shards must be an integer of at least 1, got 0"),
        ({"num_shards": 2, "shard": 2}, "shard must be below num_shards=2 .*, got 2"),
        ({"shard": -1}, "shard must be an integer of at least 0, got -1"),
        ({"batches_per_update": 0}, "batches_per_update must be .* at least 1, got 0"),
        ({"max_samples": 0}, "max_samples must be .* at least 1, got 0"),
        ({"lengths": []}, r"at least one sample, got shape \(0,\)"),
        ({"lengths": [2.0, 3.0]}, "lengths must be integers, .* float64"),
        ({"lengths": [[2, 3]]}, r"got shape \(1, 2\)"),
        ({"lengths": [2, 3, 0, -1]}, "sample 2 has length 0; 2 samples have a length below 1: drop empty samples"),
        (
            {"lengths": [2, 9, 10, 8]},
            "sample 1 has length 9, over max_tokens=8; 2 of 4 samples are over it, the longest 10: raise max_tokens",
        ),
    ],
)
def test_bad_arguments_are_refused_with_the_limit_and_the_fix(options, text):
    with pytest.raises(ValueError, match=text):
        TokenBatchSampler(**({"lengths": [3, 4], "max_tokens": 8} | options))


def test_positions_outside_the_epoch_or_inside_an_update_are_refused():
    sampler = TokenBatchSampler([4] * 12, 8, batches_per_update=2)
    with pytest.raises(ValueError, match=r"first_batch must be from 0 to 5 .*, got 6"):
        sampler.set_epoch(1, first_batch=6)
    with pytest.raises(ValueError, match=r"batches_done must be from 0 to 6 .*, got 7"):
        sampler.state_dict(7)
    with pytest.raises(ValueError, match=r"batches_done must be a multiple of batches_per_update=2, .* got 3"):
        sampler.state_dict(3)
    with pytest.raises(ValueError, match="epoch must be an integer of at least 0, got -1"):
        sampler.set_epoch(-1)
