"""MR Sampler: the published formulas written out, the exact solution, and the same model as a variance-exploding one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP, SDEDPMSolverPP
from quickstep_under_test.solvers.mean_reverting import MeanReverting
from quickstep_under_test.solvers.noise import gaussian
from quickstep_under_test.solvers.process import ForwardProcess, VarianceExploding
from quickstep_under_test.solvers.solver import Problem, sample
from quickstep_under_test.solvers.unipc import UniPC
from quickstep_under_test.solvers.verify import FLOW, VE, start, uniform_lambda

SIGMA_INF = 50 / 255


@dataclass(frozen=True, eq=False)
class MeanRevertingVP(ForwardProcess):
    """alpha^2 = 1 - (sigma / sigma_inf)^2, time being sigma."""

    t_min: float = 0.01
    t_max: float = 0.195

    def alpha(self, t):
        return math.sqrt(1.0 - (t / SIGMA_INF) ** 2)

    def t_of_rho(self, rho):
        return rho / np.sqrt(1.0 + (rho / SIGMA_INF) ** 2)


VP = MeanRevertingVP()
MU = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
M, V = 0.3, 0.4  # data N(M, V)
TIMES = uniform_lambda(VP, 0.19, 0.01, 12)


def model(process, mu=MU):
    """The exact network of ``x = alpha x0 + (1 - alpha) mu + sigma n`` for Gaussian data."""
    ideal = GaussianMixture.gaussian(M, V).denoiser(process)
    return lambda x, t: ideal(x - (1.0 - process.alpha(t)) * mu, t)


def exact(process, x, s, t):
    """Of the probability-flow ODE: the distance to the mean keeps its place in the marginal."""
    mean = [(1.0 - process.alpha(u)) * MU + process.alpha(u) * M for u in (s, t)]
    spread = [math.sqrt(process.alpha(u) ** 2 * V + u**2) for u in (s, t)]
    return mean[1] + (x - mean[0]) * spread[1] / spread[0]


def begin(process=VP, times=TIMES):
    return (1.0 - process.alpha(times[0])) * MU + start(process, times[0])


def published(x, times, order, kind, noise=None):
    """The paper's multistep solvers on x itself, with their terms in mu.

    kind: "data ODE", "noise ODE" or "data SDE". Second order is by the difference of the last two predictions over
    2 r, r the ratio of the last two steps (midpoint).
    """
    denoise, old, last_h = model(VP), None, None
    for s, t in pairwise(times):
        alpha_s, alpha_t = VP.alpha(s), VP.alpha(t)
        h = math.log(alpha_t / t) - math.log(alpha_s / s)
        D = denoise(x, s)
        new = (x - alpha_s * D - (1.0 - alpha_s) * MU) / s if kind == "noise ODE" else D
        slope = 0.0 if old is None or order == 1 else (new - old) / (2.0 * last_h / h)
        if kind == "data ODE":
            of_mu = 1.0 - t / s + t / s * alpha_s - alpha_t
            x = t / s * x + alpha_t * (1.0 - math.exp(-h)) * (new + slope) + of_mu * MU
        elif kind == "noise ODE":
            x = alpha_t / alpha_s * x - t * math.expm1(h) * (new + slope) + (1.0 - alpha_t / alpha_s) * MU
        else:
            decay, kept = math.exp(-2.0 * h), alpha_t / alpha_s * math.exp(-2.0 * h)
            of_mu = 1.0 - kept - alpha_t * (1.0 - decay)
            x = kept * x + alpha_t * (1.0 - decay) * (new + slope) + of_mu * MU
            x = x + t * math.sqrt(1.0 - decay) * noise(s, t)
        old, last_h = new, h
    return x


@pytest.mark.parametrize(
    ("kind", "order", "solver"),
    [
        ("data ODE", 1, DDIM()),
        ("noise ODE", 1, DDIM()),
        ("data ODE", 2, DPMSolverPP(lower_order_final="never")),
        ("data SDE", 1, SDEDPMSolverPP(order=1, noise="gaussian")),
        ("data SDE", 2, SDEDPMSolverPP(lower_order_final="never", noise="gaussian")),
    ],
)
def test_the_published_formulas(kind, order, solver):
    x = begin()
    expected = published(x, TIMES, order, kind, gaussian(x, 3))
    got = sample(Problem(model(VP), VP, gaussian(x, 3)), MeanReverting(solver, MU), x, TIMES)
    assert (got - expected).abs().max() < 1e-12
    plain = sample(Problem(model(VP), VP, gaussian(x, 3)), solver, x, TIMES)
    assert (plain - expected).abs().max() > 1e-2  # mu matters


@pytest.mark.parametrize("process", [VP, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize(
    ("solver", "order"),
    [(DPMSolverPP(lower_order_final="never"), 2), (UniPC(order=2, lower_order_final="never"), 3)],
)
def test_the_order_of_the_sampler_towards_the_exact_solution(process, solver, order):
    s, t = (0.19, 0.02) if process is VP else (0.95, 0.05)
    x = (1.0 - process.alpha(s)) * MU + start(process, s)
    expected = exact(process, x, s, t)
    problem = Problem(model(process), process)
    errors = [
        (sample(problem, MeanReverting(solver, MU), x, uniform_lambda(process, s, t, n)) - expected).abs().max().item()
        for n in (40, 80)
    ]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.3, errors


def test_a_mean_reverting_flow_starts_at_mu_plus_noise():
    """From t = 1, where all of the data is gone; a point mass is reached in one step."""
    x = MU + start(FLOW, 1.0)
    point = GaussianMixture.gaussian(M, 0.0).denoiser(FLOW)
    problem = Problem(lambda x, t: point(x - t * MU, t), FLOW)
    got = sample(problem, MeanReverting(DDIM(), MU), x, [1.0, 0.25])
    assert (got - (0.75 * M + 0.25 * x)).abs().max() < 1e-12


@pytest.mark.parametrize("solver", [DDIM(), DPMSolverPP(lower_order_final="never"), UniPC()])
def test_the_same_model_as_a_variance_exploding_one(solver):
    """w = (x - mu) / alpha + mu is an ordinary state, with or without the wrapper; the network is asked at x."""
    x, rhos = begin(), VP.rho(TIMES).tolist()
    expected = sample(Problem(model(VP), VP), MeanReverting(solver, MU), x, TIMES)

    def of_w(w, rho):
        t = float(VP.t_of_rho(rho))
        return model(VP)(VP.alpha(t) * (w - MU) + MU, t)

    w = (x - MU) / VP.alpha(TIMES[0]) + MU
    for run in (solver, MeanReverting(solver, MU)):
        got = sample(Problem(of_w, VarianceExploding(0.001, 30.0)), run, w, rhos)
        assert (VP.alpha(TIMES[-1]) * (got - MU) + MU - expected).abs().max() < 1e-10


@pytest.mark.parametrize("process", [VE, FLOW], ids=["ve", "flow"])
@pytest.mark.parametrize("solver", [DPMSolverPP(), SDEDPMSolverPP(noise="gaussian"), UniPC()])
def test_without_a_mean_it_is_the_sampler_itself(process, solver):
    times = [*uniform_lambda(process, 0.9 * process.t_max, 0.05, 5), 0.0]
    x = start(process, times[0])
    problem = Problem(GaussianMixture.random().denoiser(process), process, gaussian(x, 3))
    plain = sample(problem, solver, x, times)
    assert torch.equal(
        sample(replace(problem, noise=gaussian(x, 3)), MeanReverting(solver, torch.zeros(1)), x, times), plain
    )


def test_a_mean_of_its_own_for_every_row():
    mu = torch.cat([MU, -MU, 2 * MU, 0 * MU])
    x = start(VP, TIMES[0])
    ideal = GaussianMixture.gaussian(M, V).denoiser(VP)

    def run(mu, x):
        problem = Problem(lambda x, t: ideal(x - (1.0 - VP.alpha(t)) * mu, t), VP)
        return sample(problem, MeanReverting(DPMSolverPP(), mu), x, TIMES)

    alone = torch.cat([run(mu[i : i + 1], x[i : i + 1]) for i in range(4)])
    assert (run(mu, x) - alone).abs().max() < 1e-12


def test_a_mean_that_does_not_fit_is_refused_before_the_first_call():
    with pytest.raises(ValueError, match=r"mu has shape \(3, 3\), which does not fit samples of shape \(4, 1, 2, 2\)"):
        sample(Problem(None, VP), MeanReverting(DDIM(), torch.zeros(3, 3)), begin(), TIMES)


def test_different_means_are_different_solvers():
    one, other = MeanReverting(DDIM(), MU), MeanReverting(DDIM(), -MU)
    assert one == one and one != other and len({one, other}) == 2


def test_a_plain_start_gets_its_share_of_the_mean():
    """ComfyUI starts a flow model from noise alone; the process starts from the mean and noise."""
    mu = torch.full((1, 2, 2), 0.7, dtype=torch.float64)
    x, times = start(FLOW, 1.0), [1.0, 0.7, 0.4, 0.1, 0.0]
    data = GaussianMixture.random()
    problem = Problem(lambda x, t: data.denoiser(FLOW)(x - mu, t) + mu, FLOW)
    plain = sample(problem, MeanReverting(DPMSolverPP(), mu, plain_start=True), x, times)
    assert torch.equal(plain, sample(problem, MeanReverting(DPMSolverPP(), mu), x + mu, times))
    assert (plain - mu - sample(Problem(data.denoiser(FLOW), FLOW), DPMSolverPP(), x, times)).abs().max() < 1e-12
