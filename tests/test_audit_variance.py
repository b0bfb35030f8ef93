"""The shares of the variance are total-effect indices, and None where they cannot be measured."""

import pytest
import torch
from test_audit import Apply, B, D, only, x
from torch import nn
from torch.nn import functional as F

from seqba.audit import audit_masks
from seqba.audit.report import PER_COPY


class TwoDropouts(nn.Module):
    """combine(first(a), second(b)) over 4000 numbers, a = 3 and b = 1."""

    def __init__(self, combine, p):
        super().__init__()
        self.first, self.second = nn.Dropout(p), nn.Dropout(p)
        self.combine = combine

    def forward(self, x):
        ones = x.new_ones(len(x), 4_000)
        return self.combine(self.first(3 * ones), self.second(ones))


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_shares_of_a_sum_are_its_terms_variances(p):
    audit = audit_masks(TwoDropouts(torch.add, p), x(), 4)
    shares = [operation.variance_share for operation in audit.operations]
    assert shares == pytest.approx([0.9, 0.1], rel=0.05)  # 3**2 to 1


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_shares_of_a_product_count_the_interaction_twice(p):
    # Z1 * Z2 with mean 1 and variance v each: total effect v * (1 + v) of a variance of (1 + v)**2 - 1
    v = p / (1 - p)
    audit = audit_masks(TwoDropouts(torch.mul, p), x(), 4)
    want = v * (1 + v) / ((1 + v) ** 2 - 1)
    assert [operation.variance_share for operation in audit.operations] == pytest.approx([want, want], rel=0.05)
    assert 2 * want > 1
    assert "may add up to more than 100 %" in str(audit)


def test_shares_of_a_time_major_batch_are_cut_along_its_sample_axis():
    model = nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.5), nn.Dropout(0.0))
    dropout, _ = audit_masks(model, torch.randn(4, B, D), dim=1).operations  # (T, B, D)
    assert (dropout.scope, dropout.variance_share) == (PER_COPY, pytest.approx(1.0))


def test_shared_draws_are_the_same_in_all_copies_whose_variance_is_measured():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(x) * (1 + torch.randn(1))

    audit = audit_masks(Scaled(), x())
    assert [operation.variance_share for operation in audit.operations] == [0.0, pytest.approx(1.0)]


def test_shares_are_not_guessed_where_they_cannot_be_measured():
    permuted = audit_masks(Apply(lambda h: h[torch.randperm(len(h))]), x())
    assert only(permuted).scope == PER_COPY
    assert only(permuted).variance_share is None
    assert "randperm" in permuted.variance_note
    no_rows = audit_masks(Apply(lambda h: F.dropout(h, 0.5).sum()), x())
    assert (only(no_rows).scope, only(no_rows).variance_share) == (PER_COPY, None)
    assert "no floating-point tensor" in no_rows.variance_note
    as_asked = audit_masks(Apply(nn.Dropout(0.5)), x(), measure_variance=False)
    assert (only(as_asked).scope, only(as_asked).variance_share) == (PER_COPY, None)
    for audit in (permuted, no_rows, as_asked, audit_masks(nn.Dropout(0.0), x())):
        assert "100 %" not in str(audit)


def test_rows_that_are_not_copy_major_where_they_are_drawn_are_not_measured():
    def interleaved(h):  # sample-major rows of two copies
        h = h.unflatten(0, (-1, B)).transpose(0, 1).flatten(0, 1)
        h = F.dropout(h, 0.5)
        return h.unflatten(0, (B, -1)).transpose(0, 1).flatten(0, 1)

    audit = audit_masks(Apply(interleaved), x())
    assert (only(audit).scope, only(audit).variance_share) == (PER_COPY, None)
    assert "copy-major" in audit.variance_note
