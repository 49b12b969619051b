"""DDIM, DPM-Solver++ and SDE-DPM-Solver++: order, identities, exact moments. Float64, no ComfyUI."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP, SDEDPMSolverPP
from quickstep_under_test.solvers.noise import gaussian
from quickstep_under_test.solvers.solver import Problem, sample
from quickstep_under_test.solvers.verify import (
    FLOW,
    VE,
    measured_order,
    measuring_range,
    start,
    uniform_lambda,
)
from quickstep_under_test.solvers.weights import data_moments, phi, weights

PROCESSES = [pytest.param(VE, id="ve"), pytest.param(FLOW, id="flow")]

ODE = [
    DDIM(),
    DPMSolverPP(order=1),
    DPMSolverPP(order=2, correction="midpoint", lower_order_final="never"),
    DPMSolverPP(order=2, correction="taylor", lower_order_final="never"),
    DPMSolverPP(order=3, third_order="exact", lower_order_final="never"),
    DPMSolverPP(order=3, third_order="reference", lower_order_final="never"),
    SDEDPMSolverPP(order=2, eta=0.0, lower_order_final="never"),
    SDEDPMSolverPP(order=3, eta=0.0, third_order="exact", lower_order_final="never"),
]


def label(solver) -> str:
    settings = "-".join(str(v) for v in vars(solver).values())
    return f"{type(solver).__name__}-{settings}"


@pytest.mark.parametrize("process", PROCESSES)
def test_cold_start_is_second_order(process):
    """A first-order first step limits any multistep method to global order 2; the docs say so."""
    solver = DPMSolverPP(order=3, third_order="exact", lower_order_final="never")
    assert 1.7 <= measured_order(solver, process, uniform_lambda, steps=(640, 1280)) <= 2.3


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("solver", ODE, ids=label)
def test_exact_gaussian_solution(solver, process):
    """The closed form for one Gaussian: x - alpha m shrinks with the square root of the marginal variance."""
    variance, mean = 0.4, 0.5
    data = GaussianMixture.gaussian(mean, variance)
    t_max, t_min = measuring_range(process)
    x = start(process, t_max)
    got = sample(Problem(data.denoiser(process), process), solver, x, uniform_lambda(process, t_max, t_min, 400))
    marginal = [process.alpha(t) ** 2 * variance + t**2 for t in (t_max, t_min)]
    expected = process.alpha(t_min) * mean + (x - process.alpha(t_max) * mean) * math.sqrt(marginal[1] / marginal[0])
    assert (got - expected).abs().max() < (2e-2 if solver.convergence_order == 1 else 1e-3)


def run(solver, process, times, noise=None, seed=0):
    data = GaussianMixture.random()
    x = start(process, times[0], seed=seed)
    problem = Problem(data.denoiser(process), process, noise or gaussian(x, 7))
    return sample(problem, solver, x, times)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (DDIM(), DPMSolverPP(order=1)),
        (DDIM(eta=1.0), SDEDPMSolverPP(order=1, eta=1.0)),
        (DPMSolverPP(order=2), SDEDPMSolverPP(order=2, eta=0.0)),
        (DPMSolverPP(order=3), SDEDPMSolverPP(order=3, eta=0.0)),
        (DPMSolverPP(order=2, correction="taylor"), SDEDPMSolverPP(order=2, eta=0.0, correction="taylor")),
    ],
    ids=lambda s: label(s),
)
def test_members_that_coincide(one, other, process):
    times = [*uniform_lambda(process, *measuring_range(process), 9), 0.0]
    assert (run(one, process, times) - run(other, process, times)).abs().max() < 1e-12


@pytest.mark.parametrize("process", PROCESSES)
def test_ddim_is_euler_in_sigma(process):
    t_max, t_min = measuring_range(process)
    times = uniform_lambda(process, t_max, t_min, 7)
    denoise = GaussianMixture.random().denoiser(process)
    x = start(process, t_max)
    euler = x
    for s, t in pairwise(times):
        euler = euler + (t - s) * (euler - denoise(euler, s)) / s
    assert (sample(Problem(denoise, process), DDIM(), x, times) - euler).abs().max() < 1e-12


@pytest.mark.parametrize("solver", ODE, ids=label)
def test_flow_equals_variance_exploding_in_x_over_alpha(solver):
    """Data-prediction solvers depend on the process only through x / alpha and lambda."""
    data = GaussianMixture.random()
    times = uniform_lambda(FLOW, 0.95, 0.05, 9)
    x = start(FLOW, 0.95)
    flow = sample(Problem(data.denoiser(FLOW), FLOW), solver, x, times)
    rho = [t / (1 - t) for t in times]
    ve = sample(Problem(data.denoiser(VE), VE), solver, x / FLOW.alpha(times[0]), rho)
    assert (flow / FLOW.alpha(times[-1]) - ve).abs().max() < 1e-10


SDE = [
    DDIM(eta=1.0),
    DDIM(eta=0.5),
    SDEDPMSolverPP(order=1, eta=1.0),
    SDEDPMSolverPP(order=2, eta=1.0, lower_order_final="never"),
    SDEDPMSolverPP(order=2, eta=1.0, correction="taylor", lower_order_final="never"),
    SDEDPMSolverPP(order=3, eta=1.0, lower_order_final="never"),
]


def test_s_noise_zero_draws_but_adds_nothing():
    times = uniform_lambda(VE, 10.0, 0.1, 5)
    quiet = SDEDPMSolverPP(eta=1.0, s_noise=0.0)
    assert torch.equal(
        run(quiet, VE, times, gaussian(start(VE, 10.0), 1)), run(quiet, VE, times, gaussian(start(VE, 10.0), 2))
    )


def test_phi_and_weights():
    for z in (-30.0, -3.0, -1.0, -1e-3, 0.0, 1e-6, 0.7, 4.0):
        assert phi(0, z) == pytest.approx(math.exp(z), rel=1e-13)
        for k in (1, 2, 3, 4):
            u, w = np.polynomial.legendre.leggauss(60)
            u, w = (u + 1) / 2, w / 2
            integral = (w * np.exp((1 - u) * z) * u ** (k - 1)).sum() / math.factorial(k - 1)
            assert phi(k, z) == pytest.approx(integral, rel=1e-11)
    M = data_moments(3, 0.8)
    w = weights([0.0, -0.7, -1.9], M)
    assert sum(w) == pytest.approx(-math.expm1(-0.8), rel=1e-12)
    assert sum(a * u**2 for a, u in zip(w, [0.0, -0.7, -1.9], strict=True)) == pytest.approx(M[2], rel=1e-12)


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([1.0, 2.0, 0.0], "must decrease"),
        ([1.0, 1.0, 0.0], "must decrease"),
        ([2.0, float("nan"), 0.0], "finite"),
        ([float("inf"), 1.0], "finite"),
        ([1.0, -0.5], "negative"),
    ],
)
def test_bad_times_are_refused_before_any_call(times, words):
    def never(x, t):
        raise AssertionError("network called")

    with pytest.raises(ValueError, match=words):
        sample(Problem(never, VE), DDIM(), torch.zeros(1, 1), times)


def test_flow_sigma_above_one_is_refused():
    with pytest.raises(ValueError, match="flow model"):
        sample(Problem(lambda x, t: x, FLOW), DDIM(), torch.zeros(1, 1), [1.5, 0.5, 0.0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DDIM(eta=1.5), "eta = 1.5 must lie between 0.0 and 1.0"),
        (lambda: DDIM(eta=float("nan")), "finite number"),
        (lambda: DDIM(eta="a"), "finite number"),
        (lambda: DPMSolverPP(order=4), "order = 4 must lie between 1 and 3"),
        (lambda: DPMSolverPP(order=2.0), "whole number"),
        (lambda: DPMSolverPP(correction="euler"), "not one of midpoint, taylor"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_empty_and_single_time_return_x():
    x = torch.ones(1, 2)
    for times in ([], [3.0]):
        assert torch.equal(sample(Problem(lambda x, t: 1 / 0, VE), DDIM(), x, times), x)
