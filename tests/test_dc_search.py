"""DC-Solver's ratios: the search on problems whose answer is known, and the cascade through several of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quickstep_under_test.solvers.artifact import Artifact, FoundFor
from quickstep_under_test.solvers.calibration.cohort import Cohort
from quickstep_under_test.solvers.calibration.dc_search import Ratios, RatioSearch, fitted_cascade, ratios_of
from quickstep_under_test.solvers.calibration.families import Plan
from quickstep_under_test.solvers.calibration.levenberg import refine
from quickstep_under_test.solvers.calibration.losses import LOSSES
from quickstep_under_test.solvers.dc_solver import KIND, DCSolver, cascade
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DPMSolverPP
from quickstep_under_test.solvers.process import RectifiedFlow, VarianceExploding
from quickstep_under_test.solvers.schedules import KarrasSchedule
from quickstep_under_test.solvers.solver import Problem, sample
from quickstep_under_test.solvers.unipc import UniPC

K_MAX, K_MIN = 14.6, 0.02
VE = VarianceExploding(t_min=K_MIN, t_max=K_MAX)
FLOW = RectifiedFlow(t_min=K_MIN / (1 + K_MIN), t_max=K_MAX / (1 + K_MAX))
NOISE = RectifiedFlow(t_min=0.003, t_max=1.0)
PROCESSES = [pytest.param(VE, id="ve"), pytest.param(FLOW, id="flow"), pytest.param(NOISE, id="pure noise")]


def mixture(components: int = 12, std: float = 0.15) -> GaussianMixture:
    """The spec's bench mixture."""
    m = torch.from_numpy(np.random.default_rng(1).standard_normal((components, 16)) * 0.9)
    one, eye = torch.full((components,), 1.0 / components).double(), torch.eye(16).double()
    return GaussianMixture(one, m, torch.full((components, 16), std**2).double(), eye.expand(components, 16, 16))


def batch(process, rows: int, seed: int, data: GaussianMixture):
    x = torch.randn(rows, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    k = 1.0 if process.alpha(process.t_max) == 0.0 else K_MAX * process.alpha(process.t_max)
    problem = Problem(data.denoiser(process), process)
    return lambda visit: visit(problem, k * x)


def searched(process=VE, inner=None, steps: int = 5, data: GaussianMixture | None = None, **options) -> RatioSearch:
    data = data or mixture()
    times = KarrasSchedule()(process, process.t_max, process.t_min, steps).tolist()
    sets = [Cohort([batch(process, rows, seed, data)]) for rows, seed in ((32, 1), (32, 2), (300, 3))]
    search = RatioSearch(process, *sets, {"plain": Plan(DCSolver(inner or UniPC()), times)}, **options)
    for _ in search.run():
        pass
    return search


@pytest.mark.parametrize("process", PROCESSES)
def test_natural_coordinates_are_ratios_of_the_steps_that_have_one(process):
    times = tuple(KarrasSchedule()(process, process.t_max, process.t_min, 6).tolist())
    family = Ratios(DCSolver(UniPC()), times)
    assert family.since == [2, 3, 4, 5] and len(family.delta) == 4
    eta = np.array([0.7, 1.0, 1.3, 1.45])
    plan = family.plan(eta)
    assert ratios_of(plan) == [1.0, 1.0, *eta] and np.allclose(family.natural(family.theta(plan)), eta)
    theta, h = np.array([0.3, -0.2, 0.0, 1.0]), 1e-6
    for q in range(4):
        move = h * np.eye(4)[q]
        assert np.allclose(
            (family.natural(theta + move) - family.natural(theta - move)) / (2 * h), family.slope(theta)[:, q]
        )
    assert (np.abs(family.natural(np.full(4, 50.0)) - 1.0) <= 0.5).all()


@pytest.mark.parametrize("process", PROCESSES)
def test_ratios_of_one_are_the_sampler_as_it_is(process):
    times = tuple(KarrasSchedule()(process, process.t_max, process.t_min, 6).tolist())
    plan, made = Ratios(DCSolver(UniPC()), times).plan(np.ones(4)), batch(process, 4, 0, mixture())
    a, b = (made(lambda problem, x, s=s: sample(problem, s, x, times)) for s in (plan.solver, UniPC()))
    assert torch.equal(a, b)


def test_the_ratios_of_a_teacher_are_found_again():
    """Teacher: the same sampler with ratios."""
    times = tuple(KarrasSchedule()(VE, K_MAX, K_MIN, 5).tolist())
    family, eta = Ratios(DCSolver(UniPC()), times), np.array([0.9, 1.12, 0.95])
    made = batch(VE, 32, 5, mixture())
    plan = family.plan(eta)
    cohort = Cohort([made], [made(lambda problem, x: sample(problem, plan.solver, x, plan.times))])
    found = [c for c in refine(cohort, family, np.zeros(3), LOSSES["rms"]) if c is not None]
    assert np.abs(np.array(ratios_of(found[-1].plan)[2:]) - eta).max() < 1e-3


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("inner", [UniPC(), DPMSolverPP()], ids=lambda s: s.id)
def test_the_joint_search_is_not_worse_than_the_sampler_as_it_is(process, inner):
    """Spec 11.1, 5, on 300 samples kept aside; at 5 steps it is much better."""
    found = searched(process, inner)
    assert found.after.mean() < 0.9 * found.before.mean() and not found.unworthy
    made = found.extra()
    assert made["ratios"][:2] == [1.0, 1.0] and made["ratios"] == ratios_of(found.best) and made["dc_order"] == 2


def test_data_of_one_point_leave_all_ratios_at_one():
    found = searched(data=mixture(1, 0.0))
    assert found.best is found.base and found.unworthy and ratios_of(found.best) == [1.0] * 5


@pytest.mark.parametrize("steps", [1, 2])
def test_without_a_compensated_step_there_is_nothing_to_find(steps):
    found = searched(steps=steps)
    assert found.best is found.base and found.unworthy


def test_ratios_that_fail_on_samples_kept_aside_are_unworthy():
    found = searched()
    found.after = found.before * 1.01
    assert found.unworthy
    found.after = found.before * 0.99
    assert not found.unworthy


def test_a_search_goes_on_from_ratios():
    times = KarrasSchedule()(VE, K_MAX, K_MIN, 5).tolist()
    first = searched()
    again = searched(resumed=Plan(DCSolver(UniPC(), ratios=", ".join(map(repr, ratios_of(first.best)))), times))
    reached = min(t.select for t in first.trials)
    assert min(t.select for t in again.trials) <= reached * (1 + 1e-9) and again.base_label == "plain"


# The cascade


def artifacts(numbers, steps=(5, 7, 10), scales=(2.0, 4.0, 7.0), **changed) -> list[Artifact]:
    then = {"model": "m", "process": "ve", "solver": "UniPC", "settings": {"order": 2}, "shape": (1, 4, 4), **changed}
    return [
        Artifact(KIND, {"ratios": cascade(numbers, w, n), "dc_order": 2}, {}, FoundFor(**then, cfg=w, steps=n))
        for n in steps
        for w in scales
    ]


def numbers() -> np.ndarray:
    made = np.random.default_rng(0).normal(size=(4, 3, 3)) * 0.1
    made[0, 2, 2] += 1.0
    return made


def test_a_cascade_goes_through_ratios_that_are_one():
    made = fitted_cascade(artifacts(numbers()))
    assert made.table["off"] < 1e-9 and made.table["range"] == {"steps": [5, 10], "cfg": [2.0, 7.0]}
    for n, w in ((5, 2.0), (7, 4.0), (10, 7.0)):
        assert np.allclose(cascade(made.table["cascade"], w, n), cascade(numbers(), w, n), atol=1e-9)
    assert np.allclose(
        cascade(made.table["cascade"], 3.0, 8), cascade(numbers(), 3.0, 8), atol=1e-6
    )  # between them too
    solver = DCSolver(UniPC(), made)
    assert solver.ratios_at(4.0, 7) == pytest.approx(cascade(numbers(), 4.0, 7))
    assert made.found_for.solver == "UniPC" and made.found_for.steps is None and made.found_for.cfg is None


def test_few_searches_of_no_compensation_give_none_anywhere():
    none = np.zeros((4, 3, 3))
    none[0, 2, 2] = 1.0
    made = fitted_cascade(artifacts(none, (5, 8), (2.0, 4.0)))
    assert np.allclose(made.table["cascade"], none, atol=1e-12)


def test_what_does_not_belong_together_is_refused():
    some = artifacts(numbers())
    for changed in ({"model": "other"}, {"solver": "DPMSolverPP"}, {"settings": {"order": 3}}, {"shape": (1, 8, 8)}):
        with pytest.raises(ValueError, match=f"do not belong together: their {next(iter(changed))} differs"):
            fitted_cascade([*some, *artifacts(numbers(), (6,), (3.0,), **changed)])
    other = Artifact(KIND, {**some[0].table, "dc_order": 1}, {}, some[0].found_for)
    with pytest.raises(ValueError, match="their dc_order differs"):
        fitted_cascade([*some, other])
    with pytest.raises(ValueError, match="these are for steps 5 and CFG 2, 4"):
        fitted_cascade(artifacts(numbers(), (5,), (2.0, 4.0)))
    with pytest.raises(ValueError, match="these are for steps none and CFG none"):
        fitted_cascade([])
