"""Statistics of a model or of pictures, on problems whose answer is known: what is measured, and what its use gains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quickstep_under_test.solvers.calibration.cohort import Cohort
from quickstep_under_test.solvers.calibration.families import Plan
from quickstep_under_test.solvers.calibration.statistics import Part, compared, drawn, levels, over
from quickstep_under_test.solvers.dpm_solver_v3 import DPMSolverV3
from quickstep_under_test.solvers.ems import ModelStatistics
from quickstep_under_test.solvers.ems_estimate import estimate
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP
from quickstep_under_test.solvers.process import RectifiedFlow, VarianceExploding
from quickstep_under_test.solvers.solver import Problem, sample

K_MAX, K_MIN = 14.6, 0.02
VE = VarianceExploding(t_min=K_MIN, t_max=K_MAX)
FLOW = RectifiedFlow(t_min=K_MIN / (1 + K_MIN), t_max=K_MAX / (1 + K_MAX))
NOISE = RectifiedFlow(t_min=0.003, t_max=1.0)  # from pure noise on
PROCESSES = pytest.mark.parametrize("process", [VE, FLOW], ids=["ve", "flow"])
MEANS = torch.from_numpy(np.random.default_rng(1).standard_normal((12, 16)) * 0.9)


def bench() -> GaussianMixture:
    """The spec's: 12 components of std 0.15 in 16 dimensions."""
    one = torch.full((12,), 1.0 / 12.0, dtype=torch.float64)
    v = torch.full((12, 16), 0.15**2, dtype=torch.float64)
    return GaussianMixture(one, MEANS, v, torch.eye(16).double().expand(12, 16, 16))


MIXTURE = bench()


def pictures(count: int, seed: int = 7) -> torch.Tensor:
    """Samples of the mixture."""
    g = torch.Generator().manual_seed(seed)
    k = torch.randint(12, (count,), generator=g)
    return (MEANS[k] + 0.15 * torch.randn(count, 16, generator=g, dtype=torch.float64)).reshape(count, 1, 4, 4)


def problem(process, data=MIXTURE, change=None) -> Problem:
    exact = data.denoiser(process)
    return Problem(exact if change is None else lambda x, t: change(exact(x, t), t), process)


def batch(posed: Problem, rows: int, seed: int = 3):
    """Starts at t_max, the same for both processes."""
    process = posed.process
    z = torch.randn(rows, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = z * (1.0 if process.alpha(process.t_max) == 0.0 else K_MAX * process.alpha(process.t_max))
    return lambda visit: visit(posed, x)


def drained(running):
    while True:
        try:
            next(running)
        except StopIteration as end:
            return end.value


def times(process, n: int) -> list[float]:
    """Uniform in log-SNR, from K_MAX to K_MIN."""
    return [float(process.t_of_rho(k)) for k in np.geomspace(K_MAX, K_MIN, n + 1)]


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).square().mean(1).sqrt()


# What they are measured on


@pytest.mark.parametrize("process", [VE, FLOW, NOISE], ids=["ve", "flow", "pure noise"])
def test_levels_are_inside_of_what_the_model_knows(process):
    lam = levels(process, 5, 0.1)
    assert lam[0] == pytest.approx(-np.log(50.0 if process is NOISE else K_MAX) + 0.1)
    assert lam[-1] == pytest.approx(process.lam(process.t_min) - 0.1) and np.allclose(np.diff(lam, 2), 0.0)


def test_between_levels_values_are_linear_and_beyond_constant():
    values = np.array([[1.0, 2.0], [3.0, 2.0], [3.0, 8.0]])
    assert np.allclose([over([0.0, 1.0, 3.0], values, at) for at in (-9.0, 0.25, 1.0, 2.0, 9.0)],
                       [[1, 2], [1.5, 2], [3, 2], [3, 5], [3, 8]])  # fmt: skip


@PROCESSES
def test_parts_are_what_the_model_makes_and_noise_depends_on_the_seed_alone(process):
    posed = problem(process)
    parts = drained(drawn([batch(posed, 3), batch(posed, 2, 4)], process, 40))
    assert [len(part.x0) for part in parts] == [3, 2]
    near = (torch.cat([p.x0 for p in parts]).reshape(5, 1, 16) - MEANS).square().mean(-1).min(1).values
    assert near.max() < 0.15
    start = torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    noised = [parts[0].noised(process, start, process.t_of_lam(lam), 9) for lam in (-1.0, 2.0)]
    eps = [(x - process.alpha(t) * parts[0].x0) / process.sigma(t)
           for x, t in zip(noised, map(process.t_of_lam, (-1.0, 2.0)), strict=True)]  # fmt: skip
    assert torch.allclose(*eps, atol=1e-12) and 0.8 < eps[0].std() < 1.2
    before, after = drained(compared(Cohort([batch(posed, 4)]), process, [
        _plan(DDIM(), process), _plan(DPMSolverPP(), process)]))  # fmt: skip
    assert before.shape == (4,) and after.median() < before.median()


def _plan(solver, process):
    return Plan(solver, [*times(process, 8), 0.0])


# DPM-Solver-v3's


def measured(process, count: int, nodes: int, *kind: str, data=MIXTURE, x0=None) -> ModelStatistics:
    posed = problem(process, data)
    clean = pictures(count) if x0 is None else x0
    parts = [Part(lambda visit, rows=rows: visit(posed, rows), rows) for rows in clean.split(50)]
    *_, last = estimate(parts, process, levels(process, nodes, 0.1), *kind)
    return last.statistics


def test_a_few_thousand_calls_of_economy_gain_what_the_paper_form_does():
    """Spec 11.1, 6: root mean square error over 400 samples against 2M, 5, 8, 10, 20 steps."""
    posed = problem(VE)
    x = K_MAX * torch.randn(400, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = sample(posed, DPMSolverPP(order=3, third_order="exact", lower_order_final="never"), x, times(VE, 100))
    gained = {}
    for name, statistics in (
        ("economy", measured(VE, 64, 20, "scalar", "full")),
        ("full", measured(VE, 512, 20, "full")),
    ):
        solver = DPMSolverV3(statistics=statistics, lower_order_final="never")
        for steps in (5, 8, 10, 20):
            off = [
                (sample(posed, s, x, times(VE, steps)) - exact).square().mean().sqrt() for s in (DPMSolverPP(), solver)
            ]
            gained[name, steps] = float(off[1] / off[0])
    for steps, most in ((5, 0.72), (8, 0.8), (10, 0.85), (20, 0.7)):
        assert gained["economy", steps] < most and gained["full", steps] < most, gained


def test_statistics_of_flow_models_are_those_of_their_variance_exploding_image():
    one, two = (measured(process, 20, 7, "scalar", "full") for process in (VE, FLOW))
    for a, b in ((one.l, two.l), (one.s, two.s), (one.b, two.b)):
        assert torch.allclose(a, b, atol=1e-6), (a - b).abs().max()


@PROCESSES
@pytest.mark.parametrize("kind", [("scalar", "channel"), ("scalar", "full"), ("channel",), ("full",)])
def test_statistics_of_one_point_know_everything(kind, process):
    """Identical pictures: D is the point, so that l = 1 and s, which has nothing to explain, is 0."""
    data = GaussianMixture.gaussian(0.4, 0.0, d=16)
    found = measured(process, 0, 5, *kind, data=data, x0=torch.full((3, 1, 4, 4), 0.4, dtype=torch.float64))
    assert (found.l - 1.0).abs().max() < 1e-9 and found.s.abs().max() < 1e-6 and found.b.abs().max() < 1e-6
    shapes = {"scalar": (), "channel": (1, 1, 1), "full": (1, 4, 4)}
    assert found.l.shape[1:] == shapes[kind[0]] and found.b.shape[1:] == shapes[kind[-1]]
    x = process.sigma(process.t_max) * torch.randn(2, 1, 4, 4, dtype=torch.float64)
    made = sample(problem(process, data), DPMSolverV3(statistics=found), x, [process.t_max, 0.0])  # one step
    assert (made - 0.4).abs().max() < 1e-9


def test_numbers_beside_a_finer_b_are_the_same_numbers_for_every_element():
    g = torch.Generator().manual_seed(1)
    lam, l, s = torch.linspace(-3.0, 3.0, 5), *torch.rand(2, 5, generator=g)  # noqa: E741
    b = torch.rand(5, 1, 4, 4, generator=g)
    wide = [v.reshape(5, 1, 1, 1).expand(5, 1, 4, 4) for v in (l, s)]
    x = K_MAX * torch.randn(2, 1, 4, 4, generator=g, dtype=torch.float64)
    ends = [
        sample(problem(VE), DPMSolverV3(order=3, statistics=ModelStatistics(lam, *two, b)), x, [*times(VE, 5), 0.0])
        for two in ((l, s), wide)
    ]
    assert (ends[0] - ends[1]).abs().max() < 1e-12
