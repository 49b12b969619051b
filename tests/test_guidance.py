"""What stands in for a side of guidance that was not computed."""

import math
from dataclasses import replace

import pytest
import torch
from quickstep_under_test.solvers.artifact import Artifact
from quickstep_under_test.solvers.caching.accelerator import Plan, Run
from quickstep_under_test.solvers.caching.adaptive_guidance import AdaptiveGuidance
from quickstep_under_test.solvers.caching.faster_cfg import FasterCFG, low_pass
from quickstep_under_test.solvers.caching.guidance_cache import GuidanceCache
from quickstep_under_test.solvers.caching.guidance_window import GuidanceWindow
from quickstep_under_test.solvers.caching.guiding import delta, direction, unconditional
from quickstep_under_test.solvers.caching.linear_ag import KIND, LinearAG
from quickstep_under_test.solvers.caching.linear_ag_fit import fit, full_steps, loss, predicted
from quickstep_under_test.solvers.process import RectifiedFlow, VarianceExploding

TIMES = [*torch.linspace(0, 1, 12).double().mul(-4).add(2).exp().tolist(), 0.0]
SHAPE = (2, 3, 8, 8)


def noise(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def calls(session, sides, times=TIMES[:-1]):
    """The plans of a run, and D_u as the session has it beside the true one; ``sides(t) -> D_c, D_u``."""
    plans, made = [], []
    for t in times:
        with session.call(t):
            plans.append(session.plan)
            x, D_c, D_u = sides(t)
            column = torch.full((len(x),), t, dtype=torch.float64)
            if session.plan is Plan.PARTIAL and session.ready("key"):
                made.append((session.answer("key", x, column, D_c), D_u))
            elif session.plan is not Plan.PLAIN:
                session.learn("key", x, column, D_c, D_u)
    return plans, made


def straight(run):
    """Sides whose difference delta is linear in the half log-SNR; everything else jumps about."""
    a, b, jump = noise(1), noise(2), iter(range(10, 99))

    def sides(t):
        x, D_c = noise(next(jump)), noise(next(jump))
        return x, D_c, D_c - t * (a + b * run.coordinate(t))

    return sides


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_difference_gives_back_the_side(dtype):
    D_c, D_u = noise(1).to(dtype), noise(2).to(dtype)
    t = torch.tensor([3.0, 0.5], dtype=torch.float64)
    back = unconditional(t, D_c, delta(t, D_c, D_u))
    assert back.dtype == dtype and torch.allclose(back, D_u, atol=2e-3 if dtype == torch.float16 else 1e-12)
    x = noise(3).to(dtype)
    assert torch.allclose(direction(x, t, D_u) - direction(x, t, D_c), delta(t, D_c, D_u), atol=2e-2)


@pytest.mark.parametrize("process", [VarianceExploding(), RectifiedFlow(), None])
def test_linear_is_exact_where_the_difference_is_linear(process):
    times = [t / 8 for t in TIMES]
    run = Run(times, process=process)
    session = GuidanceCache(interval=3, warmup=2).start(run)
    plans, made = calls(session, straight(run), times[:-1])
    f, p = Plan.FULL, Plan.PARTIAL
    assert plans == [f, f, p, p, f, p, p, f, p, p, f, p] and len(made) == 7
    assert all(torch.allclose(got, true, atol=1e-6) for got, true in made)
    worse = GuidanceCache(interval=3, warmup=2, policy="reuse").start(run)
    assert not any(torch.allclose(got, true, atol=1e-3) for got, true in calls(worse, straight(run), times[:-1])[1])


def test_auto_is_reuse_where_noise_is_added():
    run = Run(TIMES)
    made = {}
    for stochastic, policy in ((True, "auto"), (True, "reuse"), (False, "auto"), (False, "linear")):
        settings = GuidanceCache(policy=policy)
        found = calls(settings.start(replace(run, stochastic=stochastic)), straight(run))[1]
        made[stochastic, policy] = torch.stack([got for got, _ in found])
    assert torch.equal(made[True, "auto"], made[True, "reuse"])
    assert torch.equal(made[False, "auto"], made[False, "linear"]) and not torch.equal(
        made[True, "auto"], made[False, "auto"]
    )


def test_drop_is_the_positive_side():
    for settings in (GuidanceCache(policy="drop", warmup=0), GuidanceWindow()):
        session = settings.start(Run(TIMES, window=(3.0, 1.0)))
        with session.call(2.0):
            assert session.ready("key") and session.store.nbytes == 0
            D_c = noise(1)
            made = session.answer("key", noise(2), torch.full((2,), 2.0), D_c)
        assert torch.equal(made, D_c) and made is not D_c


def test_the_guards_of_the_cache():
    run = Run(TIMES, window=(5.0, 0.3))
    plans, _ = calls(GuidanceCache(interval=2, warmup=4, tail=3).start(run), straight(run))
    inside = [5.0 >= t > 0.3 for t in TIMES[:-1]]
    assert [p is not Plan.PLAIN for p in plans] == inside
    assert Plan.PARTIAL not in plans[:4] and Plan.PARTIAL not in plans[-3:] and Plan.PARTIAL in plans[4:-3]
    assert set(calls(GuidanceCache(interval=1).start(run), straight(run))[0]) == {Plan.PLAIN}


def test_equal_times_and_restarts():
    """Heun calls twice at the same time; a restart goes back up, and what was kept is of another image."""
    run = Run(TIMES)
    twice = [t for t in TIMES[:-1] for _ in range(2)]
    _, made = calls(GuidanceCache(interval=3, warmup=2).start(run), straight(run), twice)
    assert made and all(got.isfinite().all() for got, _ in made)
    session = GuidanceCache(interval=3, warmup=0).start(run)
    f, p = Plan.FULL, Plan.PARTIAL
    assert calls(session, straight(run), [4.0, 3.0, 3.5, 3.0, 2.5, 2.0])[0] == [f, p, f, p, p, f]


@pytest.mark.parametrize("settings", [GuidanceCache(warmup=1), FasterCFG(interval=3)], ids=lambda s: s.id)
def test_a_window_that_missed_the_last_full_call_is_computed(settings):
    """Context windows that move come back later."""
    session, ready = settings.start(Run(TIMES)), ""
    for i, t in enumerate(TIMES[:10]):
        with session.call(t):
            key = "moved" if i in (0, 2, 4, 5, 8) else "other"
            x = torch.ones(1, 4, 8, 8)
            if session.plan is Plan.PARTIAL and session.ready(key):
                ready += "."
            else:
                session.learn(key, x, torch.tensor([t]), x, 2 * x)
                ready += "F"
    assert ready == "FF.FF.F.FF"


def test_nothing_known_is_nothing_answered():
    session = GuidanceCache().start(Run(TIMES))
    with session.call(3.0):
        assert not session.ready("key")
        session.learn("key", noise(1), torch.full((2,), 3.0), noise(2), noise(3))
        assert session.ready("key") and not session.ready("other window")
    session.close()
    assert session.store.nbytes == 0


def agreeing(cosines):
    """Sides with these cosines of d_c and d_u in the second sample, 1 in the first."""
    given = iter(cosines)

    def sides(t):
        x, D_c = noise(1), noise(2)
        d_c = ((x - D_c) / t).flatten(1)
        other = noise(3).flatten(1)
        other = other - (other * d_c).sum(1, keepdim=True) / (d_c * d_c).sum(1, keepdim=True) * d_c
        other = other / other.norm(dim=1, keepdim=True) * d_c.norm(dim=1, keepdim=True)
        c = torch.tensor([[1.0], [next(given)]], dtype=torch.float64)
        d_u = (c * d_c + (1 - c**2).clamp(min=0).sqrt() * other).view(SHAPE)
        return x, D_c, x - t * d_u

    return sides


def test_adaptive_guidance_latches_on_the_worst_sample():
    session = AdaptiveGuidance(threshold=0.99).start(Run(TIMES))
    plans, made = calls(session, agreeing([0.9, 0.98, 0.995, 0.5, 0.4]), TIMES[:5])
    assert plans == [Plan.FULL] * 3 + [Plan.PARTIAL] * 2 and len(made) == 2
    with session.call(TIMES[0]):  # noise was added
        assert session.plan is Plan.FULL


def test_adaptive_guidance_goes_on_when_it_cannot_tell():
    session = AdaptiveGuidance(threshold=-1.0).start(Run(TIMES))
    assert calls(session, agreeing([math.nan] * 3), TIMES[:3])[0] == [Plan.FULL] * 3
    never = AdaptiveGuidance(threshold=1.01).start(Run(TIMES))
    assert calls(never, agreeing([1.0] * 3), TIMES[:3])[0] == [Plan.FULL] * 3


def test_one_window_that_disagrees_keeps_guidance_on():
    session = AdaptiveGuidance(threshold=0.9).start(Run(TIMES))
    with session.call(3.0):
        for key, cosine in (("left", 0.99), ("right", 0.5)):
            x, D_c, D_u = agreeing([cosine])(3.0)
            session.learn(key, x, torch.full((2,), 3.0, dtype=torch.float64), D_c, D_u)
    with session.call(2.0):
        assert session.plan is Plan.FULL


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (1, 2, 7, 12), (1, 2, 3, 9, 6)])
def test_low_and_high_frequencies(shape):
    value = noise(4, shape)
    assert torch.allclose(low_pass(value, 1.0), value)  # the corner is at 0.71 of the shorter side
    flat = value.mean((-2, -1), keepdim=True).expand(shape)
    assert torch.allclose(low_pass(value, 0.0), flat)
    half = low_pass(value, 0.25)
    assert torch.allclose(low_pass(half, 0.25), half) and not torch.allclose(half, value)


def test_frequencies_of_sound_are_those_of_time():
    value = torch.cos(2 * torch.pi * torch.arange(16) / 16) + 0.5 * torch.cos(2 * torch.pi * 6 * torch.arange(16) / 16)
    sound = value.expand(1, 3, 16) + torch.tensor([0.0, 1.0, 2.0])[None, :, None]  # channels are no frequency
    slow = torch.cos(2 * torch.pi * torch.arange(16) / 16) + torch.tensor([0.0, 1.0, 2.0])[None, :, None]
    assert torch.allclose(low_pass(sound, 0.2), slow, atol=1e-5) and torch.allclose(
        low_pass(sound, 1.0), sound, atol=1e-5
    )


def test_a_packed_latent_has_no_frequencies():
    """Sound and video in one row: the difference is reused as it is, whatever the weights."""
    session = FasterCFG(interval=5, low=1.0, high=1.0, start_percent=0.0).start(Run(TIMES))
    t = torch.ones(1)
    with session.call(TIMES[0]):
        D_c, D_u = torch.randn(2, 1, 1, 24).unbind(0)
        session.learn("key", D_c, t, D_c, D_u)
    with session.call(TIMES[1]):
        assert torch.allclose(session.answer("key", D_c, t, D_c), D_u, atol=1e-5)


def test_faster_cfg_does_not_compound():
    """The published program multiplies what it stored at every skip; here the factor is that of one."""
    run = Run(TIMES)
    settings = FasterCFG(interval=5, low=0.1, high=0.3, turn=1.0, start_percent=0.0)
    session = settings.start(run)
    d, D_c = noise(5).float(), noise(6).float()
    for i, t in enumerate(TIMES[:5]):
        with session.call(t):
            column = torch.full((2,), t)
            if i == 0:
                session.learn("key", D_c, column, D_c, unconditional(column, D_c, d))
            else:
                got = delta(column, D_c, session.answer("key", D_c, column, D_c))
                assert torch.allclose(got, d + 0.1 * low_pass(d, settings.radius), atol=1e-4)
    late = FasterCFG(interval=5, low=0.1, high=0.3, turn=0.0, start_percent=0.0).start(run)
    with late.call(3.0):
        column = torch.full((2,), 3.0)
        late.learn("key", D_c, column, D_c, unconditional(column, D_c, d))
        got = delta(column, D_c, late.answer("key", D_c, column, D_c))
    assert torch.allclose(got, 1.3 * d - 0.3 * low_pass(d, settings.radius), atol=1e-4)


def test_faster_cfg_turns_in_training_time():
    process = VarianceExploding(training_sigmas=torch.linspace(-6, 2, 1001).double().exp().numpy())
    session = FasterCFG(turn=0.7, interval=2).start(Run(TIMES, process=process))
    late = []
    for u in (0.9, 0.31, 0.29):
        with session.call(float(process.t_of_u(u))):
            late.append(session.late)
    assert late == [False, False, True]


def trajectory(steps, seed):
    """d_u follows a recurrence of its own past and of d_c: what LinearAG's fit must find."""
    made = []
    for n in range(steps):
        d_c = noise(100 * seed + n)
        d_u = 0.7 * d_c + 0.2 * made[-1][0] + 0.1 * made[-2][1] if n > 1 else noise(100 * seed + 50 + n)
        made.append((d_c, d_u))
    return made


def test_linear_ag_finds_the_coefficients():
    runs = [trajectory(9, seed) for seed in range(3)]
    full = full_steps(9, 2, 4)
    assert full == [True] * 4 + [False, True] * 2 + [False]
    steps = fit(runs, 9, 2, 4, 2)
    assert [made is None for made in steps] == full
    # Step 4 knows step 2; later d_u(n - 2) itself was left out, and a little of it cannot be known.
    assert steps[4]["c"] == pytest.approx([0.0, 0.2, 0.7], abs=0.02)
    assert steps[4]["u"] == pytest.approx([0.1, 0.0], abs=0.02)
    held = trajectory(9, 5)
    assert loss(held, steps) < 0.1 and loss(held, fit([], 9, 2, 4, 2)) > 0.5


def test_linear_ag_without_data_is_reuse():
    run = trajectory(9, 1)
    steps = fit([], 9, 3, 2, 2)
    for n, made in enumerate(steps):
        if made is not None:
            m = max(k for k in range(n) if steps[k] is None)
            want = run[n][0] + run[m][1] - run[m][0] if n - m <= 2 else run[m][1]
            assert torch.allclose(predicted(run, steps, n), want)


def test_linear_ag_runs_what_was_fitted():
    """The session's answer is the fit's prediction, and its steps are the fit's."""
    run = trajectory(12, 7)
    steps = fit([trajectory(12, seed) for seed in range(2)], 12, 3, 2, 2)
    settings = LinearAG(Artifact(KIND, {"times": TIMES, "steps": steps}))
    known = Run(TIMES)
    assert settings.off(known) is None
    taken = iter(run)

    def sides(t):
        d_c, d_u = next(taken)
        x = noise(9)
        return x, x - t * d_c, x - t * d_u

    plans, made = calls(settings.start(known), sides)
    assert [p is Plan.FULL for p in plans] == [s is None for s in steps]
    left_out = [n for n, s in enumerate(steps) if s is not None]
    for n, (got, _) in zip(left_out, made, strict=True):
        assert torch.allclose(got, noise(9) - TIMES[n] * predicted(run, steps, n))


def test_linear_ag_where_it_cannot_work():
    steps = fit([], 12, 3, 2, 2)
    fitted = LinearAG(Artifact(KIND, {"times": TIMES, "steps": steps}))
    assert "no calibration" in LinearAG().off(Run(TIMES))
    assert "12 steps" in fitted.off(Run(TIMES[2:])) and "other sigmas" in fitted.off(Run([2 * t for t in TIMES]))
    assert "comparing" in fitted.off(Run(TIMES, adaptive=True))
    session = fitted.start(Run(TIMES))
    for t in (TIMES[0], TIMES[0], TIMES[1]):  # a stage of its own at the same time: the steps no longer fit
        with session.call(t):
            plan = session.plan
    assert plan is Plan.PLAIN
    session = fitted.start(Run(TIMES))
    with session.call(TIMES[0]):
        session.learn("key", noise(1), torch.ones(2), noise(2), noise(3))
    with session.call(TIMES[1]):
        pass  # nothing was learnt in this step
    with session.call(TIMES[2]):
        assert session.plan is Plan.PARTIAL and not session.ready("key")


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"times": [], "steps": [{"c": [1.0]}]},
        {"times": [1.0], "steps": [None, None]},
        {"times": [], "steps": [None, {"c": ["a"], "u": [1.0]}]},
        {"times": [], "steps": [{"c": [1.0, 2.0], "u": [1.0]}]},
        {"times": [], "steps": [None, {"c": [1.0], "u": []}]},
    ],
)
def test_a_damaged_calibration_is_one_sentence(table):
    with pytest.raises(ValueError, match="LinearAG: the calibration's table is damaged"):
        LinearAG(Artifact(KIND, table))
    with pytest.raises(ValueError, match="the file holds dc_ratios"):
        LinearAG(Artifact("dc_ratios", {}))
