"""SA-Solver: identities, the noise window, moments without Monte Carlo, and diffusers' scheduler."""

from __future__ import annotations

import diffusers.schedulers.scheduling_sasolver as theirs_module
import pytest
import torch
from diffusers import SASolverScheduler
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP, SDEDPMSolverPP
from quickstep_under_test.solvers.noise import gaussian
from quickstep_under_test.solvers.process import VarianceExploding
from quickstep_under_test.solvers.sa import SASolver
from quickstep_under_test.solvers.solver import Problem, sample
from quickstep_under_test.solvers.verify import (
    FLOW,
    VE,
    measured_order,
    measured_weak_order,
    measuring_range,
    moments_of_run,
    start,
    uniform_lambda,
)

DATA = GaussianMixture.random()
PROCESSES = [pytest.param(VE, id="ve"), pytest.param(FLOW, id="flow")]
NEVER = {"lower_order_final": "never"}
EVERYWHERE = {"start_percent": 0.0, "end_percent": 1.0}
UNEVEN = (1.0, 0.72, 0.6, 0.41, 0.3, 0.17, 0.11, 0.05)


def times_of(process):
    return [measuring_range(process)[0] * f for f in UNEVEN]


def run(solver, process, times, drawn=None):
    x = start(process, times[0])
    noise = gaussian(x, 3)

    def draw(s, t):
        if drawn is not None:
            drawn.append((s, t))
        return noise(s, t)

    return sample(Problem(DATA.denoiser(process), process, draw), solver, x, times)


@pytest.mark.parametrize("process", PROCESSES)
def test_known_methods_are_special_cases(process):
    times = [*times_of(process), 0.0]

    def same(a, b):
        return (run(a, process, times) - run(b, process, times)).abs().max() < 1e-12

    assert same(SASolver(1, 0, **EVERYWHERE), DDIM(eta=1.0))
    assert same(SASolver(2, 0, **EVERYWHERE, **NEVER), SDEDPMSolverPP(correction="taylor", **NEVER))
    assert same(SASolver(2, 0, eta=0.0, **NEVER), DPMSolverPP(correction="taylor", **NEVER))
    tau = 0.7  # tau^2 is the eta of SDE-DPM-Solver++
    three = SDEDPMSolverPP(3, tau**2, "taylor", **NEVER)
    assert same(SASolver(3, 0, tau, **EVERYWHERE, **NEVER), three)
    assert not same(SASolver(2, 0, **EVERYWHERE, **NEVER), SASolver(2, 0, simple_order_2=True, **EVERYWHERE, **NEVER))


@pytest.mark.parametrize("process", PROCESSES)
def test_noise_is_drawn_once_for_the_steps_that_end_in_the_window(process):
    """Predictor and corrector share the draw; outside the window nothing is drawn."""
    first, last = process.t_of_u(0.8), process.t_of_u(0.2)
    times = [process.t_of_u(u) for u in (0.97, 0.9, 0.8, 0.6, 0.4, 0.2, 0.15, 0.1)] + [0.0]
    drawn = []
    run(SASolver(3, 4, mode="PECE"), process, times, drawn)
    assert [t for _, t in drawn] == [t for t in times[1:] if first >= t >= last] and len(drawn) == 4
    drawn.clear()
    run(SASolver(**EVERYWHERE), process, times, drawn)
    assert len(drawn) == len(times) - 2  # none on the last step to 0
    drawn.clear()
    run(SASolver(start_percent=0.5, end_percent=0.5), process, times, drawn)
    assert not drawn  # no step ends there exactly
    assert torch.equal(
        run(SASolver(start_percent=0.5, end_percent=0.5), process, times), run(SASolver(eta=0.0), process, times)
    )


def test_the_window_reaches_what_the_model_was_not_trained_on():
    """From 0 and to 1 mean the whole run, also beyond the model's own sigmas."""
    assert SASolver(**EVERYWHERE).tau(VE, 100.0) == 1.0 == SASolver(**EVERYWHERE).tau(VE, 1e-4)
    assert SASolver().tau(VE, 100.0) == 0.0 == SASolver().tau(VE, 1e-4)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_corrector_keeps_the_kappa_of_its_predictor(process):
    """Where the window begins and ends, tau of a correction is that of the step it corrects: the marginal stays exact."""
    times = [process.t_of_u(u) for u in (0.97, 0.85, 0.75, 0.5, 0.25, 0.15, 0.1)]
    for solver in (SASolver(**NEVER), SASolver(3, 4, **NEVER), SASolver(3, 4, mode="PECE", **NEVER)):
        mean, variance = moments_of_run(solver, process, times, variance=0.0)
        assert abs(variance - times[-1] ** 2) < 1e-12 and abs(mean - 0.5 * process.alpha(times[-1])) < 1e-12


@pytest.mark.parametrize("process", PROCESSES)
def test_orders(process):
    """tau = 0: min(p + 1, c); noise limits the weak order to 2. What the variants of the laws do not have."""
    for p, c, order in ((1, 2, 2), (2, 0, 2), (2, 3, 3), (3, 0, 3), (3, 2, 2), (3, 4, 4)):
        solver = SASolver(p, c, eta=0.0, **NEVER)
        assert solver.convergence_order == order
        assert abs(measured_order(solver, process) - order) <= 0.25, (p, c)
    for p, c, order in ((1, 0, 1), (1, 2, 2), (2, 0, 2), (3, 0, 2)):
        solver = SASolver(p, c, **EVERYWHERE, **NEVER)
        assert solver.convergence_order == order
        assert abs(measured_weak_order(solver, process) - order) <= 0.25, (p, c)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_exact_integral_is_nearer_at_few_steps(process):
    """Why the published few-steps weights are not the default: variance on Gaussian data after 6 to 12 steps."""
    t_max, t_min = measuring_range(process)
    exact = process.alpha(t_min) ** 2 * 0.4 + t_min**2
    for steps in (6, 8, 12):
        times = uniform_lambda(process, t_max, t_min, steps)
        integral, simple = (
            abs(moments_of_run(SASolver(simple_order_2=simple, **EVERYWHERE), process, times, 0.4)[1] - exact)
            for simple in (False, True)
        )
        assert integral < 0.5 * simple, (steps, integral, simple)


def alpha_vp(sigma):
    return (1 + sigma**2) ** -0.5


@pytest.mark.parametrize("orders", [(1, 1), (1, 2), (2, 2), (2, 3), (3, 4), (4, 4)], ids=str)
@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("final", ["always", "never"])
def test_parity_with_diffusers(orders, tau, final, monkeypatch):
    """Its two-point steps always are the few-steps ones, and it asks tau at the start of a step: a constant here."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    theirs = SASolverScheduler(
        **betas,
        prediction_type="sample",
        predictor_order=orders[0],
        corrector_order=orders[1],
        tau_func=lambda t: torch.tensor(tau),
        lower_order_final=final == "always",
    )
    theirs.set_timesteps(9)
    sigmas = theirs.sigmas.double().tolist()
    process = VarianceExploding()
    denoise = DATA.denoiser(process)
    g = torch.Generator().manual_seed(5)
    x = sigmas[0] * torch.randn(2, 1, 2, 2, generator=g, dtype=torch.float64)
    noises = [torch.randn(x.shape, generator=g, dtype=x.dtype) for _ in sigmas]

    drawn = iter(noises)
    mine = SASolver(*orders, eta=tau, lower_order_final=final, simple_order_2=True, **EVERYWHERE)
    got = sample(Problem(denoise, process, lambda s, t: next(drawn)), mine, x, sigmas)

    again = iter(noises)
    monkeypatch.setattr(theirs_module, "randn_tensor", lambda *unused, **options: next(again))
    v = x * alpha_vp(sigmas[0])
    for t, sigma in zip(theirs.timesteps, sigmas, strict=False):
        v = theirs.step(denoise(v / alpha_vp(sigma), sigma), t, v).prev_sample
    # It computes its coefficients in float32, by differences of exponentials that lose digits with the order.
    assert (got - v / alpha_vp(sigmas[-1])).abs().max() < (1e-4 if orders[0] == 4 else 2e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SASolver(5), "predictor_order = 5 must lie between 1 and 4"),
        (lambda: SASolver(corrector_order=-1), "corrector_order = -1 must lie between 0 and 4"),
        (lambda: SASolver(start_percent=0.9), "start_percent = 0.9 must not lie after end_percent = 0.8"),
        (lambda: SASolver(mode="PC"), "not one of PEC, PECE"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
