"""Multistep methods in noise prediction: coefficients, identities, orders on equal steps, parity, momentum, LML."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from quickstep_under_test.solvers import region
from quickstep_under_test.solvers.deis import DEIS
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP
from quickstep_under_test.solvers.gradient_estimation import GradientEstimation
from quickstep_under_test.solvers.kernel import Noise
from quickstep_under_test.solvers.lml import LML
from quickstep_under_test.solvers.momentum import GHVB, HB
from quickstep_under_test.solvers.multistep import History, Hooks, Node
from quickstep_under_test.solvers.pndm import IPNDM, PNDM, adams_bashforth
from quickstep_under_test.solvers.process import VarianceExploding
from quickstep_under_test.solvers.solver import Problem, sample, solve
from quickstep_under_test.solvers.verify import (
    FLOW,
    VE,
    graded,
    measured_order,
    measuring_range,
    start,
    uniform_lambda,
)

PROCESSES = [pytest.param(VE, id="ve"), pytest.param(FLOW, id="flow")]
DATA = GaussianMixture.random()
MIDPOINT = DPMSolverPP(lower_order_final="never")


def run(solver, process, times=None, n=4, mask=None):
    times = times or [*uniform_lambda(process, *measuring_range(process), 9), 0.0]
    return sample(Problem(DATA.denoiser(process), process, mask=mask), solver, start(process, times[0], n), times)


# --- coefficients


def test_coefficients_are_the_published_ones():
    assert np.allclose(adams_bashforth(4), np.array([-9, 37, -59, 55]) / 24, atol=1e-15)
    assert np.allclose(adams_bashforth(5), np.array([251, -1274, 2616, -2774, 1901]) / 720, atol=1e-15)
    for b in (0.1, 0.5, 0.8):  # GHVB, newest first, times b
        table = {
            1: [b],
            2: [(2 + b) / 2, -(2 - b) / 2],
            3: [(18 + 5 * b) / 12, -(24 - 8 * b) / 12, (6 - b) / 12],
            4: [(46 + 9 * b) / 24, -(78 - 19 * b) / 24, (42 - 5 * b) / 24, -(10 - b) / 24],
            5: [c / 720 for c in (1650 + 251 * b, -3420 + 646 * b, 2880 - 264 * b, -1380 + 106 * b, 270 - 19 * b)],
        }
        for k in (2, 3, 4, 5):
            assert np.allclose(b * np.array(adams_bashforth(k, b)[::-1]), table[k], atol=1e-12)
            assert sum(adams_bashforth(k, b)) == pytest.approx(1.0, abs=1e-12)


# --- identities


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (DEIS(points=1), DDIM()),
        (DEIS(points=1, variable="lambda", frame="snr"), DDIM()),
        (IPNDM(points=1), DDIM()),
        (GHVB(order=1.0), DDIM()),
        (GradientEstimation(gamma=1.0), DDIM()),
        (DEIS(points=2, variable="rho"), IPNDM(points=2, coefficients="exact")),
        (DEIS(points=4, variable="rho"), IPNDM(points=4, coefficients="exact")),
        (GHVB(order=2.0), IPNDM(points=2)),
        (GHVB(order=3.0), IPNDM(points=3)),
        (GHVB(order=4.0), IPNDM(points=4)),
        (GradientEstimation(gamma=1.5), IPNDM(points=2)),
        (GradientEstimation(second_order=True), IPNDM(points=2, coefficients="exact")),
        (HB(IPNDM(points=3), beta=1.0), IPNDM(points=3)),
        (HB(MIDPOINT, beta=1.0), MIDPOINT),
        (HB(GHVB(order=2.5), beta=1.0), GHVB(order=2.5)),
        (LML(MIDPOINT, kappa=0.0), MIDPOINT),
        (LML(DEIS(), freeze=1.0), DEIS()),
    ],
    ids=str,
)
def test_members_that_coincide(one, other, process):
    assert (run(one, process) - run(other, process)).abs().max() < 1e-12


def test_the_identities_can_fail():
    for one, other in (
        (DEIS(points=3), DEIS(points=3, variable="vp")),
        (IPNDM(points=3), IPNDM(points=3, coefficients="exact")),
        (GHVB(order=2.9), IPNDM(points=3)),
        (HB(MIDPOINT, beta=0.95), MIDPOINT),
        (LML(MIDPOINT), MIDPOINT),
    ):
        assert (run(one, VE) - run(other, VE)).abs().max() > 1e-4


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("solver", [MIDPOINT, DEIS(), IPNDM(), GHVB(order=2.3)], ids=lambda s: s.id)
def test_momentum_of_one_is_bitwise_the_wrapped_solver(solver, process):
    assert torch.equal(run(HB(solver, beta=1.0), process), run(solver, process))


# --- order


KEPT = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
TABLE = ((1 - KEPT) / KEPT) ** 0.5  # SD's training sigmas
SD = VarianceExploding(TABLE[0], TABLE[-1], training_sigmas=TABLE)


def equal_steps(process, t_max, t_min, n):
    return np.linspace(t_max, t_min, n + 1).tolist()


@pytest.mark.parametrize(
    ("solver", "order"),
    [(PNDM("f-pndm"), 4), (PNDM("plms"), 3), (PNDM("s-pndm"), 2), (IPNDM(points=4), 2), (GHVB(order=2.0), 2)],
    ids=str,
)
def test_order_on_steps_equal_in_sigma(solver, order):
    """The starters pay there: Runge-Kutta keeps order four, the improved Euler method three; without, a cold start has two.

    On a flow model; on the other the first steps are at so much noise that a bad start does not show.
    """
    got = measured_order(solver, FLOW, equal_steps, steps=(40, 80, 160))
    assert abs(got - order) <= 0.25, got


@pytest.mark.parametrize(
    "solver",
    [IPNDM(points=3), IPNDM(points=4), IPNDM(points=4, coefficients="exact"), GHVB(order=3.0)],
    ids=str,
)
def test_order_from_exact_history(solver):
    """On equal steps uniform coefficients have the order of their points, if the first values are exact."""
    t_max, t_min = measuring_range(FLOW)
    denoise, rho = DATA.denoiser(FLOW), Noise("rho")
    errors = []
    for n in (80, 160):
        times = equal_steps(FLOW, t_max, t_min, n)
        x, nodes = start(FLOW, t_max), ()
        for s, t in list(pairwise(times))[: solver.points - 1]:
            nodes += (Node(s, {"eps": rho.read(VE, x, denoise(x, s), s)}, x),)  # dx/dsigma
            x = DATA.solve_ode(FLOW, x, s, t)
        exact = DATA.solve_ode(FLOW, x, times[len(nodes)], t_min)
        state = History(n, len(nodes), nodes)
        for s, t in list(pairwise(times))[len(nodes) :]:
            step = solver.step(Problem(denoise, FLOW), x, s, t, state)
            x, state = step.x, step.state
        errors.append((x - exact).abs().max().item())
    assert abs(math.log2(errors[0] / errors[1]) - solver.points) <= 0.25, errors


@pytest.mark.parametrize("points", [2, 3])
def test_order_with_the_training_time_of_a_discrete_model(points):
    assert abs(measured_order(DEIS(points), SD, graded, steps=(20, 40, 80)) - points) <= 0.25


def test_the_training_time_beyond_the_trained_range():
    """Sigmas outside the table are distinct nodes still."""
    times = [30.0, 25.0, 20.0, 10.0, 3.0, 0.5, 0.02, 0.01, 0.005, 0.0]
    assert run(DEIS(points=4), SD, times).isfinite().all()
    assert (run(DEIS(points=3), SD, times) - run(DEIS(points=3, variable="vp"), SD, times)).abs().max() < 0.5


def test_network_calls():
    assert [PNDM("plms").nfe(n) for n in (0, 1, 2, 10)] == [0, 1, 3, 11]
    assert [PNDM("f-pndm").nfe(n) for n in (0, 1, 2, 3, 4, 10)] == [0, 1, 5, 9, 13, 19]


# --- momentum, against the recursions written out


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("order", "k", "beta"), [(1.6, 2, 0.6), (2.3, 3, 0.3)])
def test_ghvb_is_the_papers_recursion(order, k, beta, process):
    times = [*uniform_lambda(process, *measuring_range(process), 8)]
    denoise = DATA.denoiser(process)
    x = start(process, times[0])
    vs = []
    for s, t in pairwise(times):
        d = (x - denoise(x, s)) / s
        vs.append(d if not vs else (1 - beta) * vs[-1] + beta * d)
        c = adams_bashforth(min(k, len(vs)), beta)
        x = x + (t - s) * sum(a * v for a, v in zip(c, vs[-len(c) :], strict=True))
    assert (run(GHVB(order=order), process, times) - x).abs().max() < 1e-12


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("process", PROCESSES)
def test_heavy_ball_on_a_solver_with_hooks_of_its_own(nesterov, process):
    """Momentum averages what GHVB makes of its own averages: two memories side by side."""
    k, b, beta = 2, 0.5, 0.7
    times = [*uniform_lambda(process, *measuring_range(process), 8)]
    denoise = DATA.denoiser(process)
    x = start(process, times[0])
    vs, m = [], None
    for s, t in pairwise(times):
        d = (x - denoise(x, s)) / s
        vs.append(d if not vs else (1 - b) * vs[-1] + b * d)
        c = adams_bashforth(min(k, len(vs)), b)
        p = sum(a * v for a, v in zip(c, vs[-len(c) :], strict=True))
        m = p if m is None else (1 - beta) * m + beta * p
        x = x + (t - s) * ((1 - beta) * m + beta * p if nesterov else m)
    got = run(HB(GHVB(order=1.5), beta, nesterov), process, times)
    assert (got - x).abs().max() < 1e-12


class Doubling(IPNDM):
    """Doubles its slope every second step, by hooks that count: twice in revise, once in turn."""

    @property
    def hooks(self):
        return Hooks(
            revise=lambda place, nodes, count: (nodes, (count or 0) + 2),
            turn=lambda place, p, nodes, count: (p * (2.0 if count % 2 else 1.0), count + 1),
        )


def test_hooks_of_the_wrapped_solver_keep_their_memory():
    times = [0.9, 0.7, 0.5, 0.35, 0.2]
    denoise = DATA.denoiser(FLOW)
    x, m = start(FLOW, times[0]), None
    for i, (s, t) in enumerate(pairwise(times)):
        p = (x - denoise(x, s)) / s * (2.0 if i % 2 else 1.0)
        m = p if m is None else 0.3 * m + 0.7 * p
        x = x + (t - s) * m
    assert (run(HB(Doubling(points=1), 0.7), FLOW, times) - x).abs().max() < 1e-12


def test_heavy_ball_on_dpm_solver_pp_averages_the_clean_samples():
    times = [*uniform_lambda(FLOW, *measuring_range(FLOW), 6)]
    denoise = DATA.denoiser(FLOW)
    x = start(FLOW, times[0])
    v = old = None
    for s, t in pairwise(times):
        h, D = FLOW.lam(t) - FLOW.lam(s), denoise(x, s)
        p = D if old is None else D + (D - old[1]) * h / (2 * (FLOW.lam(s) - FLOW.lam(old[0])))
        v = p if v is None else 0.4 * v + 0.6 * p
        x = t / s * x - (1 - t) * math.expm1(-h) * v
        old = (s, D)
    assert (run(HB(MIDPOINT, 0.6), FLOW, times) - x).abs().max() < 1e-12


def test_wrappers_refuse_what_is_no_multistep_solver():
    for wrapper in (HB, LML):
        with pytest.raises(ValueError, match="works on multistep samplers"):
            wrapper(PNDM())


def test_wrappers_pass_on_what_the_solver_declares():
    for wrapper in (HB(DDIM(eta=1.0)), LML(DDIM(eta=1.0))):
        assert wrapper.draws == "brownian" and wrapper.nfe(7) == 7 and wrapper.convergence_order == 1
    assert HB(DEIS(points=3), beta=1.0).convergence_order == 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DEIS(points=5), "points = 5"),
        (lambda: DEIS(variable="sigma"), "variable"),
        (lambda: PNDM(method="pndm"), "method"),
        (lambda: GHVB(order=5.5), "order = 5.5"),
        (lambda: HB(DDIM(), beta=0.0), "beta = 0.0"),
        (lambda: LML(DDIM(), lam_rel=0.0), "lam_rel = 0.0"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# --- LML


def pair(scale=1.0, shape=(3, 4, 8, 8)):
    g = torch.Generator().manual_seed(1)
    n = torch.randn(shape, generator=g, dtype=torch.float64)
    return n, n + scale * torch.randn(shape, generator=g, dtype=torch.float64)


def test_lml_without_kappa_is_the_identity():
    n, past = pair()
    for lam_rel in (0.05, 1.0, 100.0):
        assert (LML(DDIM(), kappa=0.0, lam_rel=lam_rel).direction(n, past) - n).abs().max() < 1e-12


def test_lml_is_the_published_direction():
    """With sums over the sample and lambda = lam_rel |n|^2."""
    n, past = pair()
    kappa, lam_rel = 0.3, 0.5
    for got, a, b in zip(LML(DDIM(), kappa, lam_rel).direction(n, past), n, past, strict=True):
        nbar = (1 - kappa) * a + kappa * b
        o = a - nbar * (a * nbar).sum() / (lam_rel * (a * a).sum() + (nbar * nbar).sum())
        assert (got - o * a.norm() / o.norm()).abs().max() < 1e-12


@pytest.mark.parametrize("process", PROCESSES)
def test_lml_remembers_the_slope_before_it_was_turned(process):
    """On Euler steps, as the authors' flow sampler."""
    lml = LML(DEIS(points=1), kappa=0.4, lam_rel=0.7)
    times = [*uniform_lambda(process, *measuring_range(process), 7)]
    denoise = DATA.denoiser(process)
    x = start(process, times[0])
    past = None
    for s, t in pairwise(times):
        n = (x - denoise(x, s)) / s
        x = x + (t - s) * (n if past is None else lml.direction(n, past))
        past = n
    assert (run(lml, process, times) - x).abs().max() < 1e-12


def test_lml_keeps_the_length_of_each_sample():
    n, past = pair()
    turned = LML(DDIM()).direction(n, past)
    assert (region.rms(turned) / region.rms(n) - 1).abs().max() < 1e-12
    assert (turned - n).abs().max() > 0.1


def test_lml_extrapolates_by_kappa_over_lam_rel():
    n, past = pair(scale=1e-5)
    kappa, lam_rel = 0.3, 1.5
    change = n - past
    change = change - n * region.dot(change, n) / region.dot(n, n)  # the length is kept
    expected = n + kappa / lam_rel * change
    assert (LML(DDIM(), kappa, lam_rel).direction(n, past) - expected).abs().max() < 1e-8


def test_lml_of_nothing_is_nothing():
    zero = torch.zeros(2, 4, 3)
    assert torch.equal(LML(DDIM()).direction(zero, zero), zero)


def test_lml_looks_at_the_edited_part_only():
    """The edited part is turned as if the rest did not exist."""
    n, past = pair()
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :5] = 1.0
    noisy = [torch.where(mask.bool(), v, 100.0 * v) for v in (n, past)]
    lml = LML(DDIM())
    got = lml.direction(*noisy, mask)[..., :5]
    assert (got - lml.direction(n[..., :5], past[..., :5])).abs().max() < 1e-12
    assert (lml.direction(*noisy)[..., :5] - got).abs().max() > 1e-3


def test_lml_gets_the_mask_of_the_problem():
    mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert (run(LML(DEIS(points=1)), VE) - run(LML(DEIS(points=1)), VE, mask=mask)).abs().max() > 1e-4


def test_lml_freezes_the_noisy_part():
    times = [0.9, 0.7, 0.5, 0.3, 0.1]
    problem = Problem(DATA.denoiser(FLOW), FLOW)
    x = start(FLOW, 0.9)
    plain, frozen, turned = (
        [step.x for step in solve(problem, solver, x, times)]
        for solver in (DDIM(), LML(DDIM(), freeze=0.4), LML(DDIM()))
    )
    assert torch.equal(frozen[1], plain[1]) and not torch.equal(frozen[2], plain[2])  # u = 0.7 frozen, 0.5 not
    assert not torch.equal(turned[1], plain[1])


# --- parity with diffusers


def vp(sigma):
    return (1 + sigma**2) ** -0.5


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("method", ["plms", "f-pndm"])
def test_pndm_is_that_of_diffusers(method):
    from diffusers import PNDMScheduler

    theirs = PNDMScheduler(**BETAS, prediction_type="epsilon", skip_prk_steps=method == "plms")
    theirs.set_timesteps(10)
    table = ((1 - theirs.alphas_cumprod.double()) / theirs.alphas_cumprod.double()).sqrt()
    process = VarianceExploding(table[0].item(), table[-1].item(), training_sigmas=table.numpy())
    denoise = DATA.denoiser(process)
    times = [table[i].item() for i in range(900, -1, -100)]
    x = start(process, times[0])

    v, calls = x * vp(times[0]), 0
    for t in theirs.timesteps[:-1]:  # the last one goes to sigma 0 without the last step's rule
        sigma = table[t].item()
        v = theirs.step((v / vp(sigma) - denoise(v / vp(sigma), sigma)) / sigma, int(t), v).prev_sample
        calls += 1
    solver = PNDM(method)
    got = sample(Problem(denoise, process), solver, x, times)
    assert (got - v / vp(times[-1])).abs().max() < 2e-5  # coefficients in float32
    assert calls + 1 == solver.nfe(10)


def test_ipndm_is_that_of_diffusers():
    from diffusers import IPNDMScheduler

    theirs = IPNDMScheduler()
    theirs.set_timesteps(12)
    sigmas = (theirs.betas.double() / theirs.alphas.double()).tolist()[1:-1]  # the first is infinite
    theirs.set_begin_index(1)
    denoise = DATA.denoiser(VE)
    x = start(VE, sigmas[0])
    v = x * vp(sigmas[0])
    for t, sigma in zip(theirs.timesteps[1:], sigmas[:-1], strict=False):
        eps = (v / vp(sigma) - denoise(v / vp(sigma), sigma)) / sigma
        v = theirs.step((eps - v * sigma * vp(sigma)) / vp(sigma), t, v).prev_sample
    assert (sample(Problem(denoise, VE), IPNDM(), x, sigmas) - v / vp(sigmas[-1])).abs().max() < 2e-5


@pytest.mark.parametrize("points", [1, 2, 3])
def test_deis_in_lambda_is_that_of_diffusers(points):
    """diffusers interpolates in log rho and integrates over rho in closed form."""
    from diffusers import DEISMultistepScheduler

    theirs = DEISMultistepScheduler(
        **BETAS, prediction_type="sample", solver_order=points, lower_order_final=False, use_karras_sigmas=True
    )
    theirs.set_timesteps(9)
    sigmas = theirs.sigmas.double().tolist()[:-1]
    denoise = DATA.denoiser(VE)
    x = start(VE, sigmas[0])
    v = x * vp(sigmas[0])
    for t, sigma in zip(theirs.timesteps[:-1], sigmas, strict=False):
        v = theirs.step(denoise(v / vp(sigma), sigma), t, v).prev_sample
    got = sample(Problem(denoise, VE), DEIS(points, "lambda"), x, sigmas)
    assert (got - v / vp(sigmas[-1])).abs().max() < 2e-5


def test_rounding_above_a_whole_order_of_ghvb_is_not_taken_for_momentum():
    made = GHVB(2.0000000000000004)
    assert made.points == 2 and made.beta == pytest.approx(1.0)
