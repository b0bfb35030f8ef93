"""A toy recurrent model over windows of a stream, through the interfaces that language modelling stands on."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from distributed import run_ranks
from seqba import CarriedState, CopyGroup, TrainStep, copies_of_pass, repeat_batch, unfold
from seqba.passes import CopyPlan, PassLoop

VOCABULARY, WIDTH, LAYERS, SAMPLES, STEPS = 11, 6, 2, 3, 5


class Recurrent(nn.Module):
    """Embedding, dropout, a GRU whose last state is returned, output layer."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.network = nn.GRU(WIDTH, WIDTH, num_layers=LAYERS, batch_first=True)
        self.output = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids, state):
        hidden, state = self.network(self.dropout(self.embedding(input_ids)), state["hidden"])
        return self.output(hidden), {"hidden": state}


def initial(rows):
    return {"hidden": torch.zeros(LAYERS, rows, WIDTH)}


def window(update, samples=SAMPLES, batch=0):
    generator = torch.Generator().manual_seed(100 * batch + update)
    ids = torch.randint(VOCABULARY, (samples, STEPS + 1), generator=generator)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def loss_with(carried, model, rows):
    logits, state = model(rows["input_ids"], carried.take(len(rows["input_ids"])))
    carried.keep(state)
    return nn.functional.cross_entropy(logits.flatten(0, 1), rows["labels"].flatten(), reduction="sum")


def make(dropout=0.0, seed=0, num_batches=1, **options):
    """A model, its state, and a function that does an update; weights that move, so that states matter."""
    torch.manual_seed(seed)
    model, carried = Recurrent(dropout).train(), CarriedState(initial)
    step = TrainStep(
        Accelerator(cpu=True),
        model,
        torch.optim.SGD(model.parameters(), lr=0.5),
        loss_fn=lambda network, rows: loss_with(carried, network, rows),
        count_fn=lambda rows: rows["labels"].numel(),
        carried=[carried],
        **options,
    )

    def update(number):
        return step([window(number, batch=batch) for batch in range(num_batches)], update=number)

    return model, carried, update


def assert_same(a, b, **tolerance):
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, msg=name, **tolerance)


@pytest.mark.trap(5)
def test_without_dropout_the_copies_of_a_stream_stay_equal_for_ever_and_as_one_stream_alone():
    model, carried, update = make(num_copies=4, copies_per_pass=3)
    alone, one, update_alone = make(num_copies=1)
    for number in range(1, 6):
        update(number)
        update_alone(number)
        states = list(carried.state_dict().values())
        assert len(states) == 4
        for state in states:
            torch.testing.assert_close(state, states[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(states[0], one.state_dict()["0.0.0"])
    assert_same(model, alone)
    assert not torch.equal(states[0], torch.zeros_like(states[0]))


@pytest.mark.trap(5)
def test_permuting_the_copies_at_one_window_permutes_the_next():
    torch.manual_seed(0)
    model = Recurrent()
    states = torch.randn(3, LAYERS, SAMPLES, WIDTH)  # of three copies, as under dropout
    outputs = []
    for order in ((0, 1, 2), (2, 0, 1)):
        carried = CarriedState(initial)
        for copy, which in enumerate(order):
            with copies_of_pass((copy,)):
                carried.keep({"hidden": states[which]})
        with copies_of_pass((0, 1, 2)):
            rows = repeat_batch(window(1), 3)
            logits, _ = model(rows["input_ids"], carried.take(3 * SAMPLES))
        outputs.append(unfold(logits, 3))
    torch.testing.assert_close(outputs[1], outputs[0][[2, 0, 1]])
    assert not torch.allclose(outputs[1], outputs[0])


@pytest.mark.trap(5)
@pytest.mark.trap(10)
@pytest.mark.parametrize("copies_per_pass", [1, 3, 4])
def test_the_plan_changes_neither_weights_nor_states_over_windows_with_dropout_and_two_batches(copies_per_pass):
    fused = make(dropout=0.4, num_copies=4, copies_per_pass=2, copy_seed=7, num_batches=2)
    other = make(dropout=0.4, num_copies=4, copies_per_pass=copies_per_pass, copy_seed=7, num_batches=2)
    for number in range(1, 6):
        assert torch.allclose(fused[2](number).loss, other[2](number).loss)
    assert_same(fused[0], other[0], rtol=1e-4, atol=1e-5)
    want, got = fused[1].state_dict(), other[1].state_dict()
    assert want.keys() == got.keys()
    assert len(want) == 2 * 4  # a block for each copy of each batch
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)
    assert len({tuple(x.flatten().tolist()) for x in want.values()}) == 8  # every copy has come to its own


def test_an_attempt_that_ran_out_of_memory_leaves_no_state_behind(caplog):
    """The first pass of the second batch fails: what the first batch kept must be taken back too."""
    model, carried, update = make(dropout=0.4, num_copies=4, num_batches=2)
    begun_small, want, update_small = make(dropout=0.4, num_copies=4, copies_per_pass=2, num_batches=2)
    torch.manual_seed(5)
    update(1)
    state_after_one = carried.state_dict()
    whole, calls = Recurrent.forward, []

    def short_of_memory(self, input_ids, state):
        calls.append(len(input_ids))
        if len(input_ids) > 2 * SAMPLES and len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return whole(self, input_ids, state)

    begun_small.load_state_dict(model.state_dict())
    want.load_state_dict(state_after_one)
    torch.manual_seed(6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recurrent, "forward", short_of_memory)
        assert update(2).copies_per_pass == 2
    assert calls[:2] == [4 * SAMPLES, 4 * SAMPLES]
    torch.manual_seed(6)
    update_small(2)
    assert_same(model, begun_small, rtol=0, atol=0)
    for name, x in want.state_dict().items():
        assert torch.equal(carried.state_dict()[name], x), name
    assert "done again" in caplog.text


@pytest.mark.trap(24)
def test_states_go_on_from_their_tensors_bitwise():
    model, carried, update = make(dropout=0.4, num_copies=2, copy_seed=3)
    for number in (1, 2):
        update(number)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    saved = {name: x.clone() for name, x in carried.state_dict().items()}
    again, carried_again, update_again = make(dropout=0.4, seed=1, num_copies=2, copy_seed=3)
    again.load_state_dict(weights)
    carried_again.load_state_dict(saved)
    assert torch.equal(update(3).loss, update_again(3).loss)
    assert_same(model, again, rtol=0, atol=0)


def test_a_reset_begins_again_from_the_initial_state():
    _, carried, update = make(num_copies=2)
    update(1)
    carried.reset()
    assert carried.state_dict() == {}
    with copies_of_pass((0, 1)):
        assert not carried.take(2 * SAMPLES)["hidden"].any()


def test_state_outside_a_pass_of_other_rows_or_of_another_structure_is_refused_by_name():
    carried = CarriedState(initial)
    with pytest.raises(RuntimeError, match="no pass is running"):
        carried.take(3)
    with copies_of_pass((0, 1)):
        carried.keep(initial(6))
        with pytest.raises(ValueError, match="the pass has 8 rows, but 6 were carried over for its copies"):
            carried.take(8)
        with pytest.raises(ValueError, match="cannot unfold"):
            carried.keep(initial(5))
        with pytest.raises(ValueError, match=r"built as .* but the initial one as"):
            carried.keep(torch.zeros(LAYERS, 6, WIDTH))
    with copies_of_pass((0, 1, 2)), pytest.raises(ValueError, match=r"for copies \[2\] of batch 0"):
        carried.take(9)
    with pytest.raises(ValueError, match="the carried state holds 2 tensors a copy, but the model's has 1"):
        carried.load_state_dict({"0.0.0": torch.zeros(1), "0.0.1": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"tensor 0 has the sizes \(2, 7\) beside its rows, but the model's \(2, 6\)"):
        carried.load_state_dict({"0.0.0": torch.zeros(LAYERS, 3, 7)})
    carried.load_state_dict({"0.0.0": torch.zeros(LAYERS, 3, WIDTH)})
    with copies_of_pass((1,)), pytest.raises(ValueError, match=r"no state was carried over for copies \[1\]"):
        carried.take(3)
    carried.reset()
    with copies_of_pass((1,)):
        assert not carried.take(3)["hidden"].any()


# ---- a group of two ranks, one after the other in this process


class OneOfTwo(Accelerator):
    """Says that there are two ranks; gradients add up in the one model that both use in turn."""

    num_processes = 2

    def no_sync(self, model):
        return nullcontext()


@pytest.mark.trap(10)
@pytest.mark.trap(13)
def test_a_group_of_two_ranks_draws_and_learns_what_one_rank_does_alone():
    gradients, states = {}, {}
    for ranks in (1, 2):
        torch.manual_seed(0)
        model = Recurrent(dropout=0.4).train()
        states[ranks] = {}
        for rank in range(ranks):
            group, carried = CopyGroup(4, rank, ranks, ranks_per_group=ranks), CarriedState(initial)
            accelerator = OneOfTwo(cpu=True) if ranks == 2 else Accelerator(cpu=True)
            plan = CopyPlan(group.copies, 2)
            loop = PassLoop(accelerator, plan, group, copy_seed=9, carried=[carried.snapshot])

            def loss_of(model, one, batch, carried=carried):
                return loss_with(carried, model, repeat_batch(batch, len(one.copies)))

            def run_pass(one, batch, model=model, loss_of=loss_of):
                loss = loss_of(model, one, batch)
                loss.backward()
                return loss.detach()

            for update in (1, 2):
                loop.run(model, [window(update), window(update, batch=1)], run_pass, loss_of, update=update)
            states[ranks] |= carried.state_dict()
        gradients[ranks] = {name: p.grad for name, p in model.named_parameters()}
    for name, want in gradients[1].items():
        torch.testing.assert_close(gradients[2][name], want, rtol=1e-5, atol=1e-5, msg=name)
    assert states[1].keys() == states[2].keys()
    for name, state in states[1].items():
        torch.testing.assert_close(states[2][name], state)


RANKS = """
import torch
from accelerate import Accelerator
from distributed import report
from seqba import CarriedState, TrainStep
from test_carried import Recurrent, initial, loss_with, window

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
model, carried = Recurrent(dropout=0.4).train(), CarriedState(initial)
wrapped = accelerator.prepare(model)
step = TrainStep(accelerator, wrapped, torch.optim.SGD(model.parameters(), lr=0.5), num_copies=4, ranks_per_group=2,
                 loss_fn=lambda network, rows: loss_with(carried, network, rows), copy_seed=9, carried=[carried],
                 count_fn=lambda rows: rows["labels"].numel())
results = [step([window(update)], update=update) for update in (1, 2, 3)]
report({
    "num_processes": accelerator.num_processes,
    "loss": [float(r.loss) for r in results],
    "norm": [float(r.grad_norm) for r in results],
    "targets": int(results[0].num_targets), "samples": int(results[0].num_samples),
    "copies": sorted(carried.state_dict()),
})
"""


@pytest.mark.trap(13)
@pytest.mark.trap(43)
def test_two_real_ranks_of_a_group_do_the_updates_of_one_rank_with_all_copies():
    ranks = run_ranks(RANKS, 2)
    _, _, update = make(dropout=0.4, num_copies=4, copy_seed=9)
    alone = [update(number) for number in (1, 2, 3)]
    for rank in ranks:
        assert rank["num_processes"] == 2
        assert rank["loss"] == pytest.approx([float(r.loss) for r in alone], rel=1e-5)
        assert rank["norm"] == pytest.approx([float(r.grad_norm) for r in alone], rel=1e-4)
        assert (rank["targets"], rank["samples"]) == (4 * SAMPLES * STEPS, SAMPLES)
    assert [rank["copies"] for rank in ranks] == [["0.0.0", "0.1.0"], ["0.2.0", "0.3.0"]]
