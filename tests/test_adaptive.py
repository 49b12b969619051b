"""Adaptive step sizes: tolerance and error, independent samples, caps, masks, parity with scipy's steppers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from quickstep_under_test.solvers.adaptive import PID, DPMSolverAdaptive, Proportional
from quickstep_under_test.solvers.black_box import AdaptiveRK, Elementary
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.solver import Problem, sample, solve
from quickstep_under_test.solvers.step_size import Verdict
from quickstep_under_test.solvers.verify import FLOW, VE, measuring_range, start, uniform_lambda

from .test_singlestep import by_the_papers_formula

PROCESSES = [pytest.param(VE, id="ve"), pytest.param(FLOW, id="flow")]
DATA = GaussianMixture.random()
SOLVERS = [
    DPMSolverAdaptive(order=2),
    DPMSolverAdaptive(order=3),
    DPMSolverAdaptive(order=3, algorithm="noise"),
    DPMSolverAdaptive(order=3, controller_type="pid"),
    AdaptiveRK("RK23"),
    AdaptiveRK("RK45"),
    AdaptiveRK("DOP853"),
    AdaptiveRK("RK45", variable="sigma"),
]

FEW = [DPMSolverAdaptive(), DPMSolverAdaptive(order=2, algorithm="noise", controller_type="pid"), AdaptiveRK("RK45")]
"""One of each kind, for what has nothing to do with their formulas."""


def solvers(which=FEW):
    return pytest.mark.parametrize("solver", which, ids=lambda s: "-".join(str(v) for v in vars(s).values()))


class Counted:
    """A denoiser that remembers the times it was asked at."""

    def __init__(self, denoise):
        self.denoise, self.asked = denoise, []

    def __call__(self, x, t):
        self.asked.append(t if isinstance(t, float) else list(t))
        return self.denoise(x, t)


def run(solver, process, x, times, denoise=None, mask=None):
    """The result and the times asked."""
    counted = Counted(denoise or DATA.denoiser(process))
    return sample(Problem(counted, process, mask=mask), solver, x, times), counted.asked


@pytest.mark.parametrize("process", PROCESSES)
@solvers(SOLVERS)
def test_the_error_follows_the_tolerance(solver, process):
    """Ten times less error at least for a hundredth of the tolerance, and not for free."""
    t_max, t_min = measuring_range(process)
    x = start(process, t_max, n=2)
    exact = DATA.solve_ode(process, x, t_max, t_min)
    errors, calls = [], []
    for factor in (1.0, 0.1, 0.01):
        strict = replace(solver, rtol=0.05 * factor, atol=0.0078 * factor, max_calls=10_000)
        got, asked = run(strict, process, x, uniform_lambda(process, t_max, t_min, 10))
        errors.append((got - exact).abs().max().item())
        calls.append(len(asked))
    assert errors[2] < errors[0] / 10 and errors[2] < 0.01
    assert calls[0] <= calls[1] <= calls[2] < 250


@pytest.mark.parametrize("variable", ["log sigma", "sigma"])
@pytest.mark.parametrize("method", ["RK23", "RK45", "DOP853"])
def test_parity_with_scipy(method, variable):
    """One sample, the same first step: the steps of scipy's stepper, its number of evaluations, its result."""
    from scipy.integrate import solve_ivp

    denoise = DATA.denoiser(VE)
    x = start(VE, 10.0, n=1)

    def slope(u, flat):
        t = math.exp(u) if variable == "log sigma" else float(u)
        drift = flat - denoise(torch.from_numpy(flat).reshape(x.shape), t).reshape(-1).numpy()
        return drift if variable == "log sigma" else drift / t

    first, last = (math.log(10.0), math.log(0.1)) if variable == "log sigma" else (10.0, 0.1)
    theirs = solve_ivp(
        slope, (first, last), x.reshape(-1).numpy(), method, rtol=1e-4, atol=1e-5, first_step=0.01 * (first - last)
    )
    got, asked = run(AdaptiveRK(method, rtol=1e-4, atol=1e-5, variable=variable), VE, x, [10.0, 3.0, 0.5, 0.1])
    assert (got.reshape(-1) - torch.from_numpy(theirs.y[:, -1])).abs().max() < 1e-9
    # Theirs keeps the slope at the start of a trial too, and evaluates it once before the first.
    assert len(asked) == theirs.nfev


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("algorithm", ["data", "noise"])
def test_the_papers_algorithm(algorithm, process):
    """DPM-Solver-12 as a plain loop over one sample."""
    t_max, t_min = measuring_range(process)
    denoise, rtol, atol = DATA.denoiser(process), 0.02, 0.003
    x = low = first = start(process, t_max, n=1)
    s, h, trials = t_max, 0.5, 0  # so long that the first trial is rejected
    while s > t_min:
        rest = process.lam(t_min) - process.lam(s)
        h = min(h, rest)
        t = t_min if h == rest else process.t_of_lam(process.lam(s) + h)
        lower, higher = (
            by_the_papers_formula(process, denoise, x, s, t, order, algorithm == "data", False) for order in (1, 2)
        )
        E = (higher - lower) / torch.maximum(rtol * torch.maximum(lower.abs(), low.abs()), torch.tensor(atol))
        E = E.square().mean().sqrt().item()
        if E <= 1.0:
            x, low, s = higher, lower, t
        h, trials = 0.9 * h * E**-0.5, trials + 1
    solver = DPMSolverAdaptive(2, rtol, atol, algorithm, h_init=0.5, frame="snr")
    got, asked = run(solver, process, first, [t_max, t_min])
    assert (got - x).abs().max() < 1e-9  # rounding comes back through E
    assert trials < len(asked) < 2 * trials  # one call less for each that was rejected


@solvers()
def test_each_sample_takes_its_own_steps(solver):
    """An easy sample (a narrow start far from all modes) costs the same in company; the batch costs as its hardest sample."""
    x = torch.cat([start(VE, 10.0, n=1), 40.0 + start(VE, 10.0, n=1, seed=3), 8.0 * start(VE, 10.0, n=1, seed=5)])
    times = [*uniform_lambda(VE, 10.0, 0.1, 6), 0.0]
    together, asked = run(solver, VE, x, times)
    alone = [run(solver, VE, row[None], times) for row in x]
    assert (together - torch.cat([x for x, _ in alone])).abs().max() < 1e-10
    calls = [len(a) for _, a in alone]
    assert len(set(calls)) > 1  # the samples do differ
    assert max(calls) <= len(asked) <= max(calls) + 12  # a call more where they reject in different trials
    assert any(isinstance(t, list) and len(set(t)) == 3 for t in asked)
    assert all(isinstance(t, float) or len(t) == 3 for t in asked)


@solvers()
@pytest.mark.parametrize("process", PROCESSES)
def test_the_last_positive_time_is_hit_and_then_the_prediction_is_taken(solver, process):
    t_max, t_min = measuring_range(process)
    x = start(process, t_max)
    times = uniform_lambda(process, t_max, t_min, 5)
    above, asked = run(solver, process, x, times)
    clean, more = run(solver, process, x, [*times, 0.0])
    assert (clean - DATA.denoiser(process)(above, t_min)).abs().max() < 1e-12
    assert more[: len(asked)] == asked
    assert more[-1] == t_min  # methods whose last evaluation is there already need no more
    assert len(more) == len(asked) + (not isinstance(solver, AdaptiveRK))


@solvers()
def test_times_in_between_change_nothing_but_the_previews(solver):
    x = start(VE, 10.0)
    coarse, fine = [10.0, 0.1, 0.0], [*uniform_lambda(VE, 10.0, 0.1, 40), 0.0]
    one, asked_one = run(solver, VE, x, coarse)
    other, asked_other = run(solver, VE, x, fine)
    assert torch.equal(one, other) and asked_one == asked_other
    made = list(solve(Problem(DATA.denoiser(VE), VE), solver, x, fine))
    assert len(made) == 41
    for t, step in zip(fine[1:-1], made, strict=False):
        assert all(row.t <= t for row in step.state.rows)
        assert torch.equal(torch.cat([row.x for row in step.state.rows]), step.x)
    row = made[20].state.rows[0]  # x is where the row is
    assert (row.x - DATA.solve_ode(VE, x[:1], 10.0, row.t)).abs().max() < 0.25


@solvers()
def test_a_step_changes_no_state(solver):
    times = [10.0, 2.0, 0.5, 0.1, 0.0]
    problem = Problem(DATA.denoiser(VE), VE)
    x = start(VE, 10.0)
    first = solver.step(problem, x, 10.0, 2.0, solver.start(times))
    kept = [row.x.clone() for row in first.state.rows]
    second = solver.step(problem, first.x, 2.0, 0.5, first.state)
    assert all(torch.equal(a, row.x) for a, row in zip(kept, first.state.rows, strict=True))
    assert torch.equal(solver.step(problem, first.x, 2.0, 0.5, first.state).x, second.x)


@solvers()
@pytest.mark.parametrize("cap", [1, 15, 30])
def test_calls_are_capped_and_the_rest_is_plain_steps(solver, cap):
    """Then one step per time that is left, for each sample on its own."""
    strict = replace(solver, rtol=1e-6, atol=1e-6, max_calls=cap)
    x, times = start(VE, 10.0), [*uniform_lambda(VE, 10.0, 0.1, 8), 0.0]
    got, asked = run(strict, VE, x, times)
    assert got.isfinite().all()
    assert len(asked) <= cap + 9 * solver.calls
    if cap == 1:  # nothing but the given times
        assert {t for t in asked if t in times} >= set(times[: -1 - isinstance(solver, AdaptiveRK)])
    exact = DATA.denoiser(VE)(DATA.solve_ode(VE, x, 10.0, 0.1), 0.1)
    assert (got - exact).abs().max() < 0.5
    alone = torch.cat([run(strict, VE, row[None], times)[0] for row in x])
    assert (got - alone).abs().max() < 1e-10


@solvers()
def test_a_network_without_numbers_ends(solver):
    got, asked = run(
        replace(solver, max_calls=50), VE, start(VE, 10.0), [10.0, 1.0, 0.1, 0.0], lambda x, t: x * math.nan
    )
    assert got.isnan().all() and len(asked) < 100


@solvers(SOLVERS)
def test_predictions_that_do_not_change_take_few_calls(solver):
    x = start(VE, 14.0)
    got, asked = run(solver, VE, x, [14.0, 0.03], GaussianMixture.gaussian(0.3, 0.0).denoiser(VE))
    expected = 0.3 + (0.03 / 14.0) * (x - 0.3)
    exact = not isinstance(solver, AdaptiveRK) or solver.variable == "sigma"
    assert (got - expected).abs().max() < (1e-10 if exact else 0.01)
    if exact and not isinstance(solver, AdaptiveRK) and solver.controller_type == "dpm-solver":
        assert len(asked) == 2 * solver.order  # the first step is not too long, the second reaches the end


@solvers()
def test_inpainting_measures_the_edited_part(solver):
    """The kept part, which the network returns as it is, may be as rough as it likes; its size in the batch is free."""
    mask = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    mask[..., :2] = 1.0
    denoise = DATA.denoiser(VE)

    def rough(x, t):
        rows = [t] * len(x) if isinstance(t, float) else t
        kept = torch.stack([torch.full((1, 2, 2), 50.0 * math.sin(30.0 * u), dtype=x.dtype) for u in rows])
        return torch.cat([denoise(x[..., :2], t), kept], -1)

    part = start(VE, 10.0)
    x = torch.cat([part, part], -1)
    times = [10.0, 1.0, 0.1, 0.0]
    expected, asked = run(solver, VE, part, times)
    for given in (mask, mask.expand(4, 1, 2, 4)):
        got, masked = run(solver, VE, x, times, rough, given)
        assert (got[..., :2] - expected).abs().max() < 1e-10 and len(masked) == len(asked)
    assert len(run(replace(solver, max_calls=90), VE, x, times, rough)[1]) > len(asked)


@solvers()
def test_the_device_is_read_once_per_trial(solver, monkeypatch):
    reads = []
    for name in ("tolist", "item", "__bool__", "__float__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, real=real: reads.append(1) or real(x))
    counted = Counted(lambda x, t: x * 0.5)
    sample(Problem(counted, VE), solver, start(VE, 10.0), [10.0, 1.0, 0.1, 0.0])
    per_trial = len(solver.pair.inner)
    assert 0 < len(reads) <= len(counted.asked) / per_trial


def test_controllers():
    assert Proportional(2, 0.9).judge(4.0, 1.0, None) == Verdict(False, 0.45, None)
    assert Proportional(3, 0.9).judge(1 / 8, 1.0, None).h == pytest.approx(1.8)
    assert Proportional(3, 0.9).judge(0.0, 1.0, None).accept
    elementary = Elementary(1 / 5)
    assert elementary.judge(1e-9, 1.0, None) == Verdict(True, 10.0, None)
    assert elementary.judge(1e-9, 1.0, True) == Verdict(True, 1.0, None)
    assert elementary.judge(1e9, 1.0, None) == Verdict(False, 0.2, True)
    verdict = PID(3, 0.0, 1.0, 0.0).judge(1.0, 1.0, None)
    assert verdict.accept and verdict.h == pytest.approx(1.0)
    assert not PID(3, 0.0, 1.0, 0.0).judge(3.0, 1.0, None).accept
    steady, rising = (PID(2, 0.3, 0.5, 0.1).judge(0.5, 1.0, memory).h for memory in ((2.0, 2.0, 2.0), (2.0, 8.0, 8.0)))
    assert rising < steady  # the error grew since the last step: shorter


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DPMSolverAdaptive(order=1), "order = 1 must lie between 2 and 3"),
        (lambda: DPMSolverAdaptive(rtol=0.0), "rtol = 0.0 must lie between"),
        (lambda: AdaptiveRK("LSODA"), "not one of RK45, RK23, DOP853"),
        (lambda: AdaptiveRK(max_calls=0), "max_calls = 0 must lie between"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
