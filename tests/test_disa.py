"""How many steps of a schedule a block takes, and which."""

import pytest
from quickstep_under_test.solvers.caching.disa import STRATEGIES, DiSA


def counts(settings, blocks, upper):
    return [settings.steps(b, blocks, upper) for b in range(blocks)]


def test_the_counts_of_the_papers_programs():
    assert counts(DiSA(lower=5), 10, 50) == [50, 45, 40, 35, 30, 25, 20, 15, 10, 5]
    assert counts(DiSA(lower=5, strategy="two-stage"), 4, 50) == [50, 50, 5, 5]
    cosine = counts(DiSA(lower=5, strategy="cosine"), 9, 50)
    assert cosine[0] == 50 and cosine[4] == 27 and cosine[-1] == 5 and cosine == sorted(cosine, reverse=True)
    assert counts(DiSA(lower=2), 7, 4) == [4, 3, 3, 3, 2, 2, 2]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("lower", "upper"), [(0, 6), (6, 6), (9, 6)])
def test_nothing_to_anneal(strategy, lower, upper):
    assert counts(DiSA(lower=lower, strategy=strategy), 5, upper) == [upper] * 5
    assert counts(DiSA(lower=2, strategy=strategy), 1, 4) == [4]


@pytest.mark.parametrize("upper", [1, 4, 7, 50])
def test_steps_are_taken_from_the_first_on_and_evenly(upper):
    for lower in range(1, upper + 1):
        taken = DiSA(lower=lower).taken(4, 5, upper)
        assert len(taken) == len(set(taken)) == lower and taken[0] == 0 and taken == sorted(taken) and taken[-1] < upper
        gaps = [b - a for a, b in zip(taken, [*taken[1:], upper], strict=True)]
        assert max(gaps) - min(gaps) <= 1
