"""Restarts: the algorithm written out, the marginal they keep, their calls, which segments are run."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP, SDEDPMSolverPP
from quickstep_under_test.solvers.noise import gaussian
from quickstep_under_test.solvers.restart import PRESETS, Restart, Segment, segments_of
from quickstep_under_test.solvers.rho_rk import RhoRK
from quickstep_under_test.solvers.solver import Problem, sample, solve
from quickstep_under_test.solvers.unipc import UniPC
from quickstep_under_test.solvers.verify import FLOW, VE, measuring_range, moments_of_run, start, uniform_lambda

DATA = GaussianMixture.random()
PROCESSES = pytest.mark.parametrize("process", [VE, FLOW], ids=["ve", "flow"])


def grid(process, n=6):
    return uniform_lambda(process, *measuring_range(process), n)


def custom(solver, *segments, **options):
    return Restart(solver, "custom", "\n".join(", ".join(map(str, s)) for s in segments), **options)


@PROCESSES
def test_restart_is_xu_algorithm(process):
    """Written out in y = x / alpha and rho, for Heun and two segments at two sigmas."""
    times = grid(process)
    rho = [math.exp(-process.lam(t)) for t in times]
    segments = {3: (rho[3], 1.7 * rho[3], 3, 2), 5: (0.9 * rho[5], 4.0 * rho[5], 4, 1)}
    x = start(process, times[0])
    noise = gaussian(x, 3)
    y = x / process.alpha(times[0])

    def slope(y, rho):
        t = float(process.t_of_rho(rho))
        return (y - DATA.denoiser(process)(y * process.alpha(t), t)) / rho

    def heun(y, a, b):
        d = slope(y, a)
        return y + (b - a) * (d + slope(y + (b - a) * d, b)) / 2

    for i, (a, b) in enumerate(pairwise(rho), 1):
        y = heun(y, a, b)
        if i in segments:
            _, top, n, K = segments[i]
            way = [(top ** (1 / 7) + j / (n - 1) * (b ** (1 / 7) - top ** (1 / 7))) ** 7 for j in range(n)]
            for _ in range(K):
                y = y + 1.003 * math.sqrt(top**2 - b**2) * noise(0.0, 0.0)
                for c, d in pairwise(way):
                    y = heun(y, c, d)
    solver = custom(RhoRK(frame="snr"), *segments.values(), S_noise=1.003)
    got = sample(Problem(DATA.denoiser(process), process, gaussian(x, 3)), solver, x, times)
    assert (got - y * process.alpha(times[-1])).abs().max() < 1e-11


@PROCESSES
@pytest.mark.parametrize(("solver", "order"), [(RhoRK(), 2), (RhoRK("3kutta"), 3), (DDIM(), 1)])
def test_with_steps_and_segments_refined_the_marginal_is_reached(process, solver, order):
    """On Gaussian data, exactly; the error is that of the sampler alone, and of its order."""
    t_max, t_min = measuring_range(process)
    exact = process.alpha(t_min) ** 2 * 0.4 + t_min**2

    def error(n):
        refined = custom(solver, (1.0, 2.0, n + 1, 3))  # rho = 1 is the middle of the range
        return abs(moments_of_run(refined, process, uniform_lambda(process, t_max, t_min, n), 0.4)[1] - exact)

    coarse, fine = error(40), error(80)
    assert fine < 0.05 and abs(math.log2(coarse / fine) - order) < 0.3


@PROCESSES
def test_restarts_contract_the_error_made_before(process):
    """An offset at the start shrinks by the same factor at every restart."""
    t_max, t_min = measuring_range(process)
    times = uniform_lambda(process, t_max, t_min, 40)

    def left(solver):
        """Of an offset at the start, what is left in the end: the same noise, x_T shifted by 1."""
        x = torch.zeros(1, 1, dtype=torch.float64)
        denoise = GaussianMixture.gaussian(0.0, 0.4, d=1).denoiser(process)
        problem = Problem(denoise, process, lambda s, t: torch.zeros(1, 1, dtype=torch.float64))
        return (sample(problem, solver, x + 1.0, times) - sample(problem, solver, x, times)).abs().item()

    plain, once, thrice = left(RhoRK()), *(left(custom(RhoRK(), (0.5, 3.0, 12, K))) for K in (1, 3))
    assert once < 0.5 * plain and abs(thrice / plain - (once / plain) ** 3) < 1e-9


@PROCESSES
@pytest.mark.parametrize(("solver", "per_step"), [(RhoRK(), 2), (DPMSolverPP(), 1), (DDIM(), 1)])
def test_a_segment_adds_k_times_n_minus_1_steps(process, solver, per_step):
    calls = []

    def denoise(x, t):
        calls.append(t)
        return DATA.denoiser(process)(x, t)

    x, times = start(process, grid(process)[0]), [*grid(process), 0.0]
    made = list(solve(Problem(denoise, process, gaussian(x, 3)), custom(solver, (1.0, 2.0, 5, 3)), x, times))
    assert len(made) == 7 and len(calls) == solver.nfe(7) + 3 * 4 * per_step
    assert Restart(solver).nfe(7) is None and custom(solver).nfe(7) == solver.nfe(7)


@PROCESSES
def test_predictor_correctors_start_anew_after_a_restart(process):
    """What is corrected afterwards must not undo the restart: two runs in one, whatever the sampler."""
    times = grid(process)
    x = start(process, times[0])
    solver = UniPC(lower_order_final="never")
    noise = gaussian(x, 3)
    problem = Problem(DATA.denoiser(process), process, noise)
    middle = times[3]
    rho = math.exp(-process.lam(middle))
    restart = custom(solver, (rho, 2.0 * rho, 4, 1))
    got = sample(Problem(problem.denoise, process, gaussian(x, 3)), restart, x, times)

    half = sample(problem, solver, x, times[:4])
    down = restart.way_down(process, Segment(rho, 2.0 * rho, 4, 1), middle)
    a = process.alpha(down[0]) / process.alpha(middle)
    half = a * half + math.sqrt(down[0] ** 2 - (a * middle) ** 2) * noise(0.0, 0.0)
    half = sample(problem, solver, half, down)
    assert (got - sample(problem, solver, half, times[3:])).abs().max() < 1e-12


def test_which_segments_are_run():
    times = [10.0, 5.0, 2.0, 1.0, 0.5, 0.1, 0.0]
    plan = lambda *s: {i: len(found) for i, found in custom(DDIM(), *s).plan(VE, times).items()}  # noqa: E731
    assert plan((1.2, 3.0, 4, 1)) == {3: 1}
    assert plan((1.2, 3.0, 4, 1), (0.9, 2.0, 4, 1), (0.4, 9.0, 3, 1)) == {3: 2, 4: 1}
    assert plan((1.2, 11.0, 4, 1)) == {}  # above the start of the run
    assert plan((9.0, 10.0, 4, 1)) == {}  # at the start of the run
    assert plan((0.01, 0.04, 4, 1)) == {}  # nearest to 0
    assert plan((0.55, 0.56, 4, 1), (3.0, 4.5, 2, 1)) == {4: 1, 2: 1}
    assert plan((3.6, 4.5, 2, 1)) == {}  # the nearest sigma is above it
    full = Restart(DDIM(), "EDM ImageNet-64").plan(VE, [80.0, 40.0, 20.0, 10.0, 1.0, 0.6, 0.3, 0.06, 0.0])
    assert {i: [s.K for s in found] for i, found in full.items()} == {2: [1], 4: [1], 5: [5], 6: [5], 7: [6]}


def test_on_flow_models_pure_noise_is_above_every_segment():
    times = [1.0, 0.9, 0.7, 0.5, 0.2, 0.0]
    assert list(custom(DDIM(), (1.0, 1e6, 4, 1)).plan(FLOW, times)) == [3]


def test_presets_are_segments():
    assert segments_of(PRESETS["SD, CFG 2"], "") == [Segment(1.0, 9.0, 5, 2), Segment(5.0, 10.0, 5, 2)]
    extra = {name: sum(s.K * (s.n - 1) for s in segments_of(text, "")) for name, text in PRESETS.items()}
    assert extra == {"SD, CFG 2": 16, "SD, CFG 3": 18, "SD, CFG 5 to 8": 18, "EDM CIFAR-10": 4, "EDM ImageNet-64": 66}
    # with Heun and 36 steps, the published number of calls
    assert RhoRK().nfe(36) + 2 * extra["EDM ImageNet-64"] == 203


@pytest.mark.parametrize(
    "text",
    ["1, 2, 3", "1, 2, 3, x", "1, 2, 3.5, 1", "2, 1, 3, 1", "0, 1, 3, 1", "1, 2, 1, 1", "1, inf, 3, 1", "nan, 2, 3, 1"],
)
def test_lines_that_are_no_segments_are_refused(text):
    with pytest.raises(ValueError, match="line 2 of segments"):
        Restart(DDIM(), "custom", f"0.1, 2, 10, 2\n{text}")


def test_noise_is_independent_where_a_path_would_repeat_itself():
    assert Restart(SDEDPMSolverPP()).draws == "gaussian" and custom(SDEDPMSolverPP()).draws == "brownian"
