"""UniPC: against its own formulas in the paper's letters, its identities, its order, and diffusers' scheduler."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP
from quickstep_under_test.solvers.process import RectifiedFlow, VarianceExploding
from quickstep_under_test.solvers.sa import SASolver
from quickstep_under_test.solvers.solver import Problem, sample
from quickstep_under_test.solvers.unipc import UniPC
from quickstep_under_test.solvers.verify import FLOW, VE, measured_order, measuring_range, start, uniform_lambda

DATA = GaussianMixture.random()
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NEVER = {"lower_order_final": "never"}
PROCESSES = [pytest.param(VE, id="ve"), pytest.param(FLOW, id="flow")]
UNEVEN = (1.0, 0.72, 0.6, 0.41, 0.3, 0.17, 0.11, 0.05)


def times_of(process):
    return [measuring_range(process)[0] * f for f in UNEVEN]


def run(solver, process, times, denoise=None):
    return sample(Problem(denoise or DATA.denoiser(process), process), solver, start(process, times[0]), times)


def in_the_papers_letters(process, x, times, p_max, variant, data, corrector, from_step, lower_final):
    """UniPC with R, b and B(h) as in the paper, one linear system per step."""
    denoise, N = DATA.denoiser(process), len(times) - 1
    alpha, sigma, lam = process.alpha, process.sigma, process.lam

    def model(x, t):
        x0 = denoise(x, t)
        return x0 if data else (x - alpha(t) * x0) / sigma(t)

    f, at = [model(x, times[0])], [times[0]]
    for i in range(N):
        s, t = times[i], times[i + 1]
        h = lam(t) - lam(s)
        hh = -h if data else h
        p = min(p_max, len(f), N - i) if lower_final else min(p_max, len(f))
        r = [(lam(at[-m - 1]) - lam(s)) / h for m in range(1, p)] + [1.0]
        G = [(f[-m - 1] - f[-1]) / r[m - 1] for m in range(1, p)]
        B = hh if variant == "bh1" else math.expm1(hh)
        b, phi = [], math.expm1(hh) / hh
        for k in range(1, p + 1):
            phi = (phi - 1.0 / math.factorial(k)) / hh  # phi_{k+1}
            b.append(math.factorial(k) * hh * phi / B)
        R = np.array([[r_m ** (k - 1) for r_m in r] for k in range(1, p + 1)])
        half = variant != "exact"
        rho_p = [0.5] if p == 2 and half else np.linalg.solve(R[:-1, :-1], b[:-1]) if p > 1 else []
        rho_c = [0.5] if p == 1 and half else np.linalg.solve(R, b)
        A = alpha(t) if data else sigma(t)
        base = (sigma(t) / sigma(s) if data else alpha(t) / alpha(s)) * x - A * math.expm1(hh) * f[-1]
        x_new = base - A * B * sum(w * g for w, g in zip(rho_p, G, strict=True))
        if i < N - 1:
            new = model(x_new, t)
            if corrector and i >= from_step:
                old = sum(w * g for w, g in zip(rho_c[:-1], G, strict=True))
                x_new = base - A * B * (old + rho_c[-1] * (new - f[-1]))
            f, at = [*f, new], [*at, t]
        x = x_new
    return x


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("algorithm", ["data", "noise"])
@pytest.mark.parametrize("variant", ["bh1", "bh2", "exact"])
@pytest.mark.parametrize(
    ("order", "corrector", "from_step", "final"),
    [(1, True, 0, "never"), (2, True, 0, "always"), (2, True, 2, "never"), (2, False, 0, "never"), (3, True, 0, "always"),
     (5, True, 1, "never")],
)  # fmt: skip
def test_is_the_papers_method(order, corrector, from_step, final, variant, algorithm, process):
    solver = UniPC(order, variant, corrector, from_step, algorithm, final, frame="snr")
    times = times_of(process)
    theirs = in_the_papers_letters(
        process, start(process, times[0]), times, order, variant, algorithm == "data", corrector, from_step,
        final == "always",
    )  # fmt: skip
    assert (run(solver, process, times) - theirs).abs().max() < 1e-11


@pytest.mark.parametrize("process", PROCESSES)
def test_known_methods_are_special_cases(process):
    times = [*times_of(process), 0.0]

    def same(a, b):
        return (run(a, process, times) - run(b, process, times)).abs().max() < 1e-12

    assert same(UniPC(1, corrector=False), DDIM())
    assert same(UniPC(2, "bh2", corrector=False, **NEVER), DPMSolverPP(2, **NEVER))
    assert same(UniPC(2, "exact", corrector=False, **NEVER), DPMSolverPP(2, "taylor", **NEVER))
    assert same(UniPC(3, "exact", corrector=False, **NEVER), DPMSolverPP(3, "taylor", **NEVER))
    assert same(UniPC(2, from_step=1000), UniPC(2, corrector=False))
    for p in (3, 4):  # a corrector has p + 1 points there, a predictor p
        sa = SASolver(p, min(p + 1, 4), eta=0.0, simple_order_2=False, **NEVER)
        assert same(UniPC(p, "exact", **NEVER), sa) == (p == 3)
        sa = SASolver(p, min(p + 1, 4), eta=0.0, simple_order_2=True, **NEVER)
        assert same(UniPC(p, "bh1", **NEVER), sa) == (p == 3)  # M_1 = H / 2 is bh1's half
        assert not same(UniPC(p, "bh2", **NEVER), sa)


@pytest.mark.parametrize("process", PROCESSES)
def test_b_of_h_matters_only_where_two_points_are_used(process):
    """From order 3 on the variants differ in the first two steps alone: with exact history there they are one method."""
    times = times_of(process)
    runs = [run(UniPC(3, variant, **NEVER), process, times) for variant in ("bh1", "bh2", "exact")]
    assert (runs[0] - runs[1]).abs().max() > 1e-5 and (runs[0] - runs[2]).abs().max() > 1e-5
    solver = [UniPC(3, variant, **NEVER) for variant in ("bh1", "bh2", "exact")]
    problem = Problem(DATA.denoiser(process), process)
    x, state = start(process, times[0]), solver[0].start(times)
    for s, t in pairwise(times[:4]):
        made = solver[0].step(problem, x, s, t, state)
        x, state = made.x, made.state
    ends = []
    for one in solver:
        x_one, state_one = x, state
        for s, t in pairwise(times[3:]):
            made = one.step(problem, x_one, s, t, state_one)
            x_one, state_one = made.x, made.state
        ends.append(x_one)
    assert (ends[0] - ends[1]).abs().max() < 1e-12 and (ends[0] - ends[2]).abs().max() < 1e-12


def test_what_cold_starts_and_low_order_ends_cost():
    """Asymptotically 3 from a cold start, as the first step is corrected; 2 with a first-order last step."""
    cold = measured_order(UniPC(4, **NEVER), VE, uniform_lambda, (160, 320))
    assert 2.7 < cold < 3.4
    ends_low = measured_order(UniPC(4, lower_order_final="always"), VE, uniform_lambda, (160, 320))
    assert 1.75 < ends_low < 2.25
    uncorrected = measured_order(UniPC(4, from_step=1, **NEVER), VE, uniform_lambda, (160, 320))
    assert 1.75 < uncorrected < 2.25


def test_the_order_above_the_library_of_variants():
    """Order 4 converges faster than its 5 on this problem, never slower."""
    for process in (VE, FLOW):
        assert 4.75 < measured_order(UniPC(4, **NEVER), process) < 6.0


@pytest.mark.parametrize("process", PROCESSES)
def test_the_advice_on_guidance_is_true_here(process):
    """What the help says: with much guidance order 2, a late corrector, and data prediction."""
    one = GaussianMixture(*(v[:1] for v in (DATA.w, DATA.m, DATA.v, DATA.Q)))
    full, part = DATA.denoiser(process), one.denoiser(process)

    def error(solver, cfg, steps):
        def guided(x, t):
            return full(x, t) + cfg * (part(x, t) - full(x, t))

        grids = (uniform_lambda(process, *measuring_range(process), n) for n in (steps, 200))
        short, long = (run(s, process, times, guided) for s, times in zip((solver, UniPC(2)), grids, strict=True))
        return (short - long).square().mean().sqrt()

    assert error(UniPC(2, from_step=2), 7.5, 8) < 0.7 * error(UniPC(2), 7.5, 8)
    assert error(UniPC(2), 7.5, 8) < 0.7 * error(UniPC(3), 7.5, 8)
    assert error(UniPC(2), 15.0, 6) < 0.9 * error(UniPC(2, algorithm="noise"), 15.0, 6)


def alpha_vp(sigma):
    return (1 + sigma**2) ** -0.5


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("algorithm", ["data", "noise"])
@pytest.mark.parametrize(("final", "from_step"), [("always", 0), ("never", 1)])
def test_parity_with_diffusers(order, variant, algorithm, final, from_step):
    theirs = UniPCMultistepScheduler(
        **BETAS,
        prediction_type="sample",
        solver_order=order,
        solver_type=variant,
        predict_x0=algorithm == "data",
        lower_order_final=final == "always",
        disable_corrector=list(range(from_step)),
        # On the way to 0 its bh1 and its noise prediction divide by zero, and so does every order but the first.
        final_sigmas_type="zero" if (algorithm, variant, final) == ("data", "bh2", "always") else "sigma_min",
    )
    theirs.set_timesteps(9)
    sigmas = theirs.sigmas.double().tolist()
    process = VarianceExploding()
    denoise = DATA.denoiser(process)
    x = sigmas[0] * torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine = UniPC(order, variant, True, from_step, algorithm, final)
    got = sample(Problem(denoise, process), mine, x, sigmas)

    v = x * alpha_vp(sigmas[0])
    for t, sigma in zip(theirs.timesteps, sigmas, strict=False):
        v = theirs.step(denoise(v / alpha_vp(sigma), sigma), t, v).prev_sample
    v = v / alpha_vp(sigmas[-1])
    assert (got - v).abs().max() < 5e-5  # diffusers computes its coefficients in float32


@pytest.mark.parametrize("order", [2, 3])
def test_parity_with_diffusers_on_flow_models(order):
    """As it runs there for Wan: the true signal-to-noise ratio, this method's ``auto`` and ``snr``."""
    theirs = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        solver_order=order,
        lower_order_final=True,
    )
    theirs.set_timesteps(9)
    sigmas = theirs.sigmas.double().tolist()
    process = RectifiedFlow()
    denoise = DATA.denoiser(process)
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = sample(Problem(denoise, process), UniPC(order, lower_order_final="always"), x, sigmas)
    v = x
    for t, sigma in zip(theirs.timesteps, sigmas, strict=False):
        v = theirs.step((v - denoise(v, sigma)) / sigma, t, v).prev_sample
    assert (got - v).abs().max() < 5e-5
    other = sample(Problem(denoise, process), UniPC(order, lower_order_final="always", frame="vef"), x, sigmas)
    assert (got - other).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: UniPC(6), "order = 6 must lie between 1 and 5"),
        (lambda: UniPC(variant="vary"), "not one of bh1, bh2, exact"),
        (lambda: UniPC(corrector=1), "corrector = 1 must be true or false"),
        (lambda: UniPC(from_step=-1), "from_step = -1 must lie between"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
