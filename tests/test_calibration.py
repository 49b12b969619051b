"""Calibrations on problems whose answer is known: schedules, fitted solvers, their teacher, and what degenerate data give."""

from __future__ import annotations

import math
import shutil
from collections import namedtuple
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from quickstep_under_test.solvers.artifact import Artifact
from quickstep_under_test.solvers.calibration import cohort as cohorts
from quickstep_under_test.solvers.calibration import tangents
from quickstep_under_test.solvers.calibration import teacher as teachers
from quickstep_under_test.solvers.calibration.cohort import Cohort, drained, rejoin, sketch, track
from quickstep_under_test.solvers.calibration.curve import Curve
from quickstep_under_test.solvers.calibration.decoupled import Decoupled
from quickstep_under_test.solvers.calibration.families import Joint, Plan, Schedules, Weights, fitted_plan, written
from quickstep_under_test.solvers.calibration.fitted import KIND, FittedSolver
from quickstep_under_test.solvers.calibration.least_squares import sequential
from quickstep_under_test.solvers.calibration.levenberg import STAGES, refine
from quickstep_under_test.solvers.calibration.losses import LOSSES
from quickstep_under_test.solvers.calibration.search import ScheduleSearch, SolverSearch
from quickstep_under_test.solvers.calibration.states import States
from quickstep_under_test.solvers.calibration.teacher import Trajectories, converge, lesson
from quickstep_under_test.solvers.calibration.wider import Rescaled
from quickstep_under_test.solvers.deis import DEIS
from quickstep_under_test.solvers.er_sde import ERSDE
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP
from quickstep_under_test.solvers.momentum import GHVB
from quickstep_under_test.solvers.pndm import IPNDM
from quickstep_under_test.solvers.process import RectifiedFlow, VarianceExploding
from quickstep_under_test.solvers.sa import SASolver
from quickstep_under_test.solvers.schedules import ExponentialSchedule, KarrasSchedule
from quickstep_under_test.solvers.singlestep import DPMSolverSinglestep
from quickstep_under_test.solvers.solver import Problem, sample, solve
from quickstep_under_test.solvers.unipc import UniPC

K_MAX, K_MIN = 14.6, 0.02
VE = VarianceExploding(t_min=K_MIN, t_max=K_MAX)
FLOW = RectifiedFlow(t_min=K_MIN / (1 + K_MIN), t_max=K_MAX / (1 + K_MAX))
NOISE = RectifiedFlow(t_min=0.003, t_max=1.0)  # from pure noise on
PROCESSES = [pytest.param(VE, id="ve"), pytest.param(FLOW, id="flow"), pytest.param(NOISE, id="pure noise")]


def bench() -> GaussianMixture:
    """The spec's: 12 components of std 0.15 in 16 dimensions."""
    m = torch.from_numpy(np.random.default_rng(1).standard_normal((12, 16)) * 0.9)
    one = torch.full((12,), 1.0 / 12.0, dtype=torch.float64)
    return GaussianMixture(
        one, m, torch.full((12, 16), 0.15**2, dtype=torch.float64), torch.eye(16).double().expand(12, 16, 16)
    )


MIXTURE = bench()


def batch(process, rows: int, seed: int, data: GaussianMixture = MIXTURE, same: bool = False):
    """Starts at t_max; the same samples, seen as VE or flow, for both processes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 1, 4, 4, generator=g, dtype=torch.float64)
    x = x[:1].expand(rows, 1, 4, 4) if same else x
    k = 1.0 if process.alpha(process.t_max) == 0.0 else K_MAX * process.alpha(process.t_max)
    problem = Problem(data.denoiser(process), process)
    return lambda visit: visit(problem, k * x)


def last(candidates):
    """The best candidate of a refinement."""
    return [found for found in candidates if found is not None][-1]


def taught(process, rows: int, seed: int, plan: Plan, **options) -> tuple[Cohort, dict[float, torch.Tensor]]:
    """A cohort whose teacher is ``plan``, and its states by time."""
    made = batch(process, rows, seed, **options)
    trail = made(lambda problem, x: track(problem, plan, x))
    states = {t: mark.x for t, mark in zip(plan.times, trail, strict=True)}
    return Cohort([made], [trail[-1].x]), states


def searched(search):
    for _ in search.run():
        pass
    search.release()
    return search


def selected(search, plan: Plan) -> float:
    """A run's loss on the samples that select, measured anew."""
    return search.loss(drained(search.select.errors(plan)))


def is_the_best(search) -> bool:
    """Of all starts, if no more than FINALISTS, and what the search says it is."""
    least = min(trial.select for trial in search.trials)
    usual = min(selected(search, plan) for plan in search.starts.values())
    return selected(search, search.best) == pytest.approx(least, rel=1e-9) and least <= usual * (1 + 1e-9)


def cohorts_of(process, rows: int, **options):
    return [Cohort([batch(process, n, seed, **options)]) for n, seed in ((rows, 1), (rows, 2), (200, 3))]


def starts(process, n: int, solver=None):
    made = {}
    for name, schedule in (("Karras", KarrasSchedule()), ("Exponential", ExponentialSchedule())):
        times = schedule(process, process.t_max, process.t_min, n).tolist()
        made[name] = written(FittedSolver(), process, times) if solver is None else Plan(solver, times)
    return made


# Parametrization


@pytest.mark.parametrize("process", PROCESSES)
def test_schedules_survive_the_way_through_logits(process):
    curve = Curve(process, process.t_max, process.t_min, 8)
    times = ExponentialSchedule()(process, process.t_max, process.t_min * 1.5, 8).tolist()
    again = curve.times(curve.levels(curve.logits(times)))
    if process is NOISE:  # its first gap is measured from sigma 0.999
        assert again[0] == 1.0
    assert np.allclose(again, times, rtol=1e-9)


@pytest.mark.parametrize("process", PROCESSES)
def test_whatever_the_logits_times_keep_apart_and_in_range(process):
    curve, g = Curve(process, process.t_max, process.t_min, 6), np.random.default_rng(0)
    for _ in range(50):
        y = curve.levels(g.normal(size=6) * 10.0)
        assert (np.diff([curve.ends[0], *y]) <= -curve.gap * (1 - 1e-9)).all() and y[-1] >= curve.ends[1] - 1e-9
        times = curve.times(y)
        assert times[0] == process.t_max and times[-1] == 0.0 and (np.diff(times) < 0).all()


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_any_number_of_steps_has_a_curve(steps):
    curve = Curve(VE, K_MAX, K_MIN, steps)
    times = KarrasSchedule()(VE, K_MAX, K_MIN, steps).tolist()
    made = curve.times(curve.levels(curve.logits(times)))
    assert len(made) == steps + 1 and made[0] == K_MAX and made[-1] == 0.0


def test_slopes_are_the_derivatives_of_natural_coordinates():
    curve = Curve(VE, K_MAX, K_MIN, 5)
    times = KarrasSchedule()(VE, K_MAX, K_MIN * 1.1, 5).tolist()
    joint = Joint(curve, 3)
    for family, theta in (
        (Schedules(DDIM(), curve), curve.logits(times)),
        (joint, joint.theta(times, [[1.0], [1.2, -0.2], [1.3, -0.4, 0.1], [1.0], [1.0]])),
    ):
        h = 1e-6
        for q in range(len(theta)):
            up, down = (family.natural(theta + s * h * np.eye(len(theta))[q]) for s in (1.0, -1.0))
            assert np.allclose((up - down) / (2 * h), family.slope(theta)[:, q], atol=1e-7)
        assert len(family.since) == len(family.delta) == len(family.natural(theta))


# Derivatives


@pytest.mark.parametrize("solver", [DDIM(), DPMSolverPP(), UniPC(order=3)], ids=lambda s: s.id)
@pytest.mark.parametrize("process", PROCESSES)
def test_rejoined_runs_are_whole_runs(process, solver):
    """A run that differs from step i on is continued from the tracked state there, to the last bit."""
    family = Schedules(solver, Curve(process, process.t_max, process.t_min, 6))
    eta = family.natural(np.zeros(6))
    made = batch(process, 3, 0)
    trail = made(lambda problem, x: track(problem, family.plan(eta), x))
    calls = []
    for q, since in enumerate(family.since):
        moved = eta.copy()
        moved[q] += 0.05
        plan = family.plan(moved)

        def visit(problem, x, plan=plan, since=since):
            counted = Problem(lambda x, t: (calls.append(t), problem.denoise(x, t))[1], problem.process)
            return rejoin(counted, plan, trail, since)

        calls.clear()
        end = made(visit)
        assert torch.equal(end, made(lambda problem, x, plan=plan: sample(problem, plan.solver, x, plan.times)))
        assert len(calls) == 6 - since


def test_the_jacobian_is_that_of_central_differences():
    times = KarrasSchedule()(VE, K_MAX, K_MIN, 5).tolist()
    family = Joint(Curve(VE, K_MAX, K_MIN, 5), 3)
    eta = family.natural(family.theta(times, written(FittedSolver(), VE, times).solver.weights))
    cohort = Cohort([batch(VE, 4, 0), batch(VE, 3, 1)])
    small = type("Small", (Joint,), {"delta": property(lambda self: np.full(len(self.since), 1e-6))})(family.curve, 3)
    J = drained(cohort.jacobian(small, eta))
    assert J.shape == (7, 16, len(eta))
    for q in range(len(eta)):
        ends = []
        for sign in (1.0, -1.0):
            moved = eta.copy()
            moved[q] += sign * 1e-5
            ends.append(torch.cat(drained(cohort.ends(family.plan(moved)))))
        assert torch.allclose(
            J[..., q], sketch(ends[0] - ends[1]) / 2e-5, atol=1e-3 * float(J[..., q].abs().max()) + 1e-6
        )


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("kinds", [[], [Rescaled], [Rescaled, Decoupled]], ids=["weights", "scales", "levels"])
def test_tangents_are_the_jacobian_with_fewer_calls(process, kinds, monkeypatch):
    """With every direction and small differences they are that of central differences; with the usual ones nearly so."""
    n = 5
    curve = Curve(process, process.t_max, process.t_min, n)
    family, times = Joint(curve, 4), curve.times(curve.levels(np.zeros(n)))
    plan = written(SASolver(eta=0.0), process, times)
    theta = family.theta(times, plan.solver.weights)
    offsets = [0.0, 0.1, -0.1, 0.0, 0.2] if Decoupled in kinds else None
    begin = fitted_plan(times, plan.solver.weights, offsets, [1.01, 0.99, 1.02, 1.0, 1.0] if kinds else None)
    for kind in kinds:
        family = kind(family, n)
        theta = family.begin(theta, begin)
    eta = family.natural(theta)
    cohort = Cohort([batch(process, 4, 0), batch(process, 3, 1)])
    cohort.targets = drained(cohort.ends(family.plan(eta)))
    exact = []
    for row in np.eye(len(eta)):
        there, here = (torch.cat(drained(cohort.ends(family.plan(eta + sign * 1e-5 * row)))) for sign in (1.0, -1.0))
        exact.append(sketch(there - here) / 2e-5)
    exact = torch.stack(exact, -1)
    spent = cohort.calls
    drained(cohort.jacobian(family, eta))
    repeated, spent = cohort.calls - spent, cohort.calls
    usual = drained(tangents.jacobian(cohort, family, eta, 1.0, STAGES[0][1]))
    assert cohort.calls - spent < 0.75 * repeated
    for name in ("SMALL", "NEAR"):
        monkeypatch.setattr(tangents, name, 1e-6)
    fine = drained(tangents.jacobian(cohort, family, eta, 1.0, 1e-9))
    assert usual.shape == fine.shape == exact.shape == (7, 16, len(eta))
    assert float((fine - exact).norm() / exact.norm()) < 1e-3
    # One of the samples is so near to another mode that no finite difference is small there.
    assert float(((usual - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))).median()) < 0.1
    half = drained(tangents.jacobian(cohort, family, eta, 0.5, 1e-9))
    assert torch.equal(half, fine[:4])


def test_sketches_keep_lengths_and_products():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 4, 64, 64, generator=g)
    short = sketch(a)
    assert short.shape == (3, cohorts.SKETCH)
    assert torch.allclose(short.square().sum(1), a.flatten(1).square().mean(1), rtol=0.1)
    assert ((short * sketch(b)).sum(1) - (a * b).flatten(1).mean(1)).abs().max() < 0.1
    assert torch.allclose(sketch(a[:, :1, :8]).square().sum(1), a[:, :1, :8].flatten(1).square().mean(1))


# Teacher


@pytest.mark.parametrize("process", PROCESSES)
def test_trajectories_between_their_steps(process):
    cohort = Cohort([batch(process, 5, 0), batch(process, 3, 1)])
    teacher = Trajectories(process, 100, 8, (1, 4, 4), "")
    drained(teacher.teach(cohort))
    assert [len(t) for t in cohort.targets] == [5, 3]
    times = [t for t in lesson(process, 100).times if t > 0.0]
    wanted = [0.5 * (times[3] + times[4]), 0.7 * times[60] + 0.3 * times[61], times[-1]]
    fine = Cohort([batch(process, 5, 0), batch(process, 3, 1)])
    for t in wanted:
        grid = sorted({*(s for s in lesson(process, 200).times if s > t), t}, reverse=True)
        exact = drained(fine.ends(Plan(lesson(process, 200).solver, grid)))
        got = torch.cat([teacher.at(t, 0, 5), teacher.at(t, 5, 3)]).double()
        assert (got - torch.cat(exact)).abs().max() < 5e-3 * got.abs().max()
    assert teacher.nbytes == 2 * 100 * 8 * 16 * 4


def test_the_teacher_doubles_until_it_is_right_enough():
    times = KarrasSchedule()(VE, K_MAX, K_MIN, 5).tolist()
    cohort = Cohort([batch(VE, 16, 0)])
    steps, change, off = drained(converge(cohort, VE, [Plan(DDIM(), times)]))
    assert change < 0.05 * off[0] and len(off) == 1
    steps, change, _ = drained(
        converge(cohort, VE, [Plan(DDIM(), times), lesson(VE, 40)])
    )  # for so good a student a better teacher
    assert 80 < steps <= 640 and change < 1e-4
    steps, _, off = drained(converge(cohort, VE, [lesson(VE, n) for n in (40, 41, 42)], lambda: 0.1))
    assert steps == 40 and len(off) == 1  # no time for it, nor for more students


def test_without_time_the_first_start_is_the_only_one():
    found = ScheduleSearch(
        VE, *cohorts_of(VE, 4), starts(VE, 4, DDIM()), solver=DDIM(), left=lambda: -1.0 if found.base else 0.1
    )
    for _ in found.run():
        if found.base is not None:
            break
    assert [trial.label for trial in found.trials] == [found.base_label] == ["Karras"]


def test_states_in_a_file_are_those_in_memory(tmp_path):
    from safetensors import safe_open

    small, large = States(3, 4, (2, 2), tmp_path), States(3, 4, (2, 2), tmp_path, limit=0)
    assert small.file is None and large.file is not None and large.nbytes == 3 * 4 * 4 * 4
    latents = torch.randn(2, 2, 2)
    for states in (small, large):
        states.put(1, 2, latents)
        assert torch.equal(states.get(1, 2, 2), latents) and not states.get(0, 0, 4).any()
    large._data.flush()
    with safe_open(large.file, "pt") as file:
        assert torch.equal(file.get_tensor("states")[1, 2:], latents)
    file = large.file
    large.close()
    assert not file.exists() and list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    """Both files of the trajectories have to fit."""
    size = 4 * 40 * 8 * 16
    monkeypatch.setattr(teachers, "States", partial(States, limit=0))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 1.5 * size))
    with pytest.raises(ValueError, match=r"take 0\.0 GB, and .* has 0\.0 GB free: use fewer samples"):
        Trajectories(VE, 40, 8, (1, 4, 4), tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 2 * size))
    Trajectories(VE, 40, 8, (1, 4, 4), tmp_path).close()


# Fitted solvers


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("ridge", [1e-4, 1e-12])
def test_the_students_own_weights_are_found_again(process, ridge):
    """Teacher = DPM-Solver++ 2M, which is the prior: at any ridge. Another multistep method: without one."""
    times = ExponentialSchedule()(process, process.t_max, process.t_min, 6).tolist()
    plain = written(FittedSolver(), process, times)
    rows = [[1.0], [1.4, -0.4], [1.6, -0.7, 0.1], [1.2, -0.1, -0.1], [1.5, -0.6, 0.1], [1.1, -0.2, 0.1]]
    for plan in (plain,) if ridge == 1e-4 else (plain, fitted_plan(times, rows)):
        cohort, states = taught(process, 24, 7, plan)
        found = drained(sequential(cohort, process, times, 3, lambda t, at, n, s=states: s[t][at : at + n], ridge))
        wanted = [[*row, 0.0, 0.0][: min(i, 2) + 1] for i, row in enumerate(plan.solver.weights)]
        assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    "solver",
    [
        DPMSolverPP(order=3),
        UniPC(order=3),
        DEIS(points=3, variable="rho"),
        IPNDM(),
        GHVB(),
        ERSDE(phi="ode"),
        FittedSolver(),
    ],
    ids=lambda s: s.id,
)
@pytest.mark.parametrize("process", PROCESSES)
def test_linear_solvers_can_be_written_as_fitted_ones(process, solver):
    times = KarrasSchedule()(process, process.t_max, process.t_min, 7).tolist()
    made = batch(process, 3, 4)
    ends = [
        made(lambda problem, x, plan=plan: sample(problem, plan.solver, x, plan.times))
        for plan in (Plan(solver, times), written(solver, process, times))
    ]
    assert (ends[0] - ends[1]).abs().max() < 1e-9


@pytest.mark.parametrize("solver", [DDIM(eta=1.0), DPMSolverSinglestep()], ids=lambda s: s.id)
def test_other_solvers_cannot(solver):
    with pytest.raises(ValueError, match="is not a deterministic sampler with one network call"):
        written(solver, VE, KarrasSchedule()(VE, K_MAX, K_MIN, 7).tolist())


def test_the_end_alone_tells_the_weights():
    """Levenberg-Marquardt from 2M to a teacher that is another linear multistep method."""
    times = ExponentialSchedule()(VE, K_MAX, 0.2, 4).tolist()
    rows = [[1.0], [1.3, -0.3], [1.25, -0.35, 0.1], [1.05, -0.05, 0.0]]
    cohort, _ = taught(VE, 32, 3, fitted_plan(times, rows))
    family = Weights(tuple(times), 3)
    best = last(refine(cohort, family, family.theta(written(FittedSolver(), VE, times).solver.weights), LOSSES["rms"]))
    assert np.abs(best.theta - family.theta(rows)).max() < 1e-6


def test_thresholds_of_the_bench_mixture():
    """Spec 11.1, 4: 5 steps of Karras to 0.02, 64 seeds, H = 3; the report has 500 others."""
    times = KarrasSchedule()(VE, K_MAX, K_MIN, 6)[:-1].tolist()
    fine = sorted({*ExponentialSchedule()(VE, K_MAX, K_MIN, 400)[:-1].tolist(), *times}, reverse=True)
    plan = Plan(DPMSolverPP(order=3, lower_order_final="never"), fine)
    fit, states = taught(VE, 64, 11, plan)
    report, _ = taught(VE, 500, 99, plan)
    rows = drained(sequential(fit, VE, times, 3, lambda t, at, n: states[t][at : at + n]))
    family = Weights(tuple(times), 3)
    error = {
        name: drained(report.errors(p))
        for name, p in (("2M", written(FittedSolver(), VE, times)), ("LS", fitted_plan(times, rows)))
    }
    assert 0.12 < error["2M"].mean() < 0.19 and error["LS"].mean() <= 0.035
    best = last(refine(fit, family, family.theta(written(FittedSolver(), VE, times).solver.weights), LOSSES["rms"]))
    refined = drained(report.errors(best.plan))
    assert refined.mean() <= 0.04 and refined.median() <= 0.006 < error["LS"].median()


@pytest.mark.parametrize("process", [pytest.param(VE, id="ve"), pytest.param(FLOW, id="flow")])
def test_schedule_and_solver_searches(process):
    """What is returned is never worse than the best start on the samples that select, and better on others."""
    found = searched(
        ScheduleSearch(process, *cohorts_of(process, 24), starts(process, 5, DPMSolverPP()), solver=DPMSolverPP())
    )
    assert is_the_best(found)
    assert found.after.mean() < 0.75 * found.before.mean() and found.best.times != found.base.times
    solver = searched(SolverSearch(process, *cohorts_of(process, 24), starts(process, 5), samples=24, shape=(1, 4, 4)))
    assert is_the_best(solver)
    assert solver.after.mean() < 0.3 * solver.before.mean() and solver.after.median() < 0.1 * solver.before.median()
    assert solver.trajectories is None


def test_two_samplers_on_one_schedule_are_fitted_once():
    """What least squares give depends on the times alone; both samplers' own weights are another beginning."""
    search = SolverSearch(VE, *cohorts_of(VE, 8), {}, samples=8, shape=(1, 4, 4), teacher_steps=40)
    drained(search.teach())
    times = KarrasSchedule()(VE, K_MAX, K_MIN, 4).tolist()
    plans = {solver.id: written(solver, VE, times) for solver in (DPMSolverPP(), DEIS())}
    found = [ascent.label for ascent in search.ascents(plans) if ascent is not None]
    assert sorted(found) == ["DEIS", "DPMSolverPP", "DPMSolverPP, fitted"]


def test_both_kinds_of_model_give_the_same():
    """The same samples as VE and as a flow: the same schedule in noise-to-signal, the same weights."""
    made = []
    for process in (VE, FLOW):
        search = SolverSearch(process, *cohorts_of(process, 16), starts(process, 4), samples=16, shape=(1, 4, 4))
        run = search.run()
        for _ in run:
            if len(search.trials) >= 8:
                break
        search.release()
        made.append((process.rho(search.best.times[:-1]), search.best.solver.weights, search.trials))
    (k, w, t), (k2, w2, t2) = made
    assert np.allclose(k, k2, rtol=1e-4) and all(np.allclose(a, b, atol=1e-4) for a, b in zip(w, w2, strict=True))
    assert np.allclose([a.fit for a in t], [b.fit for b in t2], rtol=1e-3)


def test_a_search_goes_on_from_what_another_found():
    args = lambda: (*cohorts_of(VE, 24), starts(VE, 4))  # noqa: E731
    first = SolverSearch(VE, *args(), samples=24, shape=(1, 4, 4))
    for _ in first.run():
        if len(first.trials) > 5:
            break
    again = SolverSearch(VE, *args(), resumed=first.best, samples=24, shape=(1, 4, 4))
    reached = min(t.select for t in first.trials)
    for _ in again.run():
        if again.base is not None:  # before this no calibration ends, whatever the time
            break
    assert math.isclose(again.trials[0].select, reached, rel_tol=1e-9) and again.best is first.best
    assert again.base_label in again.starts and again.base is not again.best


@pytest.mark.parametrize("joint", [True, False])
def test_a_search_goes_on_from_all_that_another_found(joint):
    """Scales and offsets too: weights alone would not add up to 1."""
    times = ExponentialSchedule()(VE, K_MAX, 1.5 * K_MIN, 3).tolist()
    rows, scales = [[1.01], [1.4, -0.42], [1.2, -0.2]], [1.02, 0.98, 1.0]
    resumed = fitted_plan(times, rows, [0.0, 0.1, -0.1], scales)
    begun = {"plain": written(FittedSolver(), VE, times)}
    search = SolverSearch(
        VE, *cohorts_of(VE, 8), begun, resumed, joint=joint, rescale=True, decouple=True, samples=8, shape=(1, 4, 4)
    )
    for _ in search.run():
        if [trial.label for trial in search.trials].count("resumed") > 1:
            break
    search.release()
    first, again = (trial for trial in search.trials if trial.label == "resumed")
    assert again.select == pytest.approx(first.select, rel=1e-6)


# Degenerate data


POINT = GaussianMixture(
    torch.ones(1).double(), torch.full((1, 16), 0.3).double(), torch.zeros(1, 16).double(), torch.eye(16).double()[None]
)


@pytest.mark.parametrize("process", PROCESSES)
def test_data_of_one_point_leave_everything_as_it_is(process):
    for kind in (ScheduleSearch, SolverSearch):
        solver = {"solver": DPMSolverPP()} if kind is ScheduleSearch else {"samples": 6, "shape": (1, 4, 4)}
        begun = starts(process, 4, solver.get("solver"))
        found = searched(kind(process, *cohorts_of(process, 6, data=POINT), begun, **solver))
        assert found.best is found.base and found.after.max() < 1e-9


def test_no_change_of_predictions_keeps_the_prior():
    times = KarrasSchedule()(VE, K_MAX, K_MIN, 5).tolist()
    cohort, states = taught(VE, 6, 0, written(FittedSolver(), VE, times), data=POINT)
    rows = drained(sequential(cohort, VE, times, 4, lambda t, at, n: states[t][at : at + n]))
    wanted = written(FittedSolver(), VE, times).solver.weights
    assert all(np.allclose(a, b[: len(a)], atol=1e-6) for a, b in zip(rows, wanted, strict=True))


def test_an_isotropic_gaussian_stays_stable():
    """x, D and the teacher's state are collinear there: the Gram matrix is singular."""
    data = GaussianMixture.gaussian(0.0, 0.25, d=16)
    times = KarrasSchedule()(VE, K_MAX, K_MIN, 6).tolist()
    teacher = Trajectories(VE, 160, 16, (1, 4, 4), "")
    cohort = Cohort([batch(VE, 16, 0, data=data)])
    drained(teacher.teach(cohort))
    rows = drained(sequential(cohort, VE, times, 4, teacher.at))
    assert all(abs(w) < 20.0 for row in rows for w in row)
    before, after = (
        drained(cohort.errors(p)).mean() for p in (written(FittedSolver(), VE, times), fitted_plan(times, rows))
    )
    assert after < 0.1 * before


@pytest.mark.parametrize("kind", [ScheduleSearch, SolverSearch])
def test_one_step_and_identical_seeds(kind):
    options = {"solver": DDIM()} if kind is ScheduleSearch else {"samples": 4, "shape": (1, 4, 4)}
    for n in (1, 2):
        begun = starts(VE, n, options.get("solver"))
        found = searched(kind(VE, *cohorts_of(VE, 4, same=True), begun, **options))
        assert len(found.best.times) == n + 1 and found.after is not None
        if n == 1:
            assert found.best is found.base


def test_diverging_candidates_are_never_taken():
    """A network that gives NaN beyond some size."""
    denoise = MIXTURE.denoiser(VE)

    def fragile(x, t):
        return torch.where(x.abs().amax() > 60.0, torch.nan, denoise(x, t))

    def broken(seed):
        inner = batch(VE, 8, seed)
        return Cohort([lambda visit: inner(lambda problem, x: visit(Problem(fragile, VE), x))])

    made = [broken(seed) for seed in (1, 2, 3)]
    found = searched(SolverSearch(VE, *made, starts(VE, 4), samples=8, shape=(1, 4, 4)))
    assert found.after.isfinite().all() and all(math.isfinite(t.fit) for t in found.trials)


def test_a_network_that_gives_no_numbers_is_one_sentence():
    def broken(seed):
        inner = batch(VE, 4, seed)
        return Cohort([lambda visit: inner(lambda problem, x: visit(Problem(lambda x, t: x * torch.nan, VE), x))])

    search = ScheduleSearch(VE, *map(broken, (1, 2, 3)), starts(VE, 4, DDIM()), solver=DDIM())
    with pytest.raises(ValueError, match="samples of 40 steps are not finite numbers: lower cfg"):
        searched(search)


@dataclass(frozen=True)
class Diverging(DDIM):
    """Ends nowhere."""

    def step(self, *given):
        made = super().step(*given)
        return replace(made, x=made.x * torch.nan)


def test_where_no_start_is_finite_the_first_one_is_the_base():
    found = searched(ScheduleSearch(VE, *cohorts_of(VE, 4), starts(VE, 4, Diverging()), solver=Diverging()))
    assert found.base is found.best is found.starts[found.base_label] and not found.after.isfinite().any()


# The solver and its file


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({}, "must hold a list of sigmas"),
        ({"sigmas": [1.0, 0.5, 0.0], "weights": [[1.0]]}, "one more than lists"),
        ({"sigmas": [1.0, 0.5, 0.0], "weights": [[1.0], [0.9, 0.2]]}, "step 2 .* add up to 1"),
        ({"sigmas": [1.0, 0.5, 0.0], "weights": [[0.5, 0.5], [1.0]]}, "step 1 has at most 1"),
        ({"sigmas": [0.5, 1.0, 0.0], "weights": [[1.0], [1.0]]}, "decreasing"),
        ({"sigmas": "x", "weights": [[1.0]]}, "must hold a list of sigmas"),
    ],
)
def test_damaged_files_are_refused(table, words):
    with pytest.raises(ValueError, match=words):
        FittedSolver(Artifact(KIND, table))


def test_other_sigmas_are_refused_or_adapted():
    times = [10.0, 4.0, 1.0, 0.0]
    solver = fitted_plan(times, [[1.0], [1.3, -0.3], [1.2, -0.2]]).solver
    problem, x = Problem(MIXTURE.denoiser(VE), VE), torch.randn(2, 1, 4, 4).double()
    with pytest.raises(ValueError, match="fitted for 3 steps, and this run has 2"):
        sample(problem, solver, x, times[1:])
    with pytest.raises(ValueError, match="sigma 2 was given where it was fitted for 4"):
        sample(problem, solver, x, [10.0, 2.0, 1.0, 0.0])
    adapting = FittedSolver(solver.calibration, elsewhere="adapt")
    assert torch.allclose(sample(problem, adapting, x, times), sample(problem, solver, x, times), atol=1e-12)
    near = [10.0, 4.1, 0.98, 0.0]
    assert sample(problem, adapting, x, near).isfinite().all()
    assert len(list(solve(problem, adapting, x, [10.0, 6.0, 4.0, 2.0, 1.0, 0.0]))) == 5


def test_without_a_file_it_is_2m():
    times = KarrasSchedule()(VE, K_MAX, K_MIN, 7).tolist()
    problem, x = Problem(MIXTURE.denoiser(VE), VE), 14.6 * torch.randn(2, 1, 4, 4).double()
    same = sample(problem, DPMSolverPP(lower_order_final="never"), x, times)
    assert torch.allclose(sample(problem, FittedSolver(), x, times), same, atol=1e-12)


def test_one_sample_that_turns_over_does_not_rule_where_a_search_goes():
    """All others come nearer, and one that is in another picture goes a little further."""
    before, after = (torch.tensor([e] * 23 + [far]) for e, far in ((0.02, 0.8), (0.018, 0.9)))
    rms = LOSSES["rms"]
    assert rms(after) > rms(before) and rms.follow(after) < rms.follow(before)
    assert all(LOSSES[name].follow is LOSSES[name] for name in ("log", "mse"))
    assert LOSSES["log"].error(LOSSES["log"](torch.tensor([0.01, 0.04]))) == pytest.approx(0.02, rel=1e-3)
