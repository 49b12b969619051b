"""DMN, HSO and kinetic optimal paths: bounds against quadrature, optima against brute force, what they are worth."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from quickstep_under_test.solvers.calibration import hso
from quickstep_under_test.solvers.calibration import teacher as teachers
from quickstep_under_test.solvers.calibration.cohort import Cohort
from quickstep_under_test.solvers.calibration.diffusion_time import Spectrum, lowest, mismatch, spectrum
from quickstep_under_test.solvers.calibration.dmn import DMN, bound, errors, warm, weights
from quickstep_under_test.solvers.calibration.families import Plan
from quickstep_under_test.solvers.calibration.gaussian import GaussianStatistics
from quickstep_under_test.solvers.calibration.hso import ENDS, HSO, descended, lack, mep, training
from quickstep_under_test.solvers.calibration.kinetic import KineticOptimal, path, separation
from quickstep_under_test.solvers.calibration.library import PROPOSALS, again
from quickstep_under_test.solvers.calibration.proposal import ProposalSearch, blended
from quickstep_under_test.solvers.calibration.teacher import teach
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP
from quickstep_under_test.solvers.schedules import ExponentialSchedule, KarrasSchedule
from quickstep_under_test.solvers.solver import sample
from scipy.optimize import minimize

from .test_calibration import (
    FLOW,
    K_MAX,
    K_MIN,
    MIXTURE,
    NOISE,
    POINT,
    VE,
    batch,
    cohorts_of,
    drained,
    is_the_best,
    starts,
)

LOW, HIGH, C = -math.log(K_MAX), -math.log(K_MIN), 0.5
SIGMAS = np.sqrt(1.0 / np.cumprod(1.0 - np.linspace(0.03, 0.11, 1000) ** 2) - 1.0)
TABLE = replace(VE, training_sigmas=SIGMAS, t_min=float(SIGMAS[0]), t_max=float(SIGMAS[-1]))
USUAL = {"Karras": KarrasSchedule(), "Exponential": ExponentialSchedule()}
MINE = [
    pytest.param(made, id=type(made).__name__) for made in (DMN(), HSO(), KineticOptimal(levels=8))
]  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(teachers, "MOST", 80)


def final(method, cohort=None, process=VE, steps: int = 5):
    """The measurement, as a file gives it back."""
    found = [m for m in method.measure(cohort, process, None, steps) if m is not None]
    return json.loads(json.dumps(found[-1]))


def levels(n: int = 6, seed: int = 0) -> np.ndarray:
    inner = np.sort(np.random.default_rng(seed).uniform(LOW + 0.2, HIGH - 0.2, n - 1))
    return np.array([LOW, *inner, HIGH])


@cache
def taught(process, rows: int, seed: int, steps: int, data: GaussianMixture = MIXTURE) -> Cohort:
    cohort = Cohort([batch(process, rows, seed, data=data)])
    drained(teach(cohort, process, steps))
    return cohort


def off(solver, times) -> float:
    """Mean RMS on 200 samples that nothing was measured on."""
    return float(drained(taught(VE, 200, 3, 160).errors(Plan(solver, list(times)))).mean())


# DMN


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 6])
def test_weights_are_integrals_of_lagrange_polynomials(order, n):
    """Spec 11.1, 15: and they add up to e^{lambda_{s+1}} - e^{lambda_s}."""
    lam = levels(n)
    x, w = np.polynomial.legendre.leggauss(30)
    wanted = np.zeros((n, n))
    for s in range(n):
        half = 0.5 * (lam[s + 1] - lam[s])
        u = lam[s] + half * (1.0 + x)
        near = [s - i for i in range(min(order, s + 1, n - s))]
        for j in near:
            basis = np.prod([(u - lam[i]) / (lam[j] - lam[i]) for i in near if i != j], axis=0)
            wanted[s, j] = (w * half * np.exp(u) * basis).sum()
    J = weights(lam, order)
    assert np.allclose(J, wanted, rtol=1e-9, atol=1e-9 * wanted.max())
    assert np.allclose(J.sum(1), np.diff(np.exp(lam)), rtol=1e-9)


def test_errors_are_those_of_a_variance_preserving_process():
    alpha = np.array([0.05, 0.7, 0.999])
    sigma = np.sqrt(1.0 - alpha**2)
    for p in (1, 2):
        assert np.allclose(errors(np.log(alpha / sigma), p), sigma**p / alpha)


def test_the_bound_adds_single_levels_and_first_steps_apart():
    """The released code's sum, order 3 and trunc 3, written out."""
    lam = levels(6)
    A = weights(lam, 3) * errors(lam[:-1], 2)
    apart = [A[0, 0], math.hypot(*A[1, :2]), math.sqrt((A[2, :3] ** 2).sum()), A[5, 5]]
    assert bound(lam, 3, 2, 3) == pytest.approx(sum(apart) + np.abs(A[3] + A[4]).sum())
    A = weights(lam, 2) * errors(lam[:-1], 2)
    assert bound(lam, 2, 2, 0) == pytest.approx(A[0, 0] + A[5, 5] + np.abs(A[1:5].sum(0)).sum())


@pytest.mark.parametrize(("order", "p", "trunc"), [(1, 2, 0), (2, 2, 0), (3, 1, 3)])
def test_the_optimum_is_below_its_beginnings_and_one_step_stays(order, p, trunc):
    method = DMN(order=order, p=p, trunc=trunc)
    lam = method.optimum(TABLE, LOW, HIGH, 6, order)
    gap = 0.02 * (HIGH - LOW)
    begun = [bound(b, order, p, trunc) for b in warm(TABLE, LOW, HIGH, 6, gap)]
    assert bound(lam, order, p, trunc) < min(begun) and np.diff(lam).min() > 0.98 * gap
    assert method.optimum(TABLE, LOW, HIGH, 1, order).tolist() == [LOW, HIGH]
    two = method.optimum(TABLE, LOW, HIGH, 2, order)
    tried = [bound(np.array([LOW, y, HIGH]), order, p, trunc) for y in np.linspace(LOW + gap, HIGH - gap, 2000)]
    assert bound(two, order, p, trunc) <= min(tried) * (1 + 1e-5)


def test_neighbours_keep_apart():
    gap = 0.25 / 10 * (HIGH - LOW)
    free, kept = (np.diff(DMN(order=2, gap=g).optimum(VE, LOW, HIGH, 10, 2)).min() for g in (0.005, 0.2))
    assert free < 0.95 * gap < 0.99 * gap < kept


def test_it_begins_uniform_in_lambda_and_uniform_in_training_time():
    low, high = TABLE.lam(TABLE.t_max), TABLE.lam(TABLE.t_min)
    in_lambda, in_time = warm(TABLE, low, high, 6, 0.001)
    assert np.allclose(np.diff(in_lambda), (high - low) / 6)
    assert np.allclose(np.diff(TABLE.u_of_t(np.exp(-in_time))), -1.0 / 6.0)
    crowded = warm(VE, LOW, HIGH, 40, 0.01)[1]
    assert np.diff(crowded).min() > 0.01 and crowded[[0, -1]].tolist() == pytest.approx([LOW, HIGH])


def test_order_is_the_samplers_where_none_is_given():
    method = DMN(order=0)
    assert method.times({}, VE, 5, 2) == DMN(order=2).times({}, VE, 5, 1) != DMN(order=1).times({}, VE, 5, 2)
    assert method.times({}, VE, 8, 7) == DMN(order=3).times({}, VE, 8, 1)


# HSO


@pytest.mark.parametrize("p", [1, 2])
def test_the_midpoint_rule_has_one_minimum_from_wherever(p):
    best = descended(LOW, HIGH, 6, p)
    for seed in range(3):
        made = minimize(lambda y: mep(np.array([LOW, *np.sort(y), HIGH]), p)[0], levels(6, seed)[1:-1],
                        method="SLSQP", bounds=[(LOW, HIGH)] * 5)  # fmt: skip
        assert np.allclose(np.sort(made.x), best[1:-1], atol=0.02)
    lam, h = levels(6), 1e-6
    for i in range(5):
        up, down = lam.copy(), lam.copy()
        up[i + 1] += h
        down[i + 1] -= h
        assert mep(lam, p)[1][i] == pytest.approx((mep(up, p)[0] - mep(down, p)[0]) / (2 * h), rel=1e-5, abs=1e-5)


def test_it_is_a_midpoint_rule_of_an_integral_that_no_schedule_changes():
    lam = np.linspace(LOW, HIGH, 2001)
    sigma = 1.0 / np.sqrt(1.0 + np.exp(2.0 * lam))
    assert mep(lam, 2)[0] == pytest.approx(float((0.5 * (sigma[1:] + sigma[:-1]) * np.diff(lam)).sum()), rel=1e-5)
    assert mep(lam, 1)[0] == pytest.approx(HIGH - LOW, rel=1e-5)


@pytest.mark.parametrize(
    "process", [pytest.param(TABLE, id="table"), pytest.param(VE, id="log"), pytest.param(FLOW, id="flow")]
)
def test_it_ends_where_spacing_and_rule_are_best(process):
    for n, spacing in ((4, 1.0), (8, 1.5), (8, 0.0)):
        low = process.lam(process.t_max)
        tried = [descended(low, process.lam(float(hso.trained(process, u))), n, 2) for u in ENDS]
        price = [mep(lam, 2)[0] + 1e9 * lack(process, lam, spacing) for lam in tried]
        made = HSO(spacing=spacing).times({}, process, n, 1)
        assert np.allclose(process.lams(made[1:-1]), tried[int(np.argmin(price))][1:-1], atol=1e-6)
    least = 0.15 - 0.14 * 4 / 16
    gaps = -np.diff(training(process, levels(8)))
    assert lack(process, levels(8), 1.0) == pytest.approx((np.maximum(least - gaps, 0.0) ** 2).sum())
    u = training(process, np.array([process.lam(process.t_max), process.lam(process.t_min)]))
    assert np.allclose(u, [1.0, 0.0], atol=1e-9)
    assert training(process, np.array([process.lam(float(hso.trained(process, 0.3)))])) == pytest.approx(0.3)


# Kinetic optimal paths


@pytest.mark.parametrize(("alpha", "rates"), [(0.5, (1.0, -1.0)), (0.3, (1.4, -0.4))])
def test_the_energy_is_that_of_the_velocity(alpha, rates):
    """Spec 11.1, 16: by Monte Carlo, for two paths through a point."""
    sigma, (da, ds) = 1.0 - alpha, rates
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(12, (20_000,), generator=g)
    x0 = MIXTURE.m[rows] + 0.15 * torch.randn(20_000, 16, generator=g, dtype=torch.float64)
    eps = torch.randn(x0.shape, generator=g, dtype=torch.float64)
    z = alpha * x0 + sigma * eps
    D = MIXTURE.denoiser(VE)(z / alpha, sigma / alpha)
    u = ds / sigma * z + (da - alpha * ds / sigma) * D
    moment, mmse, k = x0.square().mean(), (x0 - D).square().mean(), sigma / alpha
    dlogk = ds / sigma - da / alpha
    energy = moment * da**2 + ds**2 - alpha**2 * dlogk**2 * mmse
    assert float(energy) == pytest.approx(float(u.square().mean()), abs=0.01)
    root = math.sqrt(float(moment))
    phi, s = math.atan(k / root), math.hypot(root * alpha, sigma)
    turn = math.sin(phi) * math.cos(phi) * dlogk
    Lambda = separation(np.array([k]), np.array([float(mmse)]), float(moment))[0]
    grow = (float(moment) * alpha * da + sigma * ds) / s
    assert grow**2 + s**2 * Lambda * turn**2 == pytest.approx(float(energy), rel=1e-6)


def test_points_far_apart_are_joined_by_straight_lines_and_one_gaussian_by_a_circle():
    k = np.exp(np.linspace(8.0, -8.0, 4001))
    straight = path(k, 0.0 * k, C**2, 1e9, 8)
    r = np.arange(1, 8) / 8
    assert np.allclose(straight[1:], C * (1 - r) / r, rtol=1e-3)
    circle = path(k, C**2 * k**2 / (C**2 + k**2), C**2, K_MAX, 8)
    assert np.allclose(circle, C * np.tan(math.atan(K_MAX / C) * np.arange(8, 0, -1) / 8), rtol=2e-3)


def test_no_other_path_has_less_energy():
    """Against a descent over radius and angle of 30 knots, with a separation in between."""
    moment, k = 1.0, np.exp(np.linspace(7.0, -7.0, 2001))
    Lambda = 0.2 + 0.6 * np.exp(-(np.log(k) ** 2))
    mmse = (1.0 - Lambda) / (1.0 / moment + 1.0 / k**2)
    n = 30

    def energy(v: np.ndarray) -> float:
        s, phi = np.append(1.0, np.append(v[: n - 1], 1.0)), np.append(math.pi / 2, np.append(v[n - 1 :], 0.0))
        middle = np.interp(-0.5 * (phi[1:] + phi[:-1]), -np.arctan(k), Lambda)
        return n * float((np.diff(s) ** 2 + (0.5 * (s[1:] + s[:-1])) ** 2 * middle * np.diff(phi) ** 2).sum())

    made = minimize(energy, np.append(np.ones(n - 1), np.linspace(math.pi / 2, 0.0, n + 1)[1:-1]), method="L-BFGS-B",
                    options={"maxfun": 20_000})  # fmt: skip
    ours = np.arctan(path(k, mmse, moment, 1e9, n))[1:]
    assert np.allclose(made.x[n - 1 :], ours, atol=0.01)


@pytest.mark.parametrize("process", [pytest.param(VE, id="ve"), pytest.param(FLOW, id="flow")])
def test_measured_is_the_error_of_the_prediction(process):
    data = GaussianMixture.gaussian(0.0, C**2, d=16)
    found = final(KineticOptimal(draws=4), taught(process, 200, 1, 40, data), process)
    k = np.exp(found["log_ratio"])
    assert found["moment"] == pytest.approx(C**2, rel=0.05)
    assert np.allclose(found["mmse"], C**2 * k**2 / (C**2 + k**2), rtol=0.06)
    assert k[0] == pytest.approx(K_MAX, rel=1e-4) and k[-1] == pytest.approx(K_MIN, rel=1e-4)


# What they are worth, and searches


@pytest.mark.parametrize(
    ("method", "n", "solver", "ratio"),
    [
        (DMN(), 5, DDIM(), 0.8), (DMN(), 10, DDIM(), 0.9), (DMN(), 10, DPMSolverPP(), 0.85),
        (HSO(), 5, DDIM(), 0.85), (HSO(), 5, DPMSolverPP(), 0.7),
    ],
    ids=str,
)  # fmt: skip
def test_as_proposed_they_beat_karras_on_the_bench_mixture(method, n, solver, ratio):
    usual = off(solver, USUAL["Karras"](VE, K_MAX, K_MIN, n))
    assert off(solver, method.times({}, VE, n, 2)) < ratio * usual


def test_the_kinetic_path_is_worse_and_a_part_of_the_way_better():
    found = final(KineticOptimal(), taught(VE, 24, 1, 80))
    usual = USUAL["Karras"](VE, K_MAX, K_MIN, 10).tolist()
    end = KineticOptimal().times(found, VE, 10, 2)
    part = blended(VE, usual, end, 0.4)
    for solver in (DDIM(), DPMSolverPP()):
        assert off(solver, end) > 1.1 * off(solver, usual) and off(solver, part) < 0.85 * off(solver, usual)


def search(process, proposal, steps: int, solver, **options) -> ProposalSearch:
    fit, select, report = cohorts_of(process, 6, **options)
    made = ProposalSearch(
        process, fit, select, report, starts(process, steps, solver), solver=solver, proposal=proposal, schedules=USUAL,
        samples=6, shape=(1, 4, 4),
    )  # fmt: skip
    for _ in made.run():
        pass
    return made


@pytest.mark.parametrize("process", [pytest.param(VE, id="ve"), pytest.param(NOISE, id="pure noise")])
@pytest.mark.parametrize("proposal", MINE)
def test_what_is_kept_is_never_worse_and_can_be_made_again(process, proposal):
    assert type(proposal) in PROPOSALS
    made = search(process, proposal, 5, DDIM())
    assert is_the_best(made)
    kept = json.loads(json.dumps(made.extra()))
    assert np.allclose(again(kept, process, 5), made.best.times, rtol=1e-9)
    for steps in (1, 2, 12):
        times = again({**kept, "share": 1.0}, process, steps)
        assert len(times) == steps + 1 and (np.diff(times) < 0).all() and times[-1] == 0.0
        assert times[0] == process.t_max


@pytest.mark.parametrize("proposal", MINE)
def test_degenerate_data(proposal):
    point = search(VE, proposal, 4, DPMSolverPP(), data=POINT)
    assert point.best is point.base and point.measured is None
    same = search(VE, proposal, 2, DPMSolverPP(), same=True)
    assert same.after.isfinite().all() and len(same.best.times) == 3


# Diffusion time


def test_the_divergence_is_that_of_two_gaussians():
    """Against the formula for full covariances, with statistics of each frequency and of directions."""
    x = torch.randn(40, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.7 + 0.3
    for rank in (0, 5):
        found = GaussianStatistics.measured(x, frequencies=2, rank=rank)
        made = spectrum(found, (4, 4), noise_scale=2.0)
        assert made.counts.sum() == 32
        z = torch.eye(32, dtype=torch.float64).reshape(32, 2, 4, 4)
        mean = found.draw(torch.zeros(1, 2, 4, 4, dtype=torch.float64)).flatten()
        root = found.draw(z).reshape(32, 32) - mean
        for k in (0.5, 3.0):
            share = root.T @ root / (2.0 * k) ** 2
            wanted = 0.5 * (mean @ mean / (2.0 * k) ** 2 + share.trace() - torch.logdet(torch.eye(32).double() + share))
            assert mismatch(made, k) == pytest.approx(float(wanted), rel=1e-6)
        grown = spectrum(found, (8, 8))
        assert grown.counts.sum() == 128 and grown.mean == pytest.approx(4 * 4.0 * made.mean)


@pytest.mark.parametrize(
    "process", [pytest.param(VE, id="ve"), pytest.param(FLOW, id="flow"), pytest.param(NOISE, id="noise")]
)
def test_a_run_begins_at_the_lowest_sigma_within(process):
    pictures = Spectrum(0.0, np.array([1.0]), np.array([16.0]))
    t = lowest(process, pictures, 0.1)
    assert mismatch(pictures, float(process.rho(t)[0])) == pytest.approx(0.1, rel=1e-6)
    assert process.rho(t)[0] == pytest.approx(40**0.25, rel=0.05)  # 16 v^2 / (4 k^4)
    assert lowest(process, Spectrum(1e12, np.array([1.0]), np.array([1.0])), 0.1) == process.t_max
    assert lowest(process, Spectrum(0.0, np.array([0.0]), np.array([16.0])), 0.1) == pytest.approx(
        process.t_min, rel=1e-6
    )


def test_the_share_of_pictures_that_a_start_changes_is_bounded():
    """Two Gaussians in one dimension: total variation below sqrt(nats / 2), and of its size."""
    x = np.linspace(-200.0, 200.0, 400_001)
    k, v = 2.0, 4.0

    def density(s2: float) -> np.ndarray:
        return np.exp(-0.5 * x**2 / s2) / math.sqrt(2.0 * math.pi * s2)

    apart = 0.5 * float(np.abs(density(k * k) - density(k * k + v)).sum()) * (x[1] - x[0])
    nats = mismatch(Spectrum(0.0, np.array([v]), np.array([1.0])), k)
    assert 0.5 * math.sqrt(nats / 2.0) < apart < math.sqrt(nats / 2.0)


def test_a_lower_start_helps_few_steps_and_harms_many():
    """Euler from the same noise, Karras from 14.6, 6 and 2.5: mean distance to the solution from 14.6."""
    made = {}
    for n in (5, 10):
        for k in (14.6, 6.0, 2.5):
            times = KarrasSchedule()(VE, k, K_MIN, n).tolist()
            ends = batch(VE, 200, 3)(
                lambda problem, x, k=k, times=times: sample(problem, DDIM(), x * (k / K_MAX), times)
            )
            apart = ends - taught(VE, 200, 3, 160).targets[0]
            made[n, k] = float(apart.flatten(1).square().mean(1).sqrt().mean())
    assert made[5, 6.0] < 0.9 * made[5, 14.6] and made[10, 2.5] > 1.3 * made[10, 14.6]
