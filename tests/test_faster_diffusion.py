"""Encoder propagation's decisions, without a network: key steps, what is computed ahead, injected noise."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from quickstep_under_test.solvers.caching.accelerator import Plan, Run
from quickstep_under_test.solvers.caching.faster_diffusion import FasterDiffusion
from quickstep_under_test.solvers.process import RectifiedFlow, VarianceExploding

KEPT = {"key_steps": "uniform", "interval": 4}


def grid(steps):
    return [float(steps - i) for i in range(steps + 1)]


def plans(settings, calls, times, **more):
    session, made = settings.start(Run(times, **more)), []
    for t in calls:
        with session.call(t):
            made.append(session.plan)
    return made


def test_the_papers_key_steps():
    assert FasterDiffusion().keys(50) == {0, 1, 2, 3, 5, 10, 15, 25, 35}
    assert FasterDiffusion().keys(20) == {0, 1, 2, 4, 6, 10, 14}
    assert FasterDiffusion().keys(100) == {0, 2, 4, 6, 10, 20, 30, 50, 70}


def test_other_key_steps():
    assert FasterDiffusion(**KEPT).keys(10) == {0, 4, 8}
    assert FasterDiffusion(key_steps="list", steps="3, 7").keys(10) == {0, 3, 7}
    with pytest.raises(ValueError, match="steps = '1; 2' must be numbers"):
        FasterDiffusion(steps="1; 2")


def test_key_steps_are_full_and_the_others_partial():
    times = grid(9)
    made = plans(FasterDiffusion(key_steps="list", steps="0,1,4"), times[:-1], times)
    full = [0, 1, 4]
    assert [i for i, plan in enumerate(made) if plan is not Plan.PARTIAL] == full
    assert [made[i] for i in full] == [Plan.PLAIN, Plan.FULL, Plan.FULL]  # nobody asks for what step 0 could keep


def test_interval_one_and_outside_the_window_keep_nothing():
    times = grid(8)
    assert set(plans(FasterDiffusion(key_steps="uniform", interval=1), times[:-1], times)) == {Plan.PLAIN}
    made = plans(FasterDiffusion(**KEPT), times[:-1], times, window=(6.0, 2.0))
    assert made == [Plan.PLAIN] * 2 + [Plan.FULL, Plan.PARTIAL, Plan.FULL, Plan.PARTIAL] + [Plan.PLAIN] * 2


def test_a_key_step_that_was_answered_elsewhere_is_made_up_for():
    times = grid(12)
    made = plans(FasterDiffusion(**KEPT), [12.0, 11.0, 10.0, 7.0, 6.0, 6.5], times)
    assert made == [Plan.FULL, Plan.PARTIAL, Plan.PARTIAL, Plan.FULL, Plan.PARTIAL, Plan.FULL]


def test_it_is_off_where_it_must_be():
    assert "adds noise" in FasterDiffusion().off(Run(grid(30), stochastic=True))
    assert "fewer than 10 steps" in FasterDiffusion().off(Run(grid(9)))
    assert FasterDiffusion(**KEPT).off(Run(grid(9))) is None
    assert "comparing" in FasterDiffusion().off(Run(grid(30), adaptive=True))


def ahead(settings, calls, times, **more):
    session = settings.start(Run(times, **more))
    made = []
    for t in calls:
        with session.call(t):
            made.append(session.ahead())
    return made


def test_steps_ahead_end_at_the_next_key_step():
    times = grid(10)
    made = ahead(FasterDiffusion(**KEPT, parallel_batch=8), times[:-1], times)
    assert made[1] == [1, 2, 3] and made[2] == [2, 3] and made[5] == [5, 6, 7] and made[9] == [9]
    assert ahead(FasterDiffusion(**KEPT, parallel_batch=2), times[:-1], times)[5] == [5, 6]
    assert ahead(FasterDiffusion(**KEPT), times[:-1], times)[5] == [5]
    assert ahead(FasterDiffusion(**KEPT, parallel_batch=8), times[:-1], times, window=(9.0, 4.0))[5] == [5]


def test_samplers_with_several_calls_per_step_go_one_by_one():
    times = grid(10)
    assert ahead(FasterDiffusion(**KEPT, parallel_batch=8), [10.0, 9.5, 9.0], times)[2] == [1]  # mid-points
    assert ahead(FasterDiffusion(**KEPT, parallel_batch=8), [10.0, 9.0, 9.0, 8.0], times)[3] == [2]  # Heun


def test_a_schedule_that_goes_up_again_is_not_computed_ahead():
    times = [8.0, 7.0, 6.0, 7.5, 5.0, 0.0]
    assert ahead(FasterDiffusion(key_steps="list", steps="0", parallel_batch=8), times[:2], times)[1] == [1, 2]


def test_what_was_foreseen_is_for_its_step_only():
    times, device = grid(8), torch.device("cpu")
    session = FasterDiffusion(key_steps="list", steps="0,4", parallel_batch=4).start(Run(times))
    with session.call(8.0):
        branches = session.branches(["c"])
        session.keep(branches, 0, torch.ones(1))
        session.keep(branches, 1, torch.ones(1))
        assert session.kept(branches, 3, device) is None
        session.keep(branches, 2, torch.ones(1))
        assert len(session.kept(branches, 3, device)) == 3
        session.foresee(branches, 2, torch.tensor([2.0]))
    for t, found in ((7.0, None), (6.5, None), (6.0, 2.0), (6.0, 2.0), (5.0, None)):
        with session.call(t):
            made = session.foreseen(branches, device)
            assert made is None if found is None else made == found, t
    with session.call(4.0):
        assert session.store.nbytes == 0


def test_a_trial_that_misses_counts_its_passes_again():
    session = FasterDiffusion(**KEPT).start(Run(grid(8)))
    with session.call(8.0):
        with session.trial():
            first = session.branches(["c"])
            session.missed = True
        assert not session.bare and session.branches(["c"]) == first
        with session.trial():
            assert session.bare and not session.missed
            session.branches(["c"])
        assert session.branches(["c"]) == [("c", 2)]


@pytest.mark.parametrize(
    ("process", "times"),
    [
        (VarianceExploding(0.03, 14.6, training_sigmas=np.geomspace(0.03, 14.6, 1000)), [3.0, 1.0, 0.4, 0.2, 0.0]),
        (RectifiedFlow(1e-3, 1.0), [1.0, 0.7, 0.4, 0.2, 0.0]),
    ],
)
def test_injected_noise_is_where_an_euler_step_ends(process, times):
    """Euler with and without: x differs by a n_0 in units of x_vp after every step that ends below half the times."""
    settings = FasterDiffusion(**KEPT, noise_injection=0.003)
    session = settings.start(Run(times, process=process))
    session.noise = noise = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    below, added = float(process.t_of_u(0.5)), []
    x0 = torch.randn_like(noise)
    for t, s in pairwise(times):
        with session.call(t):
            moved = (session.inject(x0) - x0) * (1 - s / t)
        wanted = 0.003 * math.hypot(process.alpha(s), s) if 0 < s < below else 0.0
        assert torch.allclose(moved, wanted * noise, atol=1e-12), (t, s)
        added.append(wanted)
    assert 0.0 < sum(a > 0 for a in added) < len(added) - 1


def test_noise_is_not_injected_where_it_would_be_wrong():
    noise = torch.randn(1, 3, 4, 4)

    def moved(settings=None, calls=(3.0, 2.0), noise=noise, x0=noise):
        session = (settings or FasterDiffusion(noise_injection=0.01, inject_below=1.0)).start(
            Run([3.0, 2.0, 1.0, 0.0], process=VarianceExploding(0.03, 14.6))
        )
        session.noise = noise
        for t in calls:
            with session.call(t):
                made = session.inject(x0)
        return not torch.equal(made, x0)

    assert moved()
    assert not moved(FasterDiffusion()) and not moved(noise=None) and not moved(x0=noise[..., :2])
    assert not moved(calls=(3.0, 2.5)) and not moved(calls=(3.0, 2.0, 1.0))


def test_close_steps_are_capped():
    session = FasterDiffusion(noise_injection=0.01, inject_below=1.0).start(
        Run([1.0, 0.999, 0.0], process=VarianceExploding(0.03, 14.6))
    )
    session.noise, x0 = torch.ones(1), torch.zeros(1)
    with session.call(1.0):
        assert session.inject(x0).item() == pytest.approx(0.1 * math.hypot(1.0, 0.999))
