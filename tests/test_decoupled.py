"""Decoupled times: what is asked for, what it is for a network that is told wrong levels, and that the search finds that."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from quickstep_under_test.solvers.artifact import Artifact
from quickstep_under_test.solvers.calibration.asking import MOST, asked
from quickstep_under_test.solvers.calibration.cohort import Cohort
from quickstep_under_test.solvers.calibration.curve import Curve
from quickstep_under_test.solvers.calibration.decoupled import (
    KIND,
    Asked,
    Decoupled,
    DecoupledTimes,
    decoupled,
    levels,
    offsets_of,
)
from quickstep_under_test.solvers.calibration.families import Joint, Plan, Schedules, Weights, fitted_plan
from quickstep_under_test.solvers.calibration.fitted import FittedSolver
from quickstep_under_test.solvers.calibration.levenberg import refine
from quickstep_under_test.solvers.calibration.losses import LOSSES
from quickstep_under_test.solvers.calibration.wider import Rescaled
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP
from quickstep_under_test.solvers.exposure_bias import EpsilonScaling
from quickstep_under_test.solvers.process import RectifiedFlow, VarianceExploding
from quickstep_under_test.solvers.schedules import ExponentialSchedule
from quickstep_under_test.solvers.singlestep import DPMSolverSinglestep
from quickstep_under_test.solvers.solver import Problem, sample
from quickstep_under_test.solvers.transform import Transformed

LAST = 0.05  # above t_min, so that lower levels can be asked for there too
VE = VarianceExploding(t_min=0.02, t_max=10.0)
FLOW = RectifiedFlow(t_min=0.02, t_max=10.0 / 11.0)
NOISE = RectifiedFlow(t_min=0.02, t_max=1.0)
PROCESSES = [pytest.param(VE, id="ve"), pytest.param(FLOW, id="flow"), pytest.param(NOISE, id="pure noise")]
MEANS = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 8)))
DATA = GaussianMixture(
    torch.full((5,), 0.2, dtype=torch.float64), MEANS, torch.full((5, 8), 0.09, dtype=torch.float64),
    torch.eye(8).double().expand(5, 8, 8),
)  # fmt: skip
N = 5


def times_of(process, n: int = N) -> list[float]:
    return ExponentialSchedule()(process, process.t_max, LAST, n).tolist()


def begun(process, rows: int = 6) -> torch.Tensor:
    x = torch.randn(rows, 2, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x * process.sigma(process.t_max)


def exact(process) -> Problem:
    return Problem(DATA.denoiser(process), process)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_network_sees_a_sample_of_the_level_it_is_told(process):
    times, seen = times_of(process), []
    problem = exact(process)

    def spy(x, t):
        seen.append((x, t))
        return problem.denoise(x, t)

    offsets = [0.0, 0.3, -0.2, 0.1, -0.1]
    denoise = asked(replace(problem, denoise=spy), times, offsets)
    for t, delta in zip(times[:-1], offsets, strict=True):
        x = begun(process)
        x0 = denoise(x, t)
        given, c = seen[-1]
        if delta == 0.0:
            assert c == t and given is x
            continue
        assert math.log(process.rho(c)[0] / process.rho(t)[0]) == pytest.approx(delta, abs=1e-9)
        size = [math.hypot(process.alpha(at), process.sigma(at)) for at in (t, c)]
        assert torch.allclose(given / size[1], x / size[0])
        eps = (given - process.alpha(c) * problem.denoise(given, c)) / process.sigma(c)
        assert torch.allclose(x0, (x - process.sigma(t) * eps) / process.alpha(t))
    between = math.sqrt(times[1] * times[2])
    denoise(begun(process), between)
    k, a, b = (math.log(process.rho(t)[0]) for t in (between, times[1], times[2]))
    want = 0.3 + (k - a) / (b - a) * (-0.2 - 0.3)
    assert math.log(process.rho(seen[-1][1])[0]) - k == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("process", PROCESSES)
def test_levels_stay_in_the_range_of_the_model(process):
    times, told = [process.t_max, 0.5 * process.t_max, process.t_min * 1.1, 0.0], []

    def spy(x, t):
        told.append(t)
        return x

    denoise = asked(Problem(spy, process), times, [0.0, 0.4, -0.4])
    for t in (process.t_max, process.t_max * (1 - 5e-5), times[2], 0.5 * process.t_min):
        denoise(begun(process), t)
    # The second one is the first sigma of a file after float32; the last one is below the range already.
    assert told == [process.t_max, process.t_max * (1 - 5e-5), process.t_min, 0.5 * process.t_min]


@pytest.mark.parametrize("process", PROCESSES)
def test_without_offsets_it_is_the_sampler(process):
    times, x = times_of(process), begun(process)
    plain = sample(exact(process), DPMSolverPP(), x, times)
    assert torch.equal(plain, sample(exact(process), Asked(DPMSolverPP(), tuple(times), (0.0,) * N), x, times))
    assert torch.equal(plain, sample(exact(process), Transformed(DPMSolverPP(), DecoupledTimes()), x, times))


def mistaken(process, times, by: float) -> Problem:
    """A network that takes a level k for k exp(-by), from the second of the times on."""
    problem = exact(process)
    shifted = asked(problem, times, [0.0, *[-by] * (len(times) - 2)])
    return replace(problem, denoise=shifted)


@pytest.mark.parametrize("process", PROCESSES)
def test_offsets_undo_a_mistake_of_the_network(process):
    times, x = times_of(process), begun(process)
    wrong = mistaken(process, times, 0.2)
    right = sample(exact(process), DDIM(), x, times)
    off = sample(wrong, DDIM(), x, times)
    undone = sample(wrong, Asked(DDIM(), tuple(times), (0.0, *[0.2] * (N - 1))), x, times)
    assert float((off - right).abs().max()) > 0.01
    assert torch.allclose(undone, right, atol=1e-9)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_search_finds_them(process):
    times, x = times_of(process), begun(process, 12)
    wrong = mistaken(process, times, 0.2)
    cohort = Cohort([lambda visit: visit(wrong, x)], [sample(exact(process), DDIM(), x, times)])
    curve = Curve(process, process.t_max, LAST, N)
    inner = Schedules(DDIM(), curve)
    family = Decoupled(inner, N)
    begin = family.begin(inner.theta(times), Plan(DDIM(), times))
    found = [c for c in drained(refine(cohort, family, begin, LOSSES["rms"])) if c is not None]
    plain = [c for c in drained(refine(cohort, inner, inner.theta(times), LOSSES["rms"])) if c is not None]
    assert found[-1].loss < 0.02 * found[0].loss and found[-1].loss < 0.2 * plain[-1].loss
    assert np.allclose(offsets_of(found[-1].plan)[1:], 0.2, atol=0.05)


def drained(running):
    return list(running)


@pytest.mark.parametrize(
    "solver",
    [DPMSolverPP(), DPMSolverSinglestep(order=2), Transformed(DPMSolverPP(), EpsilonScaling(b=1.05))],
    ids=lambda s: s.id,
)
def test_derivatives_repeat_only_the_steps_they_must(solver):
    """All, where a transform keeps the denoiser of the first step."""
    times, x = times_of(VE), begun(VE)
    inner = Schedules(solver, Curve(VE, VE.t_max, VE.t_min, N))
    family = Decoupled(inner, N, solver.calls > 1)
    begun_with = Plan(Asked(solver, tuple(times), (0.0, 0.1, -0.1, 0.2, 0.05)), times)
    eta = family.natural(family.begin(inner.theta(times), begun_with))
    cohort = Cohort([lambda visit: visit(exact(VE), x)], [torch.zeros_like(x)])
    J = end(cohort.jacobian(family, eta))
    for q, h in enumerate(family.delta):
        moved = eta.copy()
        moved[q] += h
        there, here = (end(cohort.residuals(family.plan(e)))[0] for e in (moved, eta))
        assert torch.allclose(J[..., q], (there - here) / h, atol=1e-9) and float(J[..., q].abs().max()) > 1e-6, q


def test_derivatives_stay_within_what_a_file_may_hold():
    """At the bound, and where what is resumed is beyond it."""
    times, rows = times_of(VE), [[1.0]] * N
    inner = Weights(tuple(times), 3)
    family = Decoupled(inner, N)
    resumed = family.begin(inner.theta(rows), fitted_plan(times, rows, [0.0, MOST, -MOST, MOST, 0.49]))
    far = np.concatenate([inner.theta(rows), np.full(N - 1, 99.0)])
    for theta in (resumed, far):
        eta = family.natural(theta)
        for q, h in enumerate(family.delta):
            assert max(map(abs, offsets_of(family.plan(eta + h * np.eye(len(eta))[q])))) <= MOST


def end(running):
    while True:
        try:
            next(running)
        except StopIteration as stop:
            return stop.value


@pytest.mark.parametrize("process", PROCESSES)
def test_a_fitted_solver_has_them_too(process):
    times, x = times_of(process), begun(process)
    offsets = [0.0, 0.1, -0.2, 0.3, 0.05]
    curve = Curve(process, process.t_max, process.t_min, N)
    inner = Joint(curve, 3)
    rows = [[1.0], [1.5, -0.5], [1.4, -0.3, -0.1], [1.2, -0.2, 0.0], [1.0, 0.0, 0.0]]
    plan = Decoupled(inner, N).plan(np.concatenate([inner.natural(inner.theta(times, rows)), offsets[1:]]))
    assert isinstance(plan.solver, FittedSolver) and np.allclose(offsets_of(plan), offsets)
    bare = fitted_plan(plan.times, plan.solver.weights)
    same = sample(exact(process), Asked(bare.solver, tuple(plan.times), tuple(plan.solver.offsets)), x, plan.times)
    assert torch.allclose(sample(exact(process), plan.solver, x, plan.times), same, atol=1e-12)
    for wrong in ([0.1] * N, [0.0] * (N + 1), [0.0, 0.9, 0.0, 0.0, 0.0], "no"):
        with pytest.raises(ValueError, match="offsets must be one number for each step"):
            FittedSolver(Artifact(plan.solver.calibration.kind, {**plan.solver.calibration.table, "offsets": wrong}))


def test_a_fitted_solver_away_from_its_sigmas_is_like_any_other():
    """Without a file, and adapted to other sigmas."""
    times, x, offsets = times_of(VE), begun(VE), [0.0, 0.1, -0.2, 0.3, 0.05]
    bare = decoupled(FittedSolver(), times, offsets)
    plain = sample(exact(VE), Asked(FittedSolver(), tuple(times), tuple(offsets)), x, times)
    assert torch.equal(sample(exact(VE), bare.solver, x, times), plain) and offsets_of(bare) == offsets
    rows = [[1.0], [1.5, -0.5], [1.4, -0.4]]
    file = fitted_plan(times_of(VE, 3), rows, [0.0, 0.2, 0.2]).solver.calibration
    adapting = FittedSolver(file, elsewhere="adapt")
    made = decoupled(adapting, times, offsets)
    assert made.solver == Asked(adapting, tuple(times), tuple(offsets)) and made.times == times
    assert offsets_of(Plan(adapting, times)) == [0.0] * N
    assert isinstance(decoupled(adapting, times_of(VE, 3), [0.0, 0.1, 0.1]).solver, FittedSolver)


def test_what_is_kept_in_inpainting_stays():
    times, x = times_of(VE), begun(VE)
    mask = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    mask[..., 0] = 1.0
    kept = torch.full_like(x, 0.7)

    def denoise(x, t):
        return DATA.denoiser(VE)(x, t) * mask + kept * (1.0 - mask)

    x0 = asked(Problem(denoise, VE, mask=mask), times, [0.0, 0.3, 0.3, 0.3, 0.3])(x, times[2])
    assert torch.equal(x0[..., 1], kept[..., 1]) and not torch.allclose(x0[..., 0], denoise(x, times[2])[..., 0])


def test_times_of_their_own_for_each_row():
    times, x = times_of(VE), begun(VE, 2)
    denoise = asked(exact(VE), times, [0.0, 0.3, -0.2, 0.1, -0.1])
    both = denoise(x, [times[1], times[3]])
    assert torch.allclose(both, torch.cat([denoise(x[:1], times[1]), denoise(x[1:], times[3])]))


def test_a_file_is_for_its_sigmas():
    times = times_of(VE)
    found = Artifact(KIND, {"sigmas": times, "offsets": [0.0, 0.1, 0.1, 0.1, 0.1]})
    transform = DecoupledTimes(found)
    assert levels(found)[2] == pytest.approx(times[2] * math.exp(0.1)) and len(levels(found)) == N + 1
    with pytest.raises(ValueError, match="for 5 steps, and this run has 4"):
        transform.around(exact(VE), times_of(VE, 4))
    with pytest.raises(ValueError, match="connect the sigmas of the same file"):
        transform.around(exact(VE), [times[0], *(0.9 * t for t in times[1:])])
    for table in (
        {"sigmas": times},
        {"sigmas": times, "offsets": [0.0]},
        {"sigmas": times, "offsets": [0.0, 2, 0, 0, 0]},
    ):
        with pytest.raises(ValueError, match="the file must hold"):
            DecoupledTimes(Artifact(KIND, table))
    with pytest.raises(ValueError, match="is needed here"):
        DecoupledTimes(Artifact("schedule", found.table))


def test_one_step_has_nothing_to_decouple():
    times = [VE.t_max, 0.0]
    inner = Schedules(DDIM(), Curve(VE, VE.t_max, VE.t_min, 1))
    family = Decoupled(inner, 1)
    eta = family.natural(family.begin(inner.theta(times), Plan(DDIM(), times)))
    assert len(eta) == 0 and family.slope(np.zeros(1)).shape == (0, 1)
    plan = family.plan(eta)
    assert torch.equal(
        sample(exact(VE), plan.solver, begun(VE), plan.times), sample(exact(VE), DDIM(), begun(VE), times)
    )


ROWS = [[1.02], [1.5, -0.52], [1.4, -0.3, -0.08], [1.2, -0.2, 0.0], [0.99, 0.0, 0.0]]
SCALES = [1.01, 0.98, 1.03, 0.99, 1.0]


@pytest.mark.parametrize("process", PROCESSES)
def test_scales_are_factors_of_the_sample(process):
    times, x = times_of(process), begun(process)
    plan = fitted_plan(times, ROWS, scales=SCALES)
    seen, at = [], x
    problem = exact(process)
    for i, (s, t) in enumerate(pairwise(times)):
        seen.insert(0, problem.denoise(at, s))
        mean = sum(w * D for w, D in zip(ROWS[i], seen, strict=False))
        q = process.sigma(t) / process.sigma(s)
        at = SCALES[i] * q * at + (process.alpha(t) - q * process.alpha(s)) * mean
    assert torch.allclose(sample(problem, plan.solver, x, times), at, atol=1e-10)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_search_finds_scales(process):
    times, x = times_of(process), begun(process, 12)
    target = fitted_plan(times, ROWS, scales=SCALES)
    cohort = Cohort([lambda visit: visit(exact(process), x)], [sample(exact(process), target.solver, x, times)])
    inner = Weights(tuple(times), 3)
    family = Rescaled(inner, N)
    start = fitted_plan(times, [[w / sum(row) for w in row] for row in ROWS])
    begin = family.begin(inner.theta(start.solver.weights), start)
    assert family.numbers(start) == pytest.approx([0.0] * (2 * N - 1))
    found = [c for c in drained(refine(cohort, family, begin, LOSSES["rms"])) if c is not None]
    assert found[-1].loss < 0.02 * found[0].loss
    exactly = family.plan(family.natural(family.begin(inner.theta(ROWS), target)))
    assert np.allclose(exactly.solver.scales, SCALES) and all(map(np.allclose, exactly.solver.weights, ROWS))
    table = target.solver.calibration.table
    for wrong in ([1.0], [0.0] * N, "no"):
        with pytest.raises(ValueError, match="scales must be one number above 0"):
            FittedSolver(Artifact(target.solver.calibration.kind, {**table, "scales": wrong}))
