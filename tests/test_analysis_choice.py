"""How many copies are worth it, and why."""

import pytest

from seqba.analysis import NoiseSplit, choose_copies


@pytest.mark.parametrize(
    ("within", "between", "most", "want"),
    [
        (1.0, 0.0, 64, 10),
        (1.0, 1.0, 64, 5),
        (1.0, 9.0, 64, 1),
        (1.0, 0.0, 4, 4),
        (1.0, -0.2, 64, 10),
        (-1.0, 2.0, 64, 1),
    ],
)
def test_the_least_m_leaves_a_tenth_of_the_noise_to_further_copies(within, between, most, want):
    noise = NoiseSplit(within, between)
    choice = choose_copies(noise, most=most)
    assert choice.num_copies == want
    if within > 0 and want < most:
        total = within + max(between, 0)
        assert noise.variance_of_copies(1, want) <= 0.1 * total * (1 + 1e-9)
        assert want == 1 or noise.variance_of_copies(1, want - 1) > 0.1 * total


def test_the_reason_says_what_dominates_and_what_stood_in_the_way():
    assert choose_copies(NoiseSplit(3.0, 1.0), most=16).reason == (
        "M = 8: T makes 75% of a gradient's noise, and with 8 copies 9% is left that more could remove"
    )
    assert "10 would leave 10%, but at most 4 are allowed" in choose_copies(NoiseSplit(1.0, 0.0), most=4).reason
    assert "a larger B serves better than copies" in choose_copies(NoiseSplit(1.0, 2.0), most=4).reason
    assert "no noise" in choose_copies(NoiseSplit(0.0, 0.0), most=4).reason
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        choose_copies(NoiseSplit(1.0, 1.0), most=0)
    with pytest.raises(ValueError, match="left must be between 0 and 1, got 2"):
        choose_copies(NoiseSplit(1.0, 1.0), most=2, left=2)
