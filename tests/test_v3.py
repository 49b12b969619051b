"""DPM-Solver-v3: known limits, parity with the published algorithm, statistics measured on exact problems."""

# ruff: noqa: E741 - l and I are the paper's letters

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from quickstep_under_test.solvers.artifact import Artifact, load, save
from quickstep_under_test.solvers.calibration.statistics import Part
from quickstep_under_test.solvers.dpm_solver_v3 import DPMSolverV3
from quickstep_under_test.solvers.ems import KIND, NOISE_PREDICTION, ModelStatistics, integrals
from quickstep_under_test.solvers.ems_estimate import estimate
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DPMSolverPP
from quickstep_under_test.solvers.solver import Problem, sample
from quickstep_under_test.solvers.unipc import UniPC
from quickstep_under_test.solvers.verify import FLOW, VE, measured_order, measuring_range, start, uniform_lambda
from scipy.integrate import solve_ivp

from .library.v3 import SMOOTH

PROCESSES = [pytest.param(VE, id="ve"), pytest.param(FLOW, id="flow")]
NEVER = {"lower_order_final": "never"}
DATA = GaussianMixture.random()


def run(solver, process, times, data=DATA, n=4):
    x = start(process, times[0], n=n)
    return sample(Problem(data.denoiser(process), process), solver, x, times)


def samples(data: GaussianMixture, K: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    k = torch.multinomial(data.w, K, replacement=True, generator=g)
    z = torch.randn(K, 4, generator=g, dtype=torch.float64)
    return (data.m[k] + torch.einsum("bij,bj->bi", data.Q[k], data.v[k].sqrt() * z)).reshape(K, 1, 2, 2)


def measured(process, data=DATA, K=512, nodes=61, reduce="full", **settings) -> ModelStatistics:
    lam = np.linspace(*(process.lam(t) for t in measuring_range(process)), nodes).tolist()
    x0, problem = samples(data, K), Problem(data.denoiser(process), process)
    parts = [Part(lambda visit: visit(problem, x0), x0)]
    *steps, last = estimate(parts, process, lam, reduce, **settings)
    assert [step.done for step in steps] == list(range(1, nodes + 1)) and all(step.total == nodes for step in steps)
    return last.statistics


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_trivial_statistics_are_data_and_noise_prediction(order, process):
    times = [*uniform_lambda(process, *measuring_range(process), 9), 0.0]
    data = DPMSolverV3(order=order, use_corrector="never")
    assert (run(data, process, times) - run(DPMSolverPP(order, "taylor"), process, times)).abs().max() < 1e-12
    noise = DPMSolverV3(order=order, use_corrector="never", statistics=NOISE_PREDICTION)
    unip = UniPC(order, "exact", corrector=False, algorithm="noise", frame="snr")
    assert (run(noise, process, times) - run(unip, process, times)).abs().max() < 1e-12


@pytest.mark.parametrize("process", PROCESSES)
def test_order_one_with_its_corrector_is_unipc(process):
    """With two points there is one difference, pseudo or not."""
    times = uniform_lambda(process, *measuring_range(process), 9)
    unipc = UniPC(order=1, variant="exact", lower_order_final="never")
    assert (run(DPMSolverV3(order=1, **NEVER), process, times) - run(unipc, process, times)).abs().max() < 1e-12


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(
    ("settings", "order"),
    [
        ({"order": 2, "use_corrector": "never"}, 2),
        ({"order": 3, "use_corrector": "never", "p_pseudo": True}, 2),
        ({"order": 3, "c_pseudo": False, "p_pseudo": True}, 3),
        ({"order": 1}, 2),
        ({"order": 3, "use_corrector": "late"}, 2),
    ],
)
def test_orders_of_the_pseudo_derivatives(settings, order, process):
    solver = DPMSolverV3(**settings, **NEVER, statistics=SMOOTH)
    assert solver.convergence_order == order
    assert abs(measured_order(solver, process, steps=(40, 80)) - order) <= 0.25


def published(process, times, lam, l, s, b, order, p_pseudo, corrector, c_pseudo):
    """The algorithm of the paper's code, written from its formulas: trapezoidal cumulative integrals from the first node
    of a fine grid that holds every time, differences from the latest point, a loop over steps. Statistics: scalars."""

    def cumulative(f):
        return np.concatenate([[0.0], np.cumsum(0.5 * np.diff(lam) * (f[1:] + f[:-1]))])

    L, S = cumulative(l), cumulative(s)
    I, B = cumulative(np.exp(L + S)), cumulative(np.exp(-S) * b)
    C = cumulative(np.exp(L + S) * B)
    index = [int(np.abs(lam - process.lam(t)).argmin()) for t in times]
    denoise = DATA.denoiser(process)

    def update(x, i, j, points, pseudo):
        """From node i to node j; points: (node, f), that at i first."""
        g = [math.exp(S[i] - S[k]) * f - math.exp(S[i]) * (B[k] - B[i]) for k, f in points]
        at = [lam[k] for k, _ in points]
        n = len(g) - 1
        if pseudo:
            table, derivatives = [g], []
            for m in range(1, n + 1):
                before = table[-1]
                table.append([(before[a] - before[a + 1]) / (at[a] - at[a + m]) for a in range(n - m + 1)])
                derivatives.append(table[-1][0] * math.factorial(m))
        else:
            R = np.array([[(at[q] - at[0]) ** m / math.factorial(m) for m in range(1, n + 1)] for q in range(1, n + 1)])
            inverse = np.linalg.inv(R) if n else R
            derivatives = [sum(inverse[m, q] * (g[q + 1] - g[0]) for q in range(n)) for m in range(n)]
        alpha_s, alpha_t = process.alpha(process.t_of_lam(lam[i])), process.alpha(process.t_of_lam(lam[j]))
        x = alpha_t / alpha_s * math.exp(L[i] - L[j]) * x
        x = x - alpha_t * math.exp(-L[j] - S[i]) * (I[j] - I[i]) * g[0]
        x = x - alpha_t * math.exp(-L[j]) * (C[j] - C[i] - B[i] * (I[j] - I[i]))
        for m, derivative in enumerate(derivatives, 1):
            u = lam[i : j + 1]
            f = np.exp(L[i : j + 1] + S[i : j + 1] - L[i] - S[i]) * (u - u[0]) ** m / math.factorial(m)
            x = x - alpha_t * math.exp(L[i] - L[j]) * np.trapezoid(f, u) * derivative
        return x

    x, known, before, used = start(process, times[0]), [], None, 0
    for step, (i, j) in enumerate(pairwise(index), 1):
        t = times[step - 1]
        f = ((1.0 - l[i]) * x - process.alpha(t) * denoise(x, t)) / process.alpha(t)
        known.append((i, f))
        if corrector and used + c_pseudo > 1:
            points = [known[-2], known[-1], *known[-3::-1]][: used + c_pseudo]
            x = update(before, points[0][0], i, points, c_pseudo)
        used, before = min(step, order), x
        x = update(x, i, j, known[: -used - 1 : -1], p_pseudo)
    return x


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("c_pseudo", [True, False])
@pytest.mark.parametrize(("order", "p_pseudo", "corrector"), [(1, False, True), (3, True, False), (3, False, True)])
def test_parity_with_the_published_algorithm(order, p_pseudo, corrector, c_pseudo, process):
    ends = [process.lam(t) for t in measuring_range(process)]
    lam = np.linspace(*ends, 2401)
    l, s, b = 0.5 - 0.4 * np.tanh(lam), -0.5 + 0.3 * np.sin(lam), 0.3 * np.cos(lam)
    times = [process.t_of_lam(v) for v in lam[::300]]
    expected = published(process, times, lam, l, s, b, order, p_pseudo, corrector, c_pseudo)
    statistics = ModelStatistics(*(torch.from_numpy(v) for v in (lam, l, s, b)))
    solver = DPMSolverV3(order, "always" if corrector else "never", p_pseudo, c_pseudo, "never", statistics)
    assert (run(solver, process, times) - expected).abs().max() < 1e-5  # the trapezoidal rule's error is 1e-6


@pytest.mark.parametrize("ends", [(-2.2, 3.1), (0.1, 0.3)])
def test_integrals_are_those_of_the_interpolated_statistics(ends):
    g = torch.Generator().manual_seed(1)
    grid = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)
    statistics = ModelStatistics(grid, *torch.randn(3, 9, generator=g, dtype=torch.float64))
    got = integrals(statistics, *ends)

    def slopes(u, y):
        l, s, b = (float(v[0]) for v in statistics.at(np.array([u])))
        L, S, q, *_ = y
        moments = [math.exp(L + S) * ((u - ends[0]) / (ends[1] - ends[0])) ** m for m in range(7)]
        return [l, s, s * q + b, math.exp(L) * q, *moments]

    L, S, q, known, *M = solve_ivp(slopes, ends, [0.0] * 11, rtol=1e-11, atol=1e-12, max_step=0.02).y[:, -1]
    expected = [math.exp(-L), math.exp(-S), q, known, *M]
    assert np.allclose([got.decay, got.shrink, got.q, got.known, *got.M], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 2)])
def test_statistics_per_element_are_those_of_each_element(shape, process):
    """Two sets of numbers, one for each half of the elements, give each half what the numbers alone give."""
    g = torch.Generator().manual_seed(2)
    one, two = (ModelStatistics(torch.linspace(-3.0, 3.0, 5), *torch.rand(3, 5, generator=g)) for _ in range(2))
    mask = torch.arange(math.prod(shape)).reshape(shape) % 2 == 0

    def both(a, b):
        return torch.where(mask, a.reshape(-1, 1, 1, 1), b.reshape(-1, 1, 1, 1))

    mixed = ModelStatistics(one.lam, both(one.l, two.l), both(one.s, two.s), both(one.b, two.b))
    times = uniform_lambda(process, *measuring_range(process), 6)
    x = start(process, times[0])

    def made(statistics):  # a network that keeps elements apart
        solver = DPMSolverV3(order=3, statistics=statistics, **NEVER)
        return sample(Problem(lambda x, t: torch.tanh(x), process), solver, x, times)

    assert (made(mixed) - torch.where(mask, made(one), made(two))).abs().max() < 1e-12


def test_per_channel_statistics_read_nothing_back_and_keep_the_dtype():
    statistics = ModelStatistics(torch.tensor([-3.0, 3.0]), *torch.rand(3, 2, 4, 1, 1))
    x = torch.empty(2, 4, 8, 8, device="meta")
    times = [14.0, 5.0, 2.0, 0.5, 0.0]
    made = sample(Problem(lambda x, t: x * 0.5, VE), DPMSolverV3(order=3, statistics=statistics), x, times)
    assert made.device.type == "meta" and made.dtype == x.dtype and made.shape == x.shape


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("reduce", ["scalar", "channel", "full"])
def test_one_gaussian_is_solved_in_one_step(reduce, process):
    """There f is a function of lambda alone, which the statistics know: what is left is their interpolation error."""
    data = GaussianMixture.gaussian(mean=0.5, variance=0.4)
    statistics = measured(process, data, K=64, nodes=121, reduce=reduce)
    assert statistics.l.shape[1:] == {"scalar": (), "channel": (1, 1, 1), "full": (1, 2, 2)}[reduce]
    t_max, t_min = measuring_range(process)
    exact = data.solve_ode(process, start(process, t_max), t_max, t_min)
    error = {
        s: (run(s, process, [t_max, t_min], data) - exact).abs().max()
        for s in (DPMSolverV3(1, "never"), DPMSolverV3(1, "never", statistics=statistics))
    }
    plain, fitted = error.values()
    assert plain > 0.5 and fitted < 2e-3
    sigma = np.array([process.t_of_lam(v) for v in statistics.lam.tolist()])
    alpha = np.array([process.alpha(t) for t in sigma])
    expected = torch.from_numpy(sigma**2 / (0.4 * alpha**2 + sigma**2)).reshape(-1, *[1] * (statistics.l.ndim - 1))
    assert (statistics.l - expected).abs().max() < 1e-4


@pytest.mark.parametrize("process", PROCESSES)
def test_measured_statistics_cut_the_error(process):
    """At 5 and 15 steps on the mixture, against data prediction: root of the mean square over 64 samples."""
    t_max, t_min = measuring_range(process)
    exact = DATA.solve_ode(process, start(process, t_max, n=64), t_max, t_min)
    statistics = measured(process)

    def gain(steps, **settings):
        times = uniform_lambda(process, t_max, t_min, steps)
        plain, fitted = (
            (run(solver, process, times, n=64) - exact).square().mean().sqrt()
            for solver in (DPMSolverV3(**settings, **NEVER), DPMSolverV3(**settings, **NEVER, statistics=statistics))
        )
        return plain / fitted

    assert gain(15, order=1, use_corrector="never") > 1.7
    assert gain(15, order=2, use_corrector="never") > 1.4
    assert gain(5, order=2) > 2.3
    assert gain(5, order=3) > 2.3


def test_few_samples_do_for_a_reduced_estimate():
    many, few = measured(VE, reduce="scalar"), measured(VE, reduce="scalar", K=64)
    assert (many.l - few.l).abs().max() < 0.05 and (many.s - few.s).abs().max() < 0.5
    assert few.mean.shape == ()


def test_statistics_survive_a_file(tmp_path):
    statistics = measured(VE, K=16, nodes=5)
    save(tmp_path / "a.safetensors", Artifact(KIND, tensors=statistics.tensors()))
    back = ModelStatistics.of(load(tmp_path / "a.safetensors", KIND))
    for name, tensor in statistics.tensors().items():
        assert torch.equal(tensor, getattr(back, name))
    assert "mean" not in ModelStatistics.constant(1.0, 0.0, 0.0).tensors()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ModelStatistics(torch.tensor([1.0, 0.0]), *torch.zeros(3, 2)), "increasing"),
        (lambda: ModelStatistics(torch.tensor([0.0]), *torch.zeros(3, 1)), "at least two"),
        (lambda: ModelStatistics(torch.tensor([0.0, 1.0]), *torch.zeros(3, 3)), "one entry for each of the 2"),
        (lambda: ModelStatistics(torch.tensor([0.0, 1.0]), *torch.full((3, 2), math.nan)), "l has values that are not"),
        (
            lambda: ModelStatistics.of(Artifact(KIND, tensors={"lam": torch.zeros(2), "l": torch.zeros(2)})),
            "has no s, b",
        ),
        (lambda: next(estimate([], VE, [0.0, 1.0])), "three or more"),
        (lambda: next(estimate([], VE, [0.0, 2.0, 1.0])), "increasing"),
        (lambda: next(estimate([], VE, [0.0, 1.0, 2.0], "row")), "not one of channel"),
        (lambda: next(estimate([], VE, [0.0, 1.0, 2.0], "channel", "full")), "must be 'channel' too"),
    ],
)
def test_bad_statistics_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("shape", [(4, 1, 1), (3, 8, 4), (3, 1, 1, 1)])
def test_statistics_of_other_latents_are_refused_before_any_call(shape):
    statistics = ModelStatistics(torch.tensor([0.0, 1.0]), *torch.zeros(3, 2, *shape))
    with pytest.raises(ValueError, match="this latent has the shape"):
        sample(Problem(None, VE), DPMSolverV3(statistics=statistics), torch.zeros(1, 3, 8, 8), [1.0, 0.0])
