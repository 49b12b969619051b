"""Consistency sampling, churn and windows: identities, parity with diffusers, what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, TCDScheduler
from quickstep_under_test.solvers.adaptive import DPMSolverAdaptive
from quickstep_under_test.solvers.churn import Churn
from quickstep_under_test.solvers.consistency import ConsistencySampler
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP, SDEDPMSolverPP
from quickstep_under_test.solvers.noise import gaussian
from quickstep_under_test.solvers.pndm import PNDM
from quickstep_under_test.solvers.process import VarianceExploding
from quickstep_under_test.solvers.rho_rk import RhoRK
from quickstep_under_test.solvers.singlestep import DPMSolverSinglestep
from quickstep_under_test.solvers.solver import Problem, sample
from quickstep_under_test.solvers.switch import Switch
from quickstep_under_test.solvers.unipc import UniPC
from quickstep_under_test.solvers.verify import FLOW, VE, graded, measuring_range, moments_of_run, start, uniform_lambda

DATA = GaussianMixture.random()
PROCESSES = pytest.mark.parametrize("process", [VE, FLOW], ids=["ve", "flow"])
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PLAIN, NOISY = DPMSolverPP(lower_order_final="never"), SDEDPMSolverPP(lower_order_final="never")


def run(solver, process, times, x=None, noise=None):
    x = start(process, times[0]) if x is None else x
    return sample(Problem(DATA.denoiser(process), process, noise or gaussian(x, 3)), solver, x, times)


def grid(process, n=6):
    return uniform_lambda(process, *measuring_range(process), n)


class Diffusers:
    """One of diffusers' few-step schedulers on the mixture, in the variance-preserving frame, with our noise."""

    def __init__(self, kind, timesteps, monkeypatch):
        self.scheduler = kind(**BETAS, prediction_type="sample", clip_sample=False)
        bars = self.scheduler.alphas_cumprod.double().numpy()
        self.sigmas = np.sqrt((1 - bars) / bars)
        self.process = VarianceExploding(self.sigmas[0], self.sigmas[-1], training_sigmas=self.sigmas)
        self.timesteps, self.module, self.monkeypatch = timesteps, kind.__module__, monkeypatch

    def run(self, x, noise, **options):
        self.monkeypatch.setattr(f"{self.module}.randn_tensor", lambda *args, **kw: noise(0.0, 0.0))
        self.scheduler.set_timesteps(timesteps=self.timesteps)
        denoise = DATA.denoiser(self.process)
        v = x * self._alpha(self.timesteps[0])
        for t in self.timesteps:
            x0 = denoise(v / self._alpha(t), self.sigmas[t])
            v = self.scheduler.step(x0, torch.tensor(t), v, return_dict=False, **options)[0]
        return v / self._alpha(0)

    def _alpha(self, t):
        return (1 + self.sigmas[t] ** 2) ** -0.5


@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.6, 1.0])
def test_tcd_is_diffusers(gamma, monkeypatch):
    """Down to training step 0, where diffusers ends and which is a sigma of ours."""
    theirs = Diffusers(TCDScheduler, [999, 750, 500, 250], monkeypatch)
    times = [theirs.sigmas[t] for t in (*theirs.timesteps, 0)]
    x = start(theirs.process, times[0])
    got = run(ConsistencySampler("TCD", gamma), theirs.process, times, x)
    assert (got - theirs.run(x, gaussian(x, 3), eta=gamma)).abs().max() < 1e-4  # float32 coefficients


def test_lcm_is_diffusers(monkeypatch):
    theirs = Diffusers(LCMScheduler, [999, 759, 499, 259], monkeypatch)
    monkeypatch.setattr(theirs.scheduler, "get_scalings_for_boundary_condition_discrete", lambda t: (0.0, 1.0))
    x = start(theirs.process, theirs.sigmas[999])
    got = run(ConsistencySampler(), theirs.process, [*(theirs.sigmas[t] for t in theirs.timesteps), 0.0], x)
    last = theirs.run(x, gaussian(x, 3)) * theirs._alpha(0)  # its last answer is the clean sample itself
    assert (got - last).abs().max() < 1e-4


@PROCESSES
def test_ends_of_gamma(process):
    times = [*grid(process), 0.0]
    ddim, lcm = run(DDIM(), process, times), run(ConsistencySampler(), process, times)
    for preset in ("TCD", "CTM"):
        assert (run(ConsistencySampler(preset, 0.0), process, times) - ddim).abs().max() < 1e-12
    assert (run(ConsistencySampler("Lightning"), process, times) - ddim).abs().max() < 1e-12
    assert torch.equal(run(ConsistencySampler("DMD2", 0.4), process, times), lcm)
    assert (run(ConsistencySampler("CTM", 1.0), process, times) - lcm).abs().max() < 1e-12


@PROCESSES
def test_ctm_renews_the_share_gamma_of_the_noise(process):
    """x_t = alpha_t D + sigma_t (sqrt(1 - gamma^2) eps + gamma z), times the noise scale where z is drawn."""
    process = replace(process, noise_scale=3.0)
    s, t = grid(process, 2)[:2]
    x = start(process, s)
    z = gaussian(x, 3)(s, t)
    D = DATA.denoiser(process)(x, s)
    eps = (x - process.alpha(s) * D) / s
    got = run(ConsistencySampler("CTM", 0.6), process, [s, t], x)
    assert (got - process.alpha(t) * D - t * (0.8 * eps + 0.6 * 3.0 * z)).abs().max() < 1e-12


def test_a_level_below_all_training_times_needs_no_noise():
    process = VarianceExploding(training_sigmas=np.linspace(0.03, 14.6, 50))
    assert ConsistencySampler("TCD").landing(process, 0.01) == 0.01


@PROCESSES
def test_without_churn_it_is_the_sampler_itself(process):
    times = [*grid(process), 0.0]
    for solver in (PLAIN, RhoRK(), UniPC(), NOISY):
        expected = run(solver, process, times)
        assert torch.equal(run(Churn(solver, S_churn=0.0), process, times), expected)
        outside = Churn(solver, 40.0, S_tmin=1e3, S_tmax=1e4)
        assert torch.equal(run(outside, process, times), expected)


@PROCESSES
def test_churn_is_karras_algorithm_2(process):
    """Written out in y = x / alpha and rho."""
    times = grid(process)
    rho = [math.exp(-process.lam(t)) for t in times]
    x = start(process, times[0])
    noise = gaussian(x, 3)
    y = x / process.alpha(times[0])

    def slope(y, rho):
        t = float(process.t_of_rho(rho))
        return (y - DATA.denoiser(process)(y * process.alpha(t), t)) / rho

    for a, b in pairwise(rho):
        gamma = min(1.8 / 6, math.sqrt(2) - 1) if 0.3 <= a <= 8.0 else 0.0
        hat = a * (1 + gamma)
        if gamma:
            y = y + 1.01 * math.sqrt(hat**2 - a**2) * noise(0.0, 0.0)
        d = slope(y, hat)
        y = y + (b - hat) * (d + slope(y + (b - hat) * d, b)) / 2
    got = run(Churn(RhoRK(frame="snr"), 1.8, 0.3, 8.0, 1.01), process, times, x)
    assert (got - y * process.alpha(times[-1])).abs().max() < 1e-11


@PROCESSES
def test_a_churned_step_forgets_the_past(process):
    times = grid(process)
    for solver in (PLAIN, UniPC()):
        everywhere = dict(S_churn=1.0, S_tmin=0.0, S_tmax=1e6)
        got = run(Churn(solver, **everywhere), process, times)
        assert (got - run(Churn(DDIM(), **everywhere), process, times)).abs().max() < 1e-12


def test_churn_starts_below_pure_noise_and_stays_in_the_flow():
    churn = Churn(DDIM(), 1000.0, 0.0, 1e6)
    assert churn.raised(FLOW, 1.0, 10) == 1.0
    assert 0.999 < churn.raised(FLOW, 0.999, 10) < 1.0


@pytest.mark.parametrize("solver", [Churn(NOISY), Switch(PLAIN, DDIM(eta=1.0, noise="gaussian")), ConsistencySampler()])
def test_noise_is_independent_where_a_path_would_repeat_itself(solver):
    assert solver.draws == "gaussian"


def test_a_window_of_two_paths_is_on_one_path():
    assert Switch(PLAIN, NOISY).draws == "brownian"
    assert Switch(PLAIN, DDIM()).draws is None


@PROCESSES
def test_a_window_over_all_or_nothing_is_one_sampler(process):
    times = [process.t_max, *grid(process), 0.0]
    inside, outside = run(NOISY, process, times), run(PLAIN, process, times)
    assert torch.equal(run(Switch(PLAIN, NOISY, 0.0, 1.0), process, times), inside)
    assert torch.equal(run(Switch(PLAIN, NOISY, 0.4, 0.4), process, times), outside)


@PROCESSES
def test_a_window_takes_the_steps_that_start_in_it(process):
    times = [float(process.t_of_u(u)) for u in (0.9, 0.8, 0.6, 0.5, 0.3, 0.1)]
    outside = DPMSolverPP(lower_order_final="always")
    switch = Switch(outside, DDIM(), 0.2, 0.5)
    assert [switch.covers(process, s) for s in times] == [False, True, True, False, False, False]
    x = run(outside, process, times[:2])
    x = run(DDIM(), process, times[1:4], x)
    expected = run(outside, process, times[3:], x)
    assert torch.equal(run(switch, process, times), expected)


@PROCESSES
def test_a_window_that_starts_on_a_sigma_has_the_order_of_both(process):
    """In the middle of the range in lambda, which is a sigma of every grid with an even number of steps."""
    t_max, t_min = measuring_range(process)
    middle = process.t_of_lam((process.lam(t_max) + process.lam(t_min)) / 2)
    switch = Switch(PLAIN, NOISY, 1.0 - float(process.u_of_t(middle)) - 1e-9, 1.0)
    exact = process.alpha(t_min) ** 2 * 0.4 + t_min**2
    coarse, fine = (
        abs(moments_of_run(switch, process, graded(process, t_max, t_min, n), 0.4)[1] - exact) for n in (40, 80)
    )
    assert abs(math.log2(coarse / fine) - switch.convergence_order) < 0.25


def test_samplers_that_do_not_go_by_the_sigmas_are_refused():
    with pytest.raises(ValueError, match="chooses its own steps"):
        Churn(DPMSolverAdaptive())
    with pytest.raises(ValueError, match="chooses its own steps"):
        Switch(PLAIN, DPMSolverAdaptive())
    with pytest.raises(ValueError, match="start_percent"):
        Switch(PLAIN, DDIM(), 0.6, 0.5)


def test_orders_and_calls_of_samplers_that_start_anew():
    budget = DPMSolverSinglestep(plan="budget")
    assert [Churn(s).convergence_order for s in (RhoRK("3kutta"), PLAIN, budget, DDIM())] == [2, 1, 1, 1]
    assert Churn(RhoRK()).nfe(10) == 19 and Churn(PLAIN).nfe(10) == 10
    assert Churn(PNDM()).nfe(10) is None and Switch(PNDM(), PNDM()).nfe(10) is None  # more calls in every first step
    assert Switch(PLAIN, RhoRK()).nfe(10) is None and Switch(PLAIN, NOISY).nfe(10) == 10
