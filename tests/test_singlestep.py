"""Single-step solvers: the papers' formulas, identities, parity with diffusers, order plans, correlated noise."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DPMSolverSinglestepScheduler
from quickstep_under_test.solvers import runge_kutta
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, SDEDPMSolverPP
from quickstep_under_test.solvers.noise import gaussian
from quickstep_under_test.solvers.rho_rk import TABLEAUS, RhoRK
from quickstep_under_test.solvers.seeds import SEEDS
from quickstep_under_test.solvers.singlestep import DPMSolverSinglestep, budget
from quickstep_under_test.solvers.solver import Problem, sample, solve
from quickstep_under_test.solvers.verify import (
    FLOW,
    VE,
    measured_order,
    measured_weak_order,
    measuring_range,
    moments_of_run,
    ode_errors,
    start,
    uniform_lambda,
)

PROCESSES = [pytest.param(VE, id="ve"), pytest.param(FLOW, id="flow")]
DATA = GaussianMixture.random()


def run(solver, process, times, denoise=None, n=4):
    x = start(process, times[0], n)
    return sample(Problem(denoise or DATA.denoiser(process), process, gaussian(x, 7)), solver, x, times)


def by_the_papers_formula(process, denoise, x, s, t, order, data, taylor):
    """One step as the papers write it, with differences of predictions instead of weights."""
    sign = -1.0 if data else 1.0
    h = process.lam(t) - process.lam(s)

    def at(r):
        return t if r == 1.0 else process.t_of_lam(process.lam(s) + r * h)

    def m(x, u):
        return denoise(x, u) if data else (x - process.alpha(u) * denoise(x, u)) / process.sigma(u)

    def base(r):
        u = at(r)
        if data:
            return process.sigma(u) / process.sigma(s) * x - process.alpha(u) * math.expm1(-r * h) * m_s
        return process.alpha(u) / process.alpha(s) * x - process.sigma(u) * math.expm1(r * h) * m_s

    def c(r):
        return process.alpha(at(r)) if data else process.sigma(at(r))

    m_s = m(x, s)
    P1 = math.expm1(sign * h)
    P2 = P1 / h - sign
    P3 = P2 / h - 0.5
    if order == 1:
        return base(1.0)
    if order == 2:
        m_1 = m(base(0.5), at(0.5))
        if taylor:
            return base(1.0) - sign * c(1.0) * P2 / 0.5 * (m_1 - m_s)
        return base(1.0) - c(1.0) * P1 * (m_1 - m_s)
    r1, r2 = 1 / 3, 2 / 3
    m_1 = m(base(r1), at(r1))
    P2_inner = math.expm1(sign * r2 * h) / (r2 * h) - sign
    x_2 = base(r2) - sign * r2 / r1 * c(r2) * P2_inner * (m_1 - m_s)
    m_2 = m(x_2, at(r2))
    if not taylor:
        return base(1.0) - sign * c(1.0) * P2 / r2 * (m_2 - m_s)
    a0, a1 = (m_1 - m_s) / r1, (m_2 - m_s) / r2
    D1, D2 = (r2 * a0 - r1 * a1) / (r2 - r1), 2 * (a1 - a0) / (r2 - r1)
    return base(1.0) - sign * c(1.0) * P2 * D1 - c(1.0) * P3 * D2


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("correction", ["midpoint", "taylor"])
@pytest.mark.parametrize("algorithm", ["data", "noise"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_formulas_of_the_papers(order, algorithm, correction, process):
    times = uniform_lambda(process, *measuring_range(process), 5)
    expected = start(process, times[0])
    for s, t in pairwise(times):
        expected = by_the_papers_formula(
            process, DATA.denoiser(process), expected, s, t, order, algorithm == "data", correction == "taylor"
        )
    solver = DPMSolverSinglestep(order=order, algorithm=algorithm, correction=correction, frame="snr")
    assert (run(solver, process, times) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (DPMSolverSinglestep(order=1), DDIM()),
        (DPMSolverSinglestep(order=1, algorithm="noise", frame="snr"), DDIM()),
        (SEEDS(order=2, eta=0.0), DPMSolverSinglestep(order=2)),
        (
            SEEDS(order=2, eta=0.0, correction="taylor", c2=1.0),
            DPMSolverSinglestep(order=2, correction="taylor", r1=1.0),
        ),
        (SEEDS(order=3, eta=0.0), DPMSolverSinglestep(order=3)),
        (SEEDS(order=1, eta=0.7), SDEDPMSolverPP(order=1, eta=0.7)),
        (SEEDS(order=1), DDIM(eta=1.0)),
    ],
    ids=lambda s: f"{s.id}{s.convergence_order}",
)
def test_members_that_coincide(one, other, process):
    times = [*uniform_lambda(process, *measuring_range(process), 6), 0.0]
    assert (run(one, process, times) - run(other, process, times)).abs().max() < 1e-12


@pytest.mark.parametrize("process", PROCESSES)
def test_2heun_is_heuns_method_in_sigma(process):
    times = uniform_lambda(process, *measuring_range(process), 7)
    denoise = DATA.denoiser(process)
    x = start(process, times[0])
    for s, t in pairwise(times):
        d = (x - denoise(x, s)) / s
        euler = x + (t - s) * d
        x = x + (t - s) * (d + (euler - denoise(euler, t)) / t) / 2
    assert (run(RhoRK("2heun"), process, times) - x).abs().max() < 1e-12


def test_the_sigma_frame_is_what_makes_runge_kutta_good_on_flow_models():
    vef, snr = (
        ode_errors(RhoRK("4rk", frame=frame), FLOW, lambda p, a, b, n: torch.linspace(a, b, n + 1).tolist(), [20])[0]
        for frame in ("vef", "snr")
    )
    assert vef < snr / 10


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("w", [7.5, 15.0])
def test_noise_prediction_explodes_under_guidance(order, w):
    """What the docstring warns of, with 10 calls on a guided mixture whose samples have a spread of about 1.5."""
    part = GaussianMixture(DATA.w[:1], DATA.m[:1], DATA.v[:1], DATA.Q[:1]).denoiser(VE)

    def guided(x, t):
        full = DATA.denoiser(VE)(x, t)
        return full + w * (part(x, t) - full)

    times = [*uniform_lambda(VE, 10.0, 0.1, 9), 0.0]
    exact = run(DPMSolverSinglestep(3), VE, [*uniform_lambda(VE, 10.0, 0.1, 150), 0.0], guided, n=32)
    data, noise = (
        (run(DPMSolverSinglestep(order, algorithm, "budget"), VE, times, guided, n=32) - exact).square().mean().sqrt()
        for algorithm in ("data", "noise")
    )
    assert data < 0.15 < 0.5 < noise


@pytest.mark.parametrize(
    ("calls", "order", "to_zero", "expected"),
    [
        (9, 3, False, (3, 3, 2, 1)),
        (10, 3, False, (3, 3, 3, 1)),
        (11, 3, False, (3, 3, 3, 2)),
        (9, 3, True, (3, 3, 2, 1)),
        (10, 3, True, (3, 3, 3, 1)),
        (11, 3, True, (3, 3, 2, 2, 1)),
        (8, 2, False, (2, 2, 2, 2)),
        (8, 2, True, (2, 2, 2, 1, 1)),
        (7, 2, True, (2, 2, 2, 1)),
        (3, 3, True, (2, 1)),
        (2, 3, True, (1, 1)),
        (2, 3, False, (2,)),
        (1, 3, True, (1,)),
        (4, 1, True, (1, 1, 1, 1)),
    ],
)
def test_order_plans(calls, order, to_zero, expected):
    assert budget(calls, order, to_zero) == expected


def test_plans_spend_what_they_are_given():
    for order in (1, 2, 3):
        for calls in range(1, 40):
            assert sum(budget(calls, order, False)) == calls
            assert sum(budget(calls, order, True)) == calls and budget(calls, order, True)[-1] == 1


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("algorithm", ["data", "noise"])
@pytest.mark.parametrize(("order", "r1"), [(2, 0.5), (3, 1 / 3)])
def test_a_budget_on_an_even_grid_is_the_fixed_plan_on_the_coarse_one(order, r1, algorithm, process):
    """The inner evaluations are at the given times, and a step of the method ends at every ``order``-th of them."""
    solver = DPMSolverSinglestep(order, algorithm, frame="snr")
    fine = uniform_lambda(process, *measuring_range(process), 4 * order + (order == 3) * 2)
    asked = []

    def denoise(x, t):
        asked.append(t)
        return DATA.denoiser(process)(x, t)

    got = run(DPMSolverSinglestep(order, algorithm, plan="budget", frame="snr"), process, fine, denoise)
    assert asked == fine[:-1]
    if order == 3:  # ends with the two calls that are left
        coarse = run(solver, process, fine[: 4 * order + 1 : order])
        tail = DPMSolverSinglestep(2, algorithm, frame="snr")
        x = Problem(DATA.denoiser(process), process)
        expected = sample(x, tail, coarse, [fine[12], fine[14]])
    else:
        expected = run(solver, process, fine[::order])
    assert (got - expected).abs().max() < 1e-12


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("solver", [DPMSolverSinglestep(3, a, "budget", c) for a, c in
                                    (("data", "midpoint"), ("data", "taylor"), ("noise", "midpoint"))], ids=str)  # fmt: skip
def test_third_order_steps_of_a_budget(solver, process):
    """At 3 k + 2 calls above zero the plan has no first-order step, and the order shows."""
    assert abs(measured_order(solver, process, uniform_lambda, (47, 95, 191)) - 3) < 0.15


def test_previews_of_a_budget_are_points_of_the_run():
    times = [*uniform_lambda(VE, 10.0, 0.1, 8), 0.0]
    x = start(VE, 10.0)
    made = list(solve(Problem(DATA.denoiser(VE), VE), DPMSolverSinglestep(3, plan="budget"), x, times))
    for step, t in zip(made[:-1], times[1:], strict=False):
        exact = DATA.solve_ode(VE, x, times[0], t)
        assert (step.x - exact).abs().max() < 0.25 * t + 0.1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("order", "solver_type"), [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "heun")])
@pytest.mark.parametrize(("algorithm", "steps"), [("data", 9), ("data", 10), ("noise", 9)])
def test_a_budget_equals_diffusers(order, solver_type, algorithm, steps):
    """Its scheduler plans the same way, but at order 3 with midpoint its inner point is not the paper's."""
    theirs = DPMSolverSinglestepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="sample",
        algorithm_type={"data": "dpmsolver++", "noise": "dpmsolver"}[algorithm],
        solver_order=order,
        solver_type=solver_type,
        lower_order_final=True,
        final_sigmas_type={"data": "zero", "noise": "sigma_min"}[algorithm],
        use_karras_sigmas=True,
    )
    theirs.set_timesteps(steps)
    sigmas = theirs.sigmas.double().tolist()
    if sigmas[-1] == sigmas[-2]:  # their Karras schedule has the last sigma twice
        sigmas[-1] = 0.5 * sigmas[-2]
        theirs.sigmas[-1] = sigmas[-1]
    correction = {"midpoint": "midpoint", "heun": "taylor"}[solver_type]
    mine = DPMSolverSinglestep(order, algorithm, "budget", correction)
    x = start(VE, sigmas[0])
    denoise = DATA.denoiser(VE)
    got = sample(Problem(denoise, VE), mine, x, sigmas)
    v = x * (1 + sigmas[0] ** 2) ** -0.5
    for t, sigma in zip(theirs.timesteps, sigmas, strict=False):
        v = theirs.step(denoise(v * (1 + sigma**2) ** 0.5, sigma), t, v).prev_sample
    expected = v * (1 + sigmas[-1] ** 2) ** 0.5
    assert (got - expected).abs().max() < 5e-5  # diffusers computes its coefficients in float32


@pytest.mark.parametrize("process", PROCESSES)
def test_seeds_3_converges_at_weak_order_2(process):
    """Its third-order part hides the second order up to a hundred steps."""
    exact = process.alpha(t_min := measuring_range(process)[1]) ** 2 * 0.4 + t_min**2
    errors = [
        moments_of_run(SEEDS(order=3), process, uniform_lambda(process, *measuring_range(process), n), 0.4)[1] - exact
        for n in (120, 240)
    ]
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.15


@pytest.mark.parametrize("process", PROCESSES)
def test_independent_noise_would_cost_an_order(monkeypatch, process):
    """Negative control: the same marginals at every point, but not those of one path."""
    kept = []

    def independent(problem, process, noise, a, b, keep):
        share = keep(process.lam(b) - process.lam(a))
        kept[:] = [share] if noise is None else [kept[0] * share]
        return problem.noise(a, b) * math.sqrt(1.0 - kept[0] ** 2)

    monkeypatch.setattr(runge_kutta, "_advance", independent)
    assert abs(measured_weak_order(SEEDS(order=2), process) - 1) < 0.25


@pytest.mark.parametrize(("solver", "calls"), [
    (DPMSolverSinglestep(2), 2), (DPMSolverSinglestep(3), 3), (DPMSolverSinglestep(3, plan="budget"), 1), (SEEDS(3), 3),
    *((RhoRK(method), int(method[0])) for method in TABLEAUS),
], ids=str)  # fmt: skip
def test_calls_per_step(solver, calls):
    assert solver.calls == calls
    assert solver.nfe(10) == 9 * calls + 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DPMSolverSinglestep(order=4), "order = 4 must lie between 1 and 3"),
        (lambda: DPMSolverSinglestep(r1=0.0), "r1 = 0.0 must lie between"),
        (lambda: DPMSolverSinglestep(plan="fast"), "not one of fixed, budget"),
        (lambda: RhoRK("5rk"), "not one of 2heun"),
        (lambda: SEEDS(eta=-0.1), "eta = -0.1 must lie between"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
