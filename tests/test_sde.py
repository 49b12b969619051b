"""ER-SDE, SiT, score-SDE predictor-corrector, maximum-likelihood SDE: identities, published formulas, exactness."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from quickstep_under_test.solvers.er_sde import ERSDE, SCALES, NoiseScaled
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, SDEDPMSolverPP
from quickstep_under_test.solvers.ml_sde import MLSDE
from quickstep_under_test.solvers.noise import gaussian
from quickstep_under_test.solvers.process import ForwardProcess, RectifiedFlow, VarianceExploding
from quickstep_under_test.solvers.score_sde import ScoreSDE
from quickstep_under_test.solvers.sit import FORMS, SiTSDE
from quickstep_under_test.solvers.solver import Problem, sample
from quickstep_under_test.solvers.verify import FLOW, VE, measuring_range, moments_of_run, start, uniform_lambda
from scipy.integrate import quad
from scipy.optimize import minimize_scalar

PROCESSES = [pytest.param(VE, id="ve"), pytest.param(FLOW, id="flow")]
DATA = GaussianMixture.random()


def times_of(process, n=7):
    return uniform_lambda(process, *measuring_range(process), n)


def run(solver, process, times, denoise=None, mask=None, seed=7):
    x = start(process, times[0])
    return sample(Problem(denoise or DATA.denoiser(process), process, gaussian(x, seed), mask), solver, x, times)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ERSDE(order=1, phi="ode"), DDIM()),
        (ERSDE(order=1, phi="reverse_sde"), DDIM(eta=1.0)),
        (ERSDE(order=1, phi="reverse_sde"), SDEDPMSolverPP(order=1)),
        (SiTSDE(diffusion_norm=0.0), DDIM()),
        (ScoreSDE("ancestral", n_steps=0), DDIM(eta=1.0)),
        (MLSDE(0.7, data_std=0.0), DDIM(eta=0.7)),
        (MLSDE(0.0, data_std=0.0), DDIM()),
    ],
    ids=lambda solver: solver.id,
)
def test_members_that_coincide(one, other, process):
    times = [*times_of(process), 0.0]
    assert one.stochastic == other.stochastic
    assert (run(one, process, times) - run(other, process, times)).abs().max() < 1e-12


@pytest.mark.parametrize("flow", [False, True], ids=["ve", "flow"])
@pytest.mark.parametrize(
    "solver",
    [
        ERSDE(),
        SiTSDE(),
        SiTSDE("heun", "SBDM"),
        ScoreSDE(),
        ScoreSDE("reverse_diffusion", "ald"),
        MLSDE(data_std=8.0),
        MLSDE(0.3, "gaussian", 4.0),
    ],
    ids=lambda solver: solver.id,
)
def test_noise_of_another_size(solver, flow):
    """Data and noise eight times as large: x is eight times as large."""
    plain = FLOW if flow else VE
    large = (RectifiedFlow if flow else VarianceExploding)(plain.t_min, plain.t_max, noise_scale=8.0)
    times = times_of(plain)
    denoise = DATA.denoiser(plain)
    unit = replace(solver, data_std=solver.data_std / 8.0) if isinstance(solver, MLSDE) else solver
    x = start(plain, times[0])
    small = sample(Problem(denoise, plain, gaussian(x, 1)), unit, x, times)
    big = sample(Problem(lambda x, t: 8.0 * denoise(x / 8.0, t), large, gaussian(x, 1)), solver, 8.0 * x, times)
    assert (big / 8.0 - small).abs().max() < 1e-10


# ER-SDE

PUBLISHED = {
    "ode": lambda x: x,
    "reverse_sde": lambda x: x**2,
    "exp_inverse": lambda x: x * (math.exp(-1 / x) + 10),
    "power_1.5": lambda x: x**1.5,
    "power_2.5": lambda x: x**2.5,
    "log": lambda x: x**0.9 * math.log10(1 + 100 * x**1.5),
    "exp_root": lambda x: x * (math.exp(x**0.3) + 10),
}


@pytest.mark.parametrize("name", SCALES)
def test_er_sde_moments_are_the_integral_of_its_kernel(name):
    """phi(rho_t) int phi' / phi^2 u^k d rho, phi as published and differentiated numerically."""
    phi = PUBLISHED[name]
    rho_s, rho_t = 6.0, 0.7
    kappa = phi(rho_t) / phi(rho_s) * rho_s / rho_t

    def weight(rho):
        step = 1e-4 * rho
        return phi(rho_t) * (phi(rho + step) - phi(rho - step)) / (2 * step) / phi(rho) ** 2

    expected = [
        quad(lambda rho: weight(rho) * ((rho - rho_s) / (rho_t - rho_s)) ** k, rho_t, rho_s)[0]  # noqa: B023
        for k in range(3)
    ]
    got = NoiseScaled(SCALES[name]).moments(VE, rho_s, rho_t, 3, kappa)
    assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", SCALES)
def test_er_sde_marginals_and_ends(name, process):
    """Exact variance on a point mass, from pure noise and from next to it; no overflow there."""
    for top in (1.0, 1.0 - 1e-15) if process is FLOW else (14.6, 4518.0):
        mean, got = moments_of_run(ERSDE(phi=name), process, [top, 0.6 * top, 0.5, 0.4, 0.05], variance=0.0)
        assert abs(got - 0.05**2) < 1e-9
        assert abs(mean - process.alpha(0.05) * 0.5) < 1e-9


@pytest.mark.parametrize("name", SCALES)
def test_er_sde_noise_variance_is_never_negative(name):
    """phi(rho) / rho must not fall. The published log function does from its peak on."""
    scales = [SCALES[name](rho) for rho in np.geomspace(1e-3, 1e6, 2000)]
    assert all(b >= a - 1e-12 for a, b in pairwise(scales))
    assert math.isfinite(scales[-1]) and SCALES[name](math.inf) >= scales[-1]


def test_er_sde_log_is_held_at_its_peak():
    published = PUBLISHED["log"]
    peak = minimize_scalar(lambda x: -published(x) / x, bounds=(500, 2000), method="bounded").x
    assert SCALES["log"](math.inf) == pytest.approx(math.log(published(peak) / peak), rel=1e-9)
    assert published(2e4) / 2e4 < 0.99 * published(peak) / peak


# SiT


def published_sit(denoise, x, times, draw, form, c, heun):
    """SiT's code on the linear path, in its own time tau = 1 - sigma and in its letters."""
    diffusion = {
        "sigma": lambda tau: c * (1 - tau),
        "SBDM": lambda tau: c * ((1 - tau) ** 2 / tau + (1 - tau)),
        "constant": lambda tau: c,
        "decreasing": lambda tau: 0.25 * (c * math.cos(math.pi * tau) + 1) ** 2,
        "increasing-decreasing": lambda tau: c * math.sin(math.pi * tau) ** 2,
    }[form]

    def drift(x, tau):
        velocity = (denoise(x, 1 - tau) - x) / (1 - tau)
        score = (tau * velocity - x) / (1 - tau)  # from velocity, for alpha = tau, sigma = 1 - tau
        return velocity + diffusion(tau) * score

    for s, t in pairwise(times):
        tau, dt = 1 - s, s - t
        dw = draw(s, t) * math.sqrt(dt)
        if heun:
            x_hat = x + math.sqrt(2 * diffusion(tau)) * dw
            K1 = drift(x_hat, tau)
            x = x_hat + 0.5 * dt * (K1 + drift(x_hat + dt * K1, tau + dt))
        else:
            x = x + drift(x, tau) * dt + math.sqrt(2 * diffusion(tau)) * dw
    return x


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("form", FORMS)
def test_sit_is_as_published(form, method):
    times = np.linspace(0.95, 0.35, 9).tolist()  # where the cap is not reached
    x, denoise = start(FLOW, times[0]), DATA.denoiser(FLOW)
    expected = published_sit(denoise, x, times, gaussian(x, 7), form, 0.2, method == "heun")
    assert (run(SiTSDE(method, form, 0.2), FLOW, times) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("solver", [SiTSDE(), SiTSDE("heun", "SBDM"), SiTSDE(last_step="mean")], ids=str)
def test_sit_makes_any_model_a_flow_model(solver):
    times = [0.95, 0.8, 0.5, 0.2, 0.0]
    x = start(FLOW, times[0])
    flow = sample(Problem(DATA.denoiser(FLOW), FLOW, gaussian(x, 3)), solver, x, times)
    rho = [t / (1 - t) for t in times]
    ve = sample(Problem(DATA.denoiser(VE), VE, gaussian(x, 3)), solver, x * (1 + rho[0]), rho)
    assert (flow - ve).abs().max() < 1e-12


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("form", FORMS)
def test_sit_variance_stays_near_for_any_diffusion(form, method, process):
    """From pure noise, in 40 steps; the published SBDM is infinite there, the constant one blows up at the end."""
    top = 1.0 if process is FLOW else 14.6
    times = [top * (1 - i / 40) ** (1 if process is FLOW else 3) for i in range(40)]
    mean, got = moments_of_run(SiTSDE(method, form), process, times, variance=0.4)
    exact = process.alpha(times[-1]) ** 2 * 0.4 + times[-1] ** 2
    assert abs(got / exact - 1) < 0.08
    assert abs(mean - process.alpha(times[-1]) * 0.5) < 1e-12


def test_sit_cap():
    solver = SiTSDE(diffusion_form="constant", diffusion_norm=4.0)
    for u, length in ((1.0, 0.5), (0.3, 0.2), (0.1, 0.05), (0.02, 0.02)):
        assert solver._diffusion(u, length) * length / u**2 == pytest.approx(0.5)
    assert SiTSDE()._diffusion(0.5, 0.01) == 0.5


def test_sit_mean_goes_beyond_the_prediction_but_not_in_the_kept_part():
    x, u = start(FLOW, 0.3), 0.3
    x0 = DATA.denoiser(FLOW)(x, u)
    solver = SiTSDE(diffusion_norm=0.2, last_step="mean")
    whole = sample(Problem(DATA.denoiser(FLOW), FLOW), solver, x, [u, 0.0])
    w, score = 0.2 * u, ((1 - u) * x0 - x) / u**2
    assert (whole - (x + ((x0 - x) / u + w * score) * u)).abs().max() < 1e-12
    mask = torch.tensor([[1.0, 0.0]])
    part = sample(Problem(DATA.denoiser(FLOW), FLOW, mask=mask), solver, x, [u, 0.0])
    assert torch.equal(part[..., 1], x0[..., 1]) and torch.equal(part[..., 0], whole[..., 0])


def test_sit_draws_only_where_there_is_diffusion():
    assert SiTSDE(diffusion_norm=0.0).draws is None
    assert SiTSDE(diffusion_form="decreasing", diffusion_norm=0.0).stochastic  # w = 1 / 4
    assert SiTSDE("heun").nfe(5) == 9


# Variance-preserving models are no process of the pack, but what these two papers are written for.


@dataclass(frozen=True, eq=False)
class VariancePreserving(ForwardProcess):
    t_min: float = 0.01
    t_max: float = 0.99

    def alpha(self, t):
        return math.sqrt(1 - t * t)

    def t_of_rho(self, rho):
        return rho / np.sqrt(1 + np.square(rho))


VP = VariancePreserving()


@pytest.mark.parametrize("corrector", ["langevin", "ald"])
def test_score_sde_is_as_published_on_vp(corrector):
    """Corrector and reverse-diffusion predictor of the authors' code, with 1 - beta = alpha_s^2 / alpha_t^2."""
    s, t = 0.9, 0.8
    denoise = DATA.denoiser(VP)
    x = start(VP, s, n=1)
    beta = 1 - (VP.alpha(s) / VP.alpha(t)) ** 2
    noise = gaussian(x, 7)
    z = noise(s, t)

    def score(x):
        return -(x - VP.alpha(s) * denoise(x, s)) / s**2

    grad = score(x)
    ratio = z.norm() / grad.norm() if corrector == "langevin" else s
    step = (0.16 * ratio) ** 2 * 2 * (1 - beta)
    y = x + step * grad + (2 * step) ** 0.5 * z
    expected = (2 - math.sqrt(1 - beta)) * y + beta * score(y) + math.sqrt(beta) * noise(s, t)
    solver = ScoreSDE("reverse_diffusion", corrector)
    got = sample(Problem(denoise, VP, gaussian(x, 7)), solver, x, [s, t])
    assert (got - expected).abs().max() < 1e-12


def diffvc(x, x0, s, t, z):
    """The step of mode "ml" in DiffVC's code, which writes the step as a change of Euler-Maruyama's; mean = 0."""
    gamma, whole, before = VP.alpha(s) / VP.alpha(t), VP.alpha(s), VP.alpha(t)
    beta_h = -2 * math.log(gamma)  # any value: it cancels
    mu = gamma * (1 - before**2) / (1 - whole**2)
    nu = before * (1 - gamma**2) / (1 - whole**2)
    kappa = before * (1 - gamma**2) / (whole * beta_h) - 1
    omega = nu / whole + mu - (0.5 * beta_h + 1)
    sigma = math.sqrt((1 - before**2) * (1 - gamma**2) / (1 - whole**2))
    score = (VP.alpha(s) * x0 - x) / s**2
    return x - (-x * (0.5 * beta_h + omega) - score * (1 + kappa) * beta_h) + sigma * z, nu, sigma


@pytest.mark.parametrize("std", [0.0, 0.7])
def test_ml_sde_is_the_published_step(std):
    """Its mean, and its variance with what the code leaves out, Var(x_0 | x_s): sigma^2 + nu^2 V."""
    s, t = 0.9, 0.8
    x = start(VP, s)
    x0 = DATA.denoiser(VP)(x, s)
    z = gaussian(x, 7)(s, t)
    mean, nu, sigma = diffvc(x, x0, s, t, torch.zeros_like(z))
    V = std**2 * s**2 / (VP.alpha(s) ** 2 * std**2 + s**2)
    got = run(MLSDE(1.0, "gaussian", std), VP, [s, t])
    assert (got - (mean + math.sqrt(sigma**2 + nu**2 * V) * z)).abs().max() < 1e-12
    if std == 0.0:  # what DiffVC's code does
        assert (run(DDIM(eta=1.0), VP, [s, t]) - diffvc(x, x0, s, t, z)[0]).abs().max() < 1e-12


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("eta", [1.0, 0.4, 0.0])
def test_ml_sde_is_exact_on_gaussian_data_in_any_number_of_steps(eta, process):
    top = 1.0 if process is FLOW else 14.6
    for times in ([top, 0.05], [top, 0.6 * top, 0.5 * top, 0.05]):
        mean, got = moments_of_run(MLSDE(eta, "gaussian", math.sqrt(0.4)), process, times, variance=0.4)
        assert abs(got - (process.alpha(0.05) ** 2 * 0.4 + 0.05**2)) < 1e-12
        assert abs(mean - process.alpha(0.05) * 0.5) < 1e-12


def elementwise(process, mean=0.5, variance=0.4):
    """The ideal denoiser of Gaussian data with independent elements, for samples of any size."""
    one = GaussianMixture.gaussian(mean, variance, d=1).denoiser(process)
    return lambda x, t: one(x.reshape(-1, 1), t).reshape(x.shape)


def large(process, t, variance=0.4, n=4):
    g = torch.Generator().manual_seed(3)
    noise = torch.randn(2, n, 2, 64, 128, generator=g, dtype=torch.float64)
    return process.alpha(t) * (0.5 + math.sqrt(variance) * noise[0]) + t * noise[1]


@pytest.mark.parametrize("process", PROCESSES)
def test_ml_sde_measures_the_variance(process):
    """In few steps, where DDIM misses a good part of the variance; from large samples, whose statistics are sharp."""
    top, end = (0.97, 0.05) if process is FLOW else (10.0, 0.05)
    times = uniform_lambda(process, top, end, 6)
    x, exact = large(process, top), process.alpha(end) ** 2 * 0.4 + end**2
    problem = Problem(elementwise(process), process, gaussian(x, 5))
    assert abs(sample(problem, MLSDE(), x, times).var() / exact - 1) < 0.03
    assert sample(problem, DDIM(eta=1.0), x, times).var() / exact - 1 < -0.3


def test_ml_sde_measures_the_edited_part_only():
    x = large(FLOW, 0.7, n=2)
    spoiled = torch.cat([x, 100.0 * x], -1)
    mask = torch.cat([torch.ones(128), torch.zeros(128)]).expand(1, 1, 64, 256)
    denoise = elementwise(FLOW)
    solver = MLSDE()
    whole = solver._open(Problem(denoise, FLOW), x, denoise(x, 0.7), 0.7)
    masked = solver._open(Problem(denoise, FLOW, mask=mask), spoiled, denoise(spoiled, 0.7), 0.7)
    assert (whole - masked).abs().max() < 1e-12
    assert (whole - 0.4 * 0.49 / (0.09 * 0.4 + 0.49)).abs().max() < 0.03
    assert solver._open(Problem(denoise, FLOW), spoiled, denoise(spoiled, 0.7), 0.7).max() == 0.0


# Langevin


@pytest.mark.parametrize("corrector", ["langevin", "ald"])
def test_langevin_settles_at_the_marginal_but_for_its_bias(corrector):
    """Many steps at one level, from twice the right spread: the variance becomes V / (1 - delta / 2V)."""
    s = 0.5
    V = 0.25 * 0.4 + s**2
    x = 0.25 + 2.0 * (large(FLOW, s, n=2) - 0.25)
    solver = ScoreSDE("none", corrector, n_steps=25, snr=0.3)
    t = s - 1e-9
    got = sample(Problem(elementwise(FLOW), FLOW, gaussian(x, 5)), solver, x, [s, t]).var(dim=(1, 2, 3))
    delta = 2 * (0.3 * s) ** 2
    if corrector == "langevin":  # |S| is sqrt(var x) / V
        ratio = 0.3**2 * 2  # delta / V = ratio V / var x, var x = V / (1 - delta / 2V)
        delta = V * ratio / (1 + ratio / 2)
    assert (got / (V / (1 - delta / (2 * V))) - 1).abs().max() < 0.05
    assert (got / V - 1).min() > 0.02


def test_langevin_step_is_bounded():
    """A score of 0 would make it infinite."""
    x = start(FLOW, 0.5)
    still = sample(Problem(lambda x, t: x / (1 - t), FLOW, gaussian(x, 1)), ScoreSDE("none"), x, [0.5, 0.4])
    assert 0.0 < (still - x).abs().max() < 10.0


def test_langevin_step_is_sized_by_the_edited_part():
    """As if the kept part were not there."""
    x, z = large(FLOW, 0.5, n=2), large(FLOW, 1.0, n=2)
    whole, noise = torch.cat([x, 50.0 * x], -1), torch.cat([z, 3.0 * z], -1)
    mask = torch.cat([torch.ones(128), torch.zeros(128)]).expand(1, 1, 64, 256)
    denoise = elementwise(FLOW)
    alone = sample(Problem(denoise, FLOW, lambda s, t: z), ScoreSDE("none"), x, [0.5, 0.4])
    masked = sample(Problem(denoise, FLOW, lambda s, t: noise, mask), ScoreSDE("none"), whole, [0.5, 0.4])
    assert (masked[..., :128] - alone).abs().max() < 1e-12


def test_score_sde_without_anything_to_do_is_refused():
    with pytest.raises(ValueError, match="n_steps must be at least 1"):
        ScoreSDE("none", n_steps=0)
    assert ScoreSDE("none", n_steps=2).nfe(5) == 11
    assert ScoreSDE(n_steps=2).nfe(5) == 15
