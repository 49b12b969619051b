"""The race for a start noise, on pictures that are Gaussian given the input: the best noise is known."""

from __future__ import annotations

import itertools

import pytest
import torch
from quickstep_under_test.solvers.calibration.boundary import RANDOM, Race, Reference
from quickstep_under_test.solvers.calibration.families import Plan
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP
from quickstep_under_test.solvers.process import RectifiedFlow, VarianceExploding
from quickstep_under_test.solvers.solver import Problem, sample

VE = VarianceExploding(t_min=0.02, t_max=14.6)
FLOW = RectifiedFlow(t_min=0.003, t_max=1.0)
PROCESSES = pytest.mark.parametrize("process", [VE, FLOW], ids=["ve", "flow"])
D, STD = 6, 0.3


def draw(i: int) -> torch.Tensor:
    return torch.randn(1, D, generator=torch.Generator().manual_seed(100 + i), dtype=torch.float64)


def problem(process, mean: torch.Tensor) -> Problem:
    """Pictures N(mean, STD^2)."""

    def denoise(x, t):
        a, s = process.alpha(t), process.sigma(t)
        return mean + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * mean)

    return Problem(denoise, process)


def references(process, count: int, spread=STD, seed=7) -> list[Reference]:
    """Inputs with other means; what should come out is a picture of each, or its mean with spread 0."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        mean, apart = (torch.randn(1, D, generator=g, dtype=torch.float64) for _ in range(2))
        posed = problem(process, mean)

        def begin(noise, posed=posed):
            return lambda visit: visit(posed, process.sigma(process.t_max) * noise)

        found.append(Reference(mean + spread * apart, begin))
    return found


def plan(process, steps=3, solver=None) -> Plan:
    times = [process.t_max, *(process.t_max * 0.3**i for i in range(1, steps)), 0.0]
    return Plan(solver or DDIM(), times)


def run(race: Race, visits: int | None = None) -> Race:
    assert sum(1 for _ in itertools.islice(race.run(), visits)) in (visits, race.visits)
    return race


def brute(race: Race) -> list[float]:
    """The mean RMS of every candidate on all references, each run for itself."""
    losses = []
    for i in range(race.candidates):
        apart = [
            (r.begin(race.draw(i))(lambda posed, x: sample(posed, *_of(race.plan, x))) - r.x0).square().mean().sqrt()
            for r in race.references
        ]
        losses.append(float(torch.stack(apart).mean()))
    return losses


def _of(plan: Plan, x):
    return plan.solver, x, plan.times


@PROCESSES
@pytest.mark.parametrize("solver", [DDIM(), DPMSolverPP()], ids=["DDIM", "2M"])
def test_without_eliminations_the_winner_is_that_of_brute_force(process, solver):
    race = run(Race(references(process, 5), plan(process, 4, solver), draw, 24, few=5, together=7))
    losses = brute(race)
    assert race.best == losses.index(min(losses)) and race.rungs() == [(24, 5)]
    assert [race.loss(i) for i in range(24)] == pytest.approx(losses, rel=1e-12)
    assert race.trail[-1].loss == pytest.approx(min(losses), rel=1e-12)
    assert race.runs.calls == 24 * 5 * 4 == race.trail[-1].calls


def test_the_best_noise_is_the_one_whose_end_is_the_conditional_mean():
    """Where a flow model's references are the means, the error is that of the norm alone: 0 for no noise, else by length."""
    zero = {11: torch.zeros(1, D, dtype=torch.float64)}
    race = run(Race(references(FLOW, 4, spread=0.0), plan(FLOW), lambda i: zero.get(i, draw(i)), 20, few=4))
    assert race.best == 11 and race.loss(11) < 1e-12
    norms = [float(zero.get(i, draw(i)).norm()) for i in range(20)]
    assert sorted(range(20), key=race.loss) == sorted(range(20), key=lambda i: norms[i])
    ratio = [race.loss(i) / norms[i] for i in range(20) if i != 11]
    assert max(ratio) == pytest.approx(min(ratio), rel=1e-9)


def test_the_race_runs_few_on_many_and_nothing_twice():
    race = Race(references(FLOW, 64), plan(FLOW, 2), draw, 64, few=4, keep=0.25, together=8)
    assert race.rungs() == [(64, 4), (16, 16), (4, 64)]
    run(race)
    assert race.runs.calls == 2 * (64 * 4 + 16 * 12 + 4 * 48)
    known = sorted(map(len, race.errors.values()))
    assert known == [4] * 48 + [16] * 12 + [64] * 4
    finalists = [i for i in race.errors if len(race.errors[i]) == 64]
    losses = brute(race)
    assert race.best == min(finalists, key=lambda i: losses[i])
    first = [sum(e[:4]) for e in race.errors.values()]  # the best quarter of the first rung is who went on
    went = {i for i in race.errors if len(race.errors[i]) > 4}
    assert went == set(sorted(range(64), key=dict(zip(race.errors, first, strict=True)).get)[:16])
    assert [seen.references for seen in race.trail] == [4] * 8 + [16] * 2 + [64]


@pytest.mark.parametrize(
    ("candidates", "every", "few", "keep", "rungs"),
    [
        (1, 1, 4, 0.25, [(1, 1)]),
        (1, 9, 4, 0.25, [(1, 4)]),
        (64, 10, 4, 0.25, [(64, 4), (16, 10)]),
        (5, 64, 1, 0.25, [(5, 1), (2, 4)]),
        (8, 8, 2, 0.5, [(8, 2), (4, 4), (2, 8)]),
        (3, 5, 2, 0.9, [(3, 2), (3, 3), (3, 4), (3, 5)]),
    ],
)
def test_rungs_end_with_one_candidate_or_all_references(candidates, every, few, keep, rungs):
    assert Race(references(FLOW, every), plan(FLOW), draw, candidates, few, keep).rungs() == rungs


def test_left_after_any_visit_it_has_the_best_so_far():
    whole = Race(references(FLOW, 6), plan(FLOW, 2), draw, 12, few=2, keep=0.5, together=5)
    for visits in range(1, whole.visits + 1):
        race = run(Race(whole.references, whole.plan, draw, 12, few=2, keep=0.5, together=5), visits)
        most = max(map(len, race.errors.values()))
        able = {i: sum(e) for i, e in race.errors.items() if len(e) == most}
        assert race.best == min(able, key=able.get)
        first = min(2, most)
        ran = [sum(e[:first]) / first for e in race.errors.values() if len(e) >= first]
        assert race.tried == pytest.approx(sorted(ran), rel=1e-6)
    assert Race(whole.references, whole.plan, draw, 12).best is None
    assert list(run(whole).errors[whole.best]) == race.errors[race.best]


def test_one_candidate_one_reference_and_references_that_are_the_same():
    one = run(Race(references(FLOW, 1), plan(FLOW, 2), draw, 1, together=9))
    assert one.best == 0 and one.visits == 1
    same = references(VE, 1) * 7
    race = run(Race(same, plan(VE), draw, 16, few=2))
    alone = run(Race(same[:1], plan(VE), draw, 16))
    assert race.best == alone.best and race.loss(race.best) == pytest.approx(alone.loss(alone.best))


def test_noise_that_is_no_number_never_wins():
    def broken(i):
        return draw(i) if i % 3 else draw(i) * float("nan")

    race = run(Race(references(FLOW, 5), plan(FLOW), broken, 9, few=2))
    assert race.best % 3 and race.loss(0) == float("inf")


def test_on_references_kept_aside_it_is_compared_with_noises_that_did_not_take_part():
    race = run(Race(references(FLOW, 3), plan(FLOW), draw, 10, few=3))
    aside, errors = references(FLOW, 2, seed=8), None
    comparing = race.compared(aside)
    visits = 0
    while errors is None:
        try:
            next(comparing)
            visits += 1
        except StopIteration as end:
            errors = end.value
    assert errors.shape == (1 + RANDOM, 2) and visits == 2 * 3  # nine noises, four together
    others = Race(aside, race.plan, lambda i: draw([race.best, *range(10, 10 + RANDOM)][i]), 1 + RANDOM)
    assert errors.mean(1).tolist() == pytest.approx(brute(others), rel=1e-6)
