"""The split of a gradient's variance, against all draws of T and all samples of models small enough to list them."""

import itertools
import math

import pytest
import torch
from torch import nn

from seqba.analysis import NoiseSplit, split_variance
from seqba.analysis.variance import student_quantile

KEEP = 0.6


class Masked(nn.Module):
    """Two layers, with a mask over three hidden units that the test gives."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x, mask):
        return self.last(torch.tanh(self.first(x)) * mask / KEEP)


@pytest.fixture(scope="module")
def listed():
    """The gradient of every sample under every mask, (N, masks, D), and the masks' probabilities."""
    torch.manual_seed(0)
    model = Masked().double()
    x, y = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=torch.float64)
    rows = [
        [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad((model(a, mask) - b).square().sum(), list(model.parameters()))
                ]
            )
            for mask in masks
        ]
        for a, b in zip(x, y, strict=True)
    ]
    kept = masks.sum(1)
    return torch.stack([torch.stack(row) for row in rows]), KEEP**kept * (1 - KEEP) ** (3 - kept)


def split_of(gradients, chances):
    means = torch.einsum("nmd,m->nd", gradients, chances)
    within = torch.einsum("nmd,m->n", (gradients - means[:, None]).square(), chances).mean()
    return NoiseSplit(float(within), float((means - means.mean(0)).square().sum(1).mean()))


@pytest.fixture(scope="module")
def truth(listed):
    return split_of(*listed)


def variance_of_mean(listed, num_samples, num_copies):
    """By the list of all batches: B samples, each under M masks, drawn one by one."""
    gradients, chances = listed
    draws = [(i, j) for i in range(len(gradients)) for j in itertools.product(range(len(chances)), repeat=num_copies)]
    one = torch.stack([gradients[i, list(j)].mean(0) for i, j in draws])
    chance = torch.stack([chances[list(j)].prod() for _, j in draws]) / len(gradients)
    for _ in range(num_samples - 1):  # one more sample
        assert num_samples == 2
        one = ((one[:, None] + one) / 2).flatten(0, 1)
        chance = (chance[:, None] * chance).flatten()
    mean = (one * chance[:, None]).sum(0)
    return float(((one - mean).square().sum(1) * chance).sum())


@pytest.mark.parametrize(("num_samples", "num_copies"), [(1, 1), (1, 3), (2, 1), (2, 2)])
def test_the_variance_of_a_batch_is_that_of_all_its_draws(listed, truth, num_samples, num_copies):
    want = variance_of_mean(listed, num_samples, num_copies)
    assert truth.variance(num_samples, num_copies) == pytest.approx(want)
    # as many distinct samples have less of it
    assert truth.variance(num_samples * num_copies) == pytest.approx(
        variance_of_mean(listed, 1, 1) / num_samples / num_copies
    )
    assert truth.variance(num_samples * num_copies) <= want * (1 + 1e-9)


def test_the_estimates_are_unbiased_over_all_draws(listed):
    gradients, chances = listed[0][:3, -4:], listed[1][-4:] / listed[1][-4:].sum()  # the first unit is always kept
    truth = split_of(gradients, chances)
    found = torch.zeros(3, dtype=torch.float64)
    pairs = [list(pair) for pair in itertools.product(range(4), repeat=2)]
    for a, b in itertools.product(range(3), repeat=2):
        for one, other in itertools.product(pairs, repeat=2):
            split = split_variance(torch.stack([gradients[a, one], gradients[b, other]]))
            chance = chances[one].prod() * chances[other].prod() / 9
            found += chance * torch.tensor([1.0, split.within, split.between])
    assert found.tolist() == pytest.approx([1.0, truth.within, truth.between])


def drawn(listed, num_groups, size, num_copies, generator):
    """Groups of `size` samples, under masks of their own: (G, M, D)."""
    gradients, chances = listed
    samples = torch.randint(len(gradients), (num_groups, 1, size), generator=generator)
    masks = torch.multinomial(chances, num_groups * num_copies * size, replacement=True, generator=generator)
    return gradients[samples, masks.view(num_groups, num_copies, size)].mean(2)


@pytest.mark.parametrize("size", [1, 3])
def test_intervals_cover_the_truth_as_often_as_they_say(listed, truth, size):
    generator, runs, covered = torch.Generator().manual_seed(0), 300, [0, 0]
    means = [0.0, 0.0]
    for _ in range(runs):
        split = split_variance(drawn(listed, 24, size, 2, generator), size, confidence=0.9)
        for i, (value, interval, want) in enumerate(
            [
                (split.within, split.within_interval, truth.within),
                (split.between, split.between_interval, truth.between),
            ]
        ):
            assert interval[0] < value < interval[1]
            covered[i] += interval[0] < want < interval[1]
            means[i] += value / runs
    assert all(0.82 < count / runs < 0.96 for count in covered), covered
    assert means == pytest.approx([truth.within, truth.between], rel=0.1)


def test_student_quantiles_are_those_of_the_tables():
    assert student_quantile(0.975, 3) == pytest.approx(3.182, rel=0.01)
    assert student_quantile(0.95, 9) == pytest.approx(1.833, rel=0.001)


def test_few_groups_have_no_interval_and_bad_layouts_are_refused():
    split = split_variance(torch.randn(3, 2, 5))
    assert split.between_interval == split.within_interval == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="at least 2 groups of samples and 2 draws of T, got shape"):
        split_variance(torch.randn(3, 1, 5))
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        split_variance(torch.randn(3, 2, 5), 0)
    with pytest.raises(ValueError, match="confidence must be between 0 and 1, got 95"):
        split_variance(torch.randn(4, 2, 5), confidence=95)
