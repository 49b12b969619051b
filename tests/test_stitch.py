"""Which model computes a step, and how a state goes from one to another: all of it is known exactly."""

import math
from itertools import product

import pytest
import torch
from quickstep_under_test.solvers.process import RectifiedFlow, VarianceExploding
from quickstep_under_test.solvers.stitch import (
    Alternate,
    Passage,
    Stages,
    TStitch,
    TStitchModel,
    by_pattern,
    by_percent,
    by_steps,
)

VE, ZSNR, FLOW, LOUD = (
    VarianceExploding(),
    VarianceExploding(t_max=4500.0),
    RectifiedFlow(),
    RectifiedFlow(noise_scale=1.6),
)
DOWN = [10.0, 6.0, 3.0, 1.0, 0.3, 0.0]


def never(share):
    raise AssertionError("shares of steps know no time")


@pytest.mark.parametrize(
    ("fractions", "steps", "counts"),
    [
        ([0.4], 30, [12, 18]),
        ([0.0], 30, [0, 30]),
        ([1.0], 30, [30, 0]),
        ([0.5], 5, [3, 2]),
        ([0.1], 4, [0, 4]),
        ([0.3, 0.3], 10, [3, 3, 4]),
        ([0.1, 0.2, 0.7], 10, [1, 2, 7, 0]),
    ],
)
def test_shares_of_the_steps(fractions, steps, counts):
    models = by_steps(fractions)(list(range(steps, -1, -1)), never)
    assert [models.count(k) for k in range(len(counts))] == counts and models == sorted(models)


def test_shares_of_time_do_not_depend_on_the_schedule():
    def time_at(share):
        return 10.0 * (1 - share)

    assert by_percent([0.5])(DOWN, time_at) == [0, 0, 1, 1, 1]
    assert by_percent([0.5])([5.0, 4.0, 0.0], time_at) == [1, 1]
    assert by_percent([0.0])([99.0, 1.0, 0.0], time_at) == [1, 1]
    assert by_percent([0.4, 0.6])([99.0, 1e-9, 0.0], time_at) == [0, 1]  # all to the first two
    assert by_percent([0.4, 0.3])(DOWN, time_at) == [0, 1, 2, 2, 2]


def test_patterns():
    assert by_pattern(" aAb ", 2)(DOWN, never) == [0, 0, 1, 0, 0]
    assert by_pattern("CAB", 3)([2.0, 1.0], never) == [2]
    for wrong in ("", "AC", "A1", "A,B"):
        with pytest.raises(ValueError, match="made of A to B"):
            by_pattern(wrong, 2)
        with pytest.raises(ValueError, match="Alternate"):
            Alternate(pattern=wrong).rule(2)


def test_shares_above_one_are_refused():
    with pytest.raises(ValueError, match=r"0\.5 \+ 0\.4 \+ 0\.2 are more than 1"):
        TStitch(0.5, fraction_2=0.4, fraction_3=0.2).rule(4)
    assert (
        TStitch(1.0).rule(2)(DOWN, never) == TStitchModel(1.0).rule(2)(DOWN, never) == [0] * 5
    )  # the second has no share
    assert TStitch(0.7, fraction_2=0.3).rule(3)(DOWN, never) == [0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="fraction"):
        TStitch(1.2)


def test_the_time_of_a_call_decides():
    stages = Stages(DOWN, [0, 0, 1, 1, 1])
    calls = {99.0: 0, 10.0: 0, 8.0: 0, 6.0: 0, 4.0: 0, 3.0001: 1, 3.0: 1, 2.0: 1, 1.0: 1, 0.0: 1}
    assert {t: stages.at(t) for t in calls} == calls
    assert [Stages(DOWN, [0, 1, 0, 1, 0]).at(t) for t in (9.0, 5.0, 2.0, 0.5, 0.1)] == [0, 1, 0, 1, 0]
    assert Stages([10.0, 2.0], [0]).at(2.0) == 0  # a corrector at the end of a part of a schedule
    dense = [1.0 - i * 1e-5 for i in range(5)]
    assert [Stages(dense, [0, 1, 0, 1]).at(t) for t in dense[:4]] == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="go down"):
        Stages(DOWN[::-1], [0] * 5)


def denoised(process, mean, std, x, t):
    """E[z | x] for z ~ N(mean, std^2): exact."""
    alpha, noise = process.alpha(t), process.noise_scale * process.sigma(t)
    return mean + alpha * std**2 / (alpha**2 * std**2 + noise**2) * (x - alpha * mean)


@pytest.mark.parametrize(("a", "b"), list(product((VE, FLOW, LOUD), repeat=2)))
@pytest.mark.parametrize(("scale", "shift"), [(1.0, None), (0.7, None), (1.3, (0.5, -0.25))])
def test_the_same_picture_with_the_same_noise(a, b, scale, shift):
    """The exact denoiser of the data as b knows them, asked through the passage, is the exact denoiser for a."""
    offset = None if shift is None else torch.tensor(shift, dtype=torch.float64).view(1, 2, 1, 1)
    passage = Passage(a, b, scale, offset)
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, std = 0.4, 0.6
    for t in (0.8, 0.5, 0.01, 0.0):
        sigma = torch.full((3,), t, dtype=torch.float64)
        moved, sigmas = passage.there(x, sigma, [t] * 3)
        s = float(sigmas[0])
        theirs = denoised(b, mean * scale + (0.0 if offset is None else offset), std * scale, moved, s)
        assert torch.allclose(passage.back(theirs), denoised(a, mean, std, x, t), atol=1e-12)
        assert torch.allclose(passage.back(passage.bring(x)), x, atol=1e-14) and passage.time(t) == pytest.approx(s)


def test_closed_forms():
    to_flow, to_loud = Passage(VE, FLOW), Passage(VE, LOUD)
    for s in (0.05, 1.0, 9.0):
        assert to_flow.time(s) == pytest.approx(s / (1 + s)) and to_loud.time(s) == pytest.approx(s / (1.6 + s))
        x, sigma = to_loud.there(torch.ones(1, 1), torch.tensor([s]), [s])
        assert float(x) == pytest.approx(1.6 / (1.6 + s)) and float(sigma) == pytest.approx(s / (1.6 + s))
        assert Passage(FLOW, VE).time(s / (1 + s)) == pytest.approx(s)


def test_what_a_model_was_not_trained_for_it_sees_at_its_largest_sigma():
    """Pure noise stays pure noise of the right size; where both were trained on as much, nothing is bounded."""
    for a, t in ((FLOW, 1.0), (LOUD, 1.0), (ZSNR, 4500.0), (FLOW, 0.99)):
        passage = Passage(a, VE)
        noise = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x, sigma = passage.there(a.noise_scale * t * noise, torch.tensor([t], dtype=torch.float64), [t])
        assert passage.clamped(t) and not passage.clamped(0.5)
        assert torch.allclose(x, noise * VE.t_max, atol=1e-9) and float(sigma) == pytest.approx(VE.t_max)
    for a, b, t in ((VE, VE, 20.0), (VE, ZSNR, 20.0), (FLOW, LOUD, 1.0), (VE, FLOW, 20.0)):
        assert not Passage(a, b).clamped(t) and math.isinf(Passage(a, b).top)
    assert Passage(FLOW, LOUD).time(1.0) == 1.0
    assert Passage(FLOW, LOUD).there(torch.ones(1, 1), torch.ones(1), [1.0])[0] == pytest.approx(1.6)


def test_rows_at_different_times():
    x, times = torch.ones(3, 1, 1, 1), [0.0, 0.5, 1.0]
    moved, sigma = Passage(FLOW, VE).there(x, torch.tensor(times), times)
    assert moved.flatten().tolist() == pytest.approx([1.0, 2.0, VE.t_max])
    assert sigma.tolist() == pytest.approx([0.0, 1.0, VE.t_max])
    moved, sigma = Passage(VE, FLOW).there(x, torch.tensor(1.0), [1.0])  # one sigma for all
    assert moved.flatten().tolist() == [0.5] * 3 and sigma.shape == ()


def test_nothing_is_touched_where_nothing_changes():
    x, sigma = torch.randn(2, 4), torch.tensor([3.0, 20.0])
    for b in (VarianceExploding(), ZSNR):
        there = Passage(VE, b).there(x, sigma, sigma.tolist())
        assert there[0] is x and there[1] is sigma and Passage(VE, b).back(x) is x and Passage(VE, b).bring(x) is x
    assert Passage(ZSNR, VE).there(x, sigma, sigma.tolist())[0] is not x
