"""NT-ASGD against torch's SGD and ASGD, and its trigger against the published rule."""

import copy

import pytest
import torch

from tasks.language_modelling.averaging import NonMonotonicASGD, NonMonotonicTrigger

OPTIONS = {"lr": 0.3, "weight_decay": 0.01}


def weights():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]


def gradients(parameters, update):
    generator = torch.Generator().manual_seed(update)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def steps(parameters, optimizer, updates, lr=None):
    """Updates with rates of their own; the weights after each."""
    seen = []
    for update in updates:
        gradients(parameters, update)
        if lr is not None:
            optimizer.param_groups[0]["lr"] = lr(update)
        optimizer.step()
        seen.append([parameter.detach().clone() for parameter in parameters])
    return seen


def test_it_is_torchs_sgd_and_from_the_switch_on_torchs_asgd():
    ours, theirs = weights(), weights()
    optimizer = NonMonotonicASGD(ours, **OPTIONS)
    steps(ours, optimizer, range(3), lr=lambda update: 0.1 + update / 10)
    steps(theirs, torch.optim.SGD(theirs, **OPTIONS), range(3), lr=lambda update: 0.1 + update / 10)
    assert not optimizer.averages
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y)
    optimizer.param_groups[0]["lr"] = OPTIONS["lr"]
    optimizer.begin_averaging()
    reference = torch.optim.ASGD(theirs, t0=0, lambd=0, **OPTIONS)
    steps(ours, optimizer, range(3, 9))
    seen = steps(theirs, reference, range(3, 9))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y)
    with optimizer.averaged_weights():
        for i, parameter in enumerate(ours):
            torch.testing.assert_close(parameter.data, reference.state[theirs[i]]["ax"])
            # the first averaged step is overwritten by the second
            torch.testing.assert_close(parameter.data, torch.stack([step[i] for step in seen[1:]]).mean(0))
    for x, y in zip(ours, theirs, strict=True):  # and the weights are back
        torch.testing.assert_close(x, y)


def test_before_the_switch_a_rate_acts_at_once_and_after_it_one_update_late():
    rates = [1.0, 2.0, 4.0]
    for begun in (False, True):
        parameters = weights()
        optimizer = NonMonotonicASGD(parameters, lr=1.0)
        if begun:
            optimizer.begin_averaging()
        before = parameters[0].detach().clone()
        for update, after in enumerate(steps(parameters, optimizer, range(3), lr=lambda update: rates[update])):
            gradients(parameters, update)
            acted = rates[max(0, update - 1)] if begun else rates[update]
            torch.testing.assert_close(after[0], before - acted * parameters[0].grad)
            before = after[0]


def test_without_averages_the_averaged_weights_are_the_weights_also_where_a_block_raises():
    parameters = weights()
    optimizer = NonMonotonicASGD(parameters, **OPTIONS)
    before = copy.deepcopy(parameters)
    with optimizer.averaged_weights():
        assert all(torch.equal(x, y) for x, y in zip(parameters, before, strict=True))
    optimizer.begin_averaging()
    steps(parameters, optimizer, range(4))
    before = copy.deepcopy(parameters)
    with pytest.raises(KeyError), optimizer.averaged_weights():
        {}[torch.equal(parameters[0], before[0])]
    assert all(torch.equal(x, y) for x, y in zip(parameters, before, strict=True))


@pytest.mark.trap(24)
@pytest.mark.parametrize("switched", [False, True])
def test_its_state_restores_the_method_in_force_and_the_averages(switched):
    ours, theirs = weights(), weights()
    first, second = NonMonotonicASGD(ours, **OPTIONS), NonMonotonicASGD(theirs, **OPTIONS)
    steps(ours, first, range(2))
    if switched:
        first.begin_averaging()
    steps(ours, first, range(2, 5))
    with torch.no_grad():
        for x, y in zip(theirs, ours, strict=True):
            x.copy_(y)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.averages == switched
    steps(ours, first, range(5, 9))
    steps(theirs, second, range(5, 9))
    with first.averaged_weights(), second.averaged_weights():
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_a_parameter_without_a_gradient_stays_and_a_closure_is_called():
    parameters = weights()
    for begun in (False, True):
        optimizer = NonMonotonicASGD(parameters, **OPTIONS)
        if begun:
            optimizer.begin_averaging()
        gradients(parameters[:1], 0)
        parameters[1].grad = None
        still, moved = parameters[1].detach().clone(), parameters[0].detach().clone()
        assert optimizer.step(lambda: torch.tensor(3.0, requires_grad=True).mul(2).item()) == 6
        assert torch.equal(parameters[1], still)
        assert not torch.equal(parameters[0], moved)
        with optimizer.averaged_weights():
            assert torch.equal(parameters[1], still)


@pytest.mark.trap(32)
@pytest.mark.parametrize("patience", [1, 2, 5])
def test_the_trigger_follows_the_published_rule(patience):
    losses = torch.rand(60, generator=torch.Generator().manual_seed(patience)).tolist()
    trigger, logs = NonMonotonicTrigger(patience), []
    fired = []
    for t, loss in enumerate(losses):  # algorithm 1 of Merity et al. 2018: t > n and v > min of logs[0 .. t - n - 1]
        want = t > patience and loss > min(logs[: t - patience])
        logs.append(loss)
        fired.append(want)
        half = NonMonotonicTrigger(patience)
        half.load_state_dict(trigger.state_dict())
        assert trigger.fires(loss) == half.fires(loss) == want
    assert any(fired)
    assert not all(fired)
