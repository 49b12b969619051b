"""Schedules from one measurement: dynamic programs against all ways, exact values of the bound, and what degenerate data give."""

from __future__ import annotations

import json
from functools import cache
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from quickstep_under_test.solvers.calibration import proposal as proposals
from quickstep_under_test.solvers.calibration import teacher as teachers
from quickstep_under_test.solvers.calibration.ays import AlignYourStepsOnModel
from quickstep_under_test.solvers.calibration.boss import BOSS
from quickstep_under_test.solvers.calibration.cohort import Cohort
from quickstep_under_test.solvers.calibration.curvature import Curvature, derivative, equidistributed
from quickstep_under_test.solvers.calibration.families import Plan
from quickstep_under_test.solvers.calibration.gits import GITS, deviations, distances
from quickstep_under_test.solvers.calibration.grams import gram, spread, trajectories
from quickstep_under_test.solvers.calibration.klub import chains, descend, drawn, normalizer, table, triples
from quickstep_under_test.solvers.calibration.library import again
from quickstep_under_test.solvers.calibration.oss import OptimalSteps
from quickstep_under_test.solvers.calibration.paths import cheapest, packed, unpacked
from quickstep_under_test.solvers.calibration.proposal import ProposalSearch, blended
from quickstep_under_test.solvers.calibration.teacher import Trajectories, teach
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP
from quickstep_under_test.solvers.process import VarianceExploding
from quickstep_under_test.solvers.schedules import ExponentialSchedule, KarrasSchedule

from .test_calibration import (
    FLOW,
    K_MAX,
    K_MIN,
    NOISE,
    POINT,
    PROCESSES,
    VE,
    batch,
    cohorts_of,
    drained,
    is_the_best,
    starts,
)

USUAL = {"Karras": KarrasSchedule(), "Exponential": ExponentialSchedule()}
WIDE = VarianceExploding(t_min=0.002, t_max=80.0)
C = 0.5
SMALL = {
    AlignYourStepsOnModel: {"levels": 20, "draws": 1},
    GITS: {"levels": 20},
    OptimalSteps: {"levels": 12, "images": 3},
    BOSS: {"levels": 20},
    Curvature: {"levels": 20},
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(teachers, "MOST", 80)


ALL = [pytest.param(method(**SMALL[method]), id=method.id) for method in SMALL]


def final(measuring):
    """The last measurement, as a file gives it back."""
    return json.loads(json.dumps([found for found in measuring if found is not None][-1]))


def watched(process, rows: int, seed: int = 1, steps: int = 40, **options) -> tuple[Cohort, Trajectories]:
    """A cohort with its targets, and the teacher's states."""
    cohort = Cohort([batch(process, rows, seed, **options)])
    teacher = Trajectories(process, steps, rows, (1, 4, 4), "")
    drained(teacher.teach(cohort))
    return cohort, teacher


def search(process, proposal, steps: int, solver, rows: int = 6, **options) -> ProposalSearch:
    fit, select, _ = cohorts_of(process, rows, **options)
    made = ProposalSearch(
        process, fit, select, Cohort([batch(process, 20, 3, **options)]), starts(process, steps, solver), solver=solver,
        proposal=proposal, schedules=USUAL, samples=rows, shape=(1, 4, 4),
    )  # fmt: skip
    for _ in made.run():
        pass
    made.release()
    return made


@cache
def others(rows: int = 200) -> Cohort:
    cohort = Cohort([batch(VE, rows, 3)])
    drained(teach(cohort, VE, 160))
    return cohort


def errors(solver, times) -> torch.Tensor:
    return drained(others().errors(Plan(solver, times)))


# The dynamic program


@pytest.mark.parametrize("gamma", [0.8, 1.0, 1.15])
def test_the_cheapest_way_is_that_of_all_ways(gamma):
    g = np.random.default_rng(0)
    for n in (1, 2, 4, 11):
        cost = g.normal(size=(12, 12))
        ways = [(0, *inner, 11) for inner in combinations(range(1, 11), n - 1)]
        price = [sum(gamma**k * cost[i, j] for k, (i, j) in enumerate(pairwise(w))) for w in ways]
        assert cheapest(cost, n, gamma) == list(ways[int(np.argmin(price))])


def test_impossible_numbers_of_jumps_are_refused():
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"ways of 1 to 3 jumps over 4 levels, not of {n}"):
            cheapest(np.ones((4, 4)), n)


def test_costs_survive_a_file():
    cost = np.triu(np.random.default_rng(0).normal(size=(5, 5)), 1)
    assert np.allclose(unpacked(packed(cost), 5), cost, rtol=1e-5) and len(packed(cost[:4])) == 4


@pytest.mark.parametrize("method", [GITS(levels=11), GITS(levels=11, metric="l2", gamma=1.0), BOSS(levels=11)], ids=str)
def test_schedules_are_the_cheapest_of_all_on_the_measured_levels(method):
    """Spec 11.1, 14: 12 levels, 4 steps, against all ways, with costs computed from runs."""
    cohort, teacher = watched(VE, 5)
    measured = final(method.measure(cohort, VE, teacher, 4))
    t = measured["sigmas"]
    x = [torch.cat([teacher.x.get(i, 0, 5)]).double() for i in spread(teacher, 11)] + cohort.targets
    u = (x[0] - x[-1]).flatten(1)
    cost = np.zeros((12, 12))

    def off(p):
        p = (p - x[-1]).flatten(1)
        return (p - u * ((p * u).sum(1) / u.square().sum(1))[:, None]).square().mean(1).sqrt()

    denoise = batch(VE, 1, 0)(lambda problem, x: problem.denoise)
    for i, j in combinations(range(12), 2):
        jump = x[i] + (t[j] - t[i]) / t[i] * (x[i] - denoise(x[i], t[i]))
        apart = (jump - x[j]).flatten(1).square().mean(1)
        if method.id == "BOSS":
            cost[i, j] = float(apart.mean()) / (1.0 + t[j]) ** 2
        elif method.metric == "l2":
            cost[i, j] = float(apart.sqrt().mean())
        else:
            cost[i, j] = float((off(jump) - (off(x[j]) if j < 11 else 0.0)).mean())
    assert np.allclose(unpacked(measured["cost"], 12), cost, rtol=1e-3, atol=1e-4 * np.abs(cost).max())
    gamma = getattr(method, "gamma", 1.0)
    ways = [(0, *inner, 11) for inner in combinations(range(1, 11), 3)]
    price = [sum(gamma**k * cost[i, j] for k, (i, j) in enumerate(pairwise(w))) for w in ways]
    made = method.times(measured, VE, 4, 1)
    assert made == [t[i] for i in ways[int(np.argmin(price))]]


def test_a_larger_gamma_moves_sigmas_to_low_noise():
    cohort, teacher = watched(VE, 8)
    measured = final(GITS().measure(cohort, VE, teacher, 6))
    second = [GITS(gamma=g).times(measured, VE, 6, 1)[1] for g in (0.8, 1.0, 1.2, 1.5)]
    assert second == sorted(second, reverse=True) and second[0] > 1.5 * second[-1]


def test_both_kinds_of_model_have_the_same_costs():
    """Seen as a flow, the same samples give the same distances in x / alpha, and the same schedule in noise-to-signal."""
    G, times = {}, {}
    for process in (VE, FLOW):
        cohort, teacher = watched(process, 3)
        times[process] = [*(teacher.plan.times[i] for i in spread(teacher, 15)), 0.0]
        G[process] = list(trajectories(cohort, teacher, spread(teacher, 15)))
        for method in (GITS(levels=15), BOSS(levels=15), Curvature(levels=16), OptimalSteps(levels=12, images=2)):
            made = method.times(final(method.measure(cohort, process, teacher, 4)), process, 4, 1)
            times[process, method.id] = process.rho(made[1:-1])
    for a, b in zip(G[VE], G[FLOW], strict=True):
        assert np.allclose(distances(VE, times[VE], a), distances(FLOW, times[FLOW], b), rtol=1e-3, atol=1e-5)
        for one, other in zip(deviations(VE, times[VE], a), deviations(FLOW, times[FLOW], b), strict=True):
            assert np.allclose(one, other, rtol=1e-3, atol=1e-3)
    for method in ("GITS", "BOSS", "Curvature", "OptimalSteps"):
        assert np.allclose(times[VE, method], times[FLOW, method], rtol=1e-3)


def test_straight_trajectories_have_no_deviation_and_l2_is_taken():
    data = GaussianMixture.gaussian(0.0, C**2, d=16)
    for process in (VE, NOISE):
        cohort, teacher = watched(process, 3, data=data)
        dev, l2 = (final(GITS(metric=m).measure(cohort, process, teacher, 4)) for m in ("dev", "l2"))
        assert dev == l2


def test_inner_products_keep_small_differences():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 200_000, generator=g) * 100.0 + torch.tensor([[0.0], [1e-3]])
    G = gram(rows)
    exact = float((rows[0].double() - rows[1].double()).square().mean())
    assert G[0, 0] + G[1, 1] - 2 * G[0, 1] == pytest.approx(exact, rel=1e-2)


# OptimalSteps


@pytest.mark.parametrize("process", PROCESSES)
def test_two_steps_are_the_best_of_all(process):
    """With two steps there is one state per level, so the way is exact (spec 2.4)."""
    cohort, teacher = watched(process, 4)
    method = OptimalSteps(levels=8, images=4)
    measured = final(method.measure(cohort, process, teacher, 2))
    t = measured["sigmas"]
    off = torch.stack([drained(cohort.errors(Plan(DDIM(), [t[0], t[i], 0.0]))) for i in range(1, 8)])
    assert [ways[0][1] for ways in measured["ways"]] == [1 + int(i) for i in off.argmin(0)]


def test_a_beam_that_keeps_everything_finds_the_best_way():
    """A greedy one need not: here it does not for some sample."""
    cohort, teacher = watched(VE, 24, seed=5)
    measured = {}
    for beam in (1, 8):
        method = OptimalSteps(levels=8, images=24, beam=beam)
        measured[beam] = final(method.measure(cohort, VE, teacher, 3))
    t = measured[1]["sigmas"]
    ways = [[0, *inner, 8] for inner in combinations(range(1, 8), 2)]
    off = torch.stack([drained(cohort.errors(Plan(DDIM(), [t[i] for i in way]))) for way in ways])
    least = off.min(0).values
    reached = {
        beam: torch.stack([off[ways.index(sample[-1]), r] for r, sample in enumerate(measured[beam]["ways"])])
        for beam in measured
    }
    assert torch.allclose(reached[8], least) and (reached[1] >= least).all() and (reached[1] > least * 1.01).any()


def test_no_state_is_kept_that_no_jump_forward_reaches():
    """1 call for the start; 7 levels with one state each; then 1 at level 2, which has one way to it, and 2 at the other 5."""
    cohort, teacher = watched(VE, 3)
    before = cohort.calls
    measured = final(OptimalSteps(levels=8, images=3, beam=2).measure(cohort, VE, teacher, 3))
    assert cohort.calls - before == 3 * (1 + 7 + 11)
    assert all(a < b for ways in measured["ways"] for way in ways for a, b in pairwise(way))


def test_the_schedule_is_the_median_over_samples():
    method, t = OptimalSteps(), [8.0, 4.0, 2.0, 1.0, 0.5, 0.0]
    ways = [[[0, 1, 5], [0, 1, 2, 5]], [[0, 2, 5], [0, 1, 3, 5]], [[0, 4, 5], [0, 3, 4, 5]]]
    made = VarianceExploding(t_min=0.5, t_max=8.0)
    assert method.times({"sigmas": t, "ways": ways}, made, 2, 1) == pytest.approx([8.0, 2.0, 0.0])
    assert method.times({"sigmas": t, "ways": ways[:2]}, made, 3, 1) == pytest.approx([8.0, 4.0, 2.0**0.5, 0.0])
    with pytest.raises(ValueError, match="measured for at most 3 steps, not for 4"):
        method.times({"sigmas": t, "ways": ways}, made, 4, 1)


# Align Your Steps


def exact(low, middles, high):
    """The bound on Gaussian data, up to a factor."""
    return np.array([normalizer(low, m, C) + normalizer(m, high, C) for m in middles])
    yield


def divergence(t: np.ndarray) -> float:
    """Exact, per dimension, of Euler steps on Gaussian data: spec 11.1, G1."""
    rising = t[::-1]
    factor = np.prod([(a * b + C**2) / (b**2 + C**2) for a, b in pairwise(rising)])
    v, v0 = factor**2 * (rising[-1] ** 2 + C**2), rising[0] ** 2 + C**2
    return 0.5 * float(np.log(v / v0) + v0 / v - 1.0)


def optimum(high: float, low: float, n: int) -> np.ndarray:
    """Uniform in log(t / sqrt(t^2 + c^2))."""
    q = np.exp(np.linspace(*(np.log(t / np.hypot(t, C)) for t in (high, low)), n + 1))
    return C * q / np.sqrt(1.0 - q * q)


def test_normalizer_and_exact_triples():
    """Spec 11.1, 1."""
    assert normalizer(0.1, 0.5, C) == pytest.approx(75.48040514, rel=1e-9)
    triple = 3 * C**4 * drained(exact(0.1, [0.12, 0.2, 0.3, 0.45], 0.5))
    assert np.allclose(triple, [9.0475, 3.9694, 6.3094, 12.2815], rtol=1e-4)
    t = [drawn(0.1, 0.5, C, u) for u in (np.arange(4000) + 0.5) / 4000]
    for edge in (0.12, 0.2, 0.35):
        density = np.linspace(0.1, edge, 20001)
        part = np.trapezoid(density**-3 * (1 / (density**2 + C**2) - 1 / (0.25 + C**2)), density)
        assert np.mean(np.array(t) < edge) == pytest.approx(part / normalizer(0.1, 0.5, C), abs=2e-3)


@pytest.mark.parametrize("process", [pytest.param(VE, id="ve"), pytest.param(FLOW, id="flow")])
def test_the_estimator_has_the_exact_values(process):
    data, g = GaussianMixture.gaussian(0.0, C**2, d=16), torch.Generator().manual_seed(0)
    cohort = Cohort([batch(process, 64, seed, data=data) for seed in (1, 2)])
    cohort.targets = [C * torch.randn(64, 1, 4, 4, generator=g, dtype=torch.float64) for _ in range(2)]
    got = 3 * drained(triples(cohort, process, 0.1, np.array([0.12, 0.2, 0.3, 0.45]), 0.5, C, 12))
    assert np.allclose(got, [9.0475, 3.9694, 6.3094, 12.2815], rtol=0.02)


def test_the_table_has_the_exact_values():
    """From exact differences to quadrature; from noised samples to their spread."""
    k = np.exp(np.linspace(np.log(K_MIN), np.log(K_MAX), 120))
    inverse = 1.0 / (k**2 + C**2)
    K = table(k, np.abs(inverse[:, None] - inverse[None]))
    assert K[20, 70] == pytest.approx(normalizer(k[20], k[70], C), rel=2e-3)
    assert not np.tril(K).any()
    data, g = GaussianMixture.gaussian(0.0, C**2, d=16), torch.Generator().manual_seed(0)
    for process in (VE, FLOW):
        cohort = Cohort([batch(process, 64, 1, data=data)])
        cohort.targets = [C * torch.randn(64, 1, 4, 4, generator=g, dtype=torch.float64)]
        few = k[::12]
        squares = drained(chains(cohort, process, few.tolist(), 4))
        wanted = C**4 * np.abs(np.subtract.outer(1 / (few**2 + C**2), 1 / (few**2 + C**2)))
        assert np.allclose(squares, wanted, rtol=0.1, atol=1e-12)
        assert cohort.calls == 64 * 10 * 4


def test_the_descent_ends_at_the_exact_optimum_of_the_bound():
    """Spec 11.1, 2: uniform in log(t / sqrt(t^2 + c^2)), and what that is worth."""
    y = np.log(KarrasSchedule()(WIDE, 80.0, 0.002, 7)[:-1])
    assert divergence(np.exp(y)) == pytest.approx(0.282, rel=0.01)
    assert divergence(np.exp(np.linspace(*np.log([80.0, 0.002]), 7))) == pytest.approx(0.253, rel=0.01)
    assert divergence(C * np.tan(np.linspace(*np.arctan([80.0 / C, 0.002 / C]), 7))) == pytest.approx(0.0485, rel=0.01)
    best = optimum(80.0, 0.002, 6)
    assert divergence(best) == pytest.approx(1.854, rel=0.01)
    run = descend(y, exact)
    for _ in range(60):
        y = next(run)
    assert np.abs(np.exp(y) / best - 1.0).max() < 1e-4
    coarse = np.exp(np.linspace(np.log(0.002), np.log(80.0), 60))
    inverse = 1.0 / (coarse**2 + C**2)
    falling = table(coarse, np.abs(inverse[:, None] - inverse[None]))[::-1, ::-1].T
    found = coarse[::-1][cheapest(falling, 6)]
    assert np.abs(np.log(found / best)).max() < np.log(coarse[1] / coarse[0])


@pytest.mark.parametrize("steps", [5, 12])
def test_the_papers_descent(steps):
    """A sweep lowers the bound; from 10 steps to 20 the old sigmas stay; fewer steps than measured are refused."""
    cohort = Cohort([batch(VE, 16, 1)])
    drained(teach(cohort, VE, 40))
    method = AlignYourStepsOnModel(mode="sampled", draws=1, sweeps=2)
    found = [m for m in method.measure(cohort, VE, None, steps) if m is not None]
    assert len(found) == (2 if steps == 5 else 4)
    made = method.times(found[-1], VE, steps, 1)
    assert len(made) == steps + 1 and (np.diff(made) < 0).all() and made[0] == K_MAX and made[-1] == 0.0
    if steps == 12:
        assert found[-1]["log_ratio"][::2] == found[1]["log_ratio"] != found[0]["log_ratio"]
    with pytest.raises(ValueError, match=f"measured for {min(steps, 10)} steps or more, not for 4"):
        method.times(found[-1], VE, 4, 1)


# Curvature


def test_derivatives_are_exact_on_polynomials():
    y = np.sort(np.random.default_rng(0).uniform(-3.0, 2.0, 20))[::-1]
    for p, slope in ((1, 2 * y), (2, np.full(20, 2.0)), (3, np.zeros(20))):
        assert np.allclose(derivative(y, p) @ y**2, slope, atol=1e-6)


def test_steps_are_as_short_as_the_density_is_high():
    y = np.linspace(3.0, -2.0, 50)
    even = equidistributed(y, np.ones(50), 7, 2.0)
    assert np.allclose(np.diff(even), -5.0 / 7)
    assert np.allclose(equidistributed(y, np.zeros(50), 7, 2.0), even)
    ramp = equidistributed(y, 1.0 / (4.0 + y), 4, 100.0)  # dn ~ dy / (4 + y): uniform in log(4 + y)
    assert np.allclose(ramp, np.exp(np.linspace(np.log(7.0), np.log(2.0), 5)) - 4.0, atol=1e-3)
    peak = 1.0 + 100.0 * np.exp(-((y - 0.5) ** 2) / 0.02)
    for ratio in (1.4, 2.0):
        lengths = -np.diff(equidistributed(y, peak, 12, ratio))
        neighbours = lengths[1:] / lengths[:-1]
        assert max(neighbours.max(), 1.0 / neighbours.min()) < ratio * 1.15
        assert lengths.max() > 1.5 * lengths.min()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_density_is_the_right_root_of_the_size(order):
    y = np.linspace(np.log(K_MAX), np.log(K_MIN), 60)
    sizes = [((1.0 / (6.0 + y)) ** (p + 1)).tolist() for p in (1, 2, 3)]
    for method, asked in ((Curvature(ratio=100.0), order), (Curvature(ratio=100.0, order=order), 5)):
        made = method.times({"log_ratio": y.tolist(), "size": sizes}, VE, 4, asked)
        wanted = np.exp(np.exp(np.linspace(np.log(6.0 + y[0]), np.log(6.0 + y[-1]), 5)) - 6.0)
        assert np.allclose(made[:-1], wanted[:-1], rtol=1e-2)


def test_curvature_is_that_of_a_gaussian():
    """D = c^2 x / (c^2 + k^2) and x = x_0 sqrt((c^2 + k^2) / (c^2 + k_0^2)) have a known derivative along the trajectory."""
    data = GaussianMixture.gaussian(0.0, C**2, d=16)
    cohort, teacher = watched(VE, 4, data=data, steps=160)
    measured = final(Curvature(levels=80).measure(cohort, VE, teacher, 8))
    k = np.exp(measured["log_ratio"])
    size = float(torch.cat([teacher.x.get(0, 0, 4)]).square().flatten(1).mean(1).sqrt().mean()) / np.hypot(C, K_MAX)
    wanted = size * C**2 * k**2 / (C**2 + k**2) ** 1.5
    assert np.allclose(measured["size"][0], wanted, atol=0.02 * wanted.max())


# What they are worth


@pytest.mark.parametrize(
    ("method", "share"),
    [(Curvature(), 0.8), (GITS(metric="l2", gamma=1.0), 0.9), (BOSS(), 0.85), (OptimalSteps(images=12), 0.92)],
    ids=lambda v: getattr(v, "id", ""),
)
def test_proposals_for_euler_steps_beat_karras_on_the_bench_mixture(method, share):
    """As proposed, nothing tried on the way: mean RMS of 10 steps on 200 other samples."""
    cohort, teacher = watched(VE, 24, steps=80)
    times = method.times(final(method.measure(cohort, VE, teacher, 10)), VE, 10, 1)
    usual = errors(DDIM(), starts(VE, 10, DDIM())["Karras"].times)
    assert errors(DDIM(), times).mean() < share * usual.mean()


def test_the_bound_carried_to_its_minimum_is_worse_and_a_part_of_the_way_better():
    """Spec 2.1: 10 steps of 2M, from Karras: 0.2 of the way improves, all of it ruins."""
    cohort = Cohort([batch(VE, 24, 1)])
    drained(teach(cohort, VE, 80))
    method = AlignYourStepsOnModel()
    end = method.times(final(method.measure(cohort, VE, None, 10)), VE, 10, 2)
    begin = starts(VE, 10, DPMSolverPP())["Karras"].times
    usual, part, whole = (float(errors(DPMSolverPP(), t).mean()) for t in (begin, blended(VE, begin, end, 0.2), end))
    assert part < 0.75 * usual and whole > 3.0 * usual


# Searches


@pytest.mark.parametrize("process", [pytest.param(VE, id="ve"), pytest.param(NOISE, id="pure noise")])
@pytest.mark.parametrize("proposal", ALL)
def test_what_is_kept_is_never_worse_and_can_be_made_again(process, proposal):
    made = search(process, proposal, 5, DDIM())
    assert is_the_best(made)
    assert made.after is not None and made.trajectories is None
    kept = json.loads(json.dumps(made.extra()))
    assert len(json.dumps(kept)) < 60_000
    assert np.allclose(again(kept, process, 5), made.best.times, rtol=1e-9)
    for steps in (1, 3, 5) if proposal.id == "OptimalSteps" else (1, 3, 9):
        times = again({**kept, "share": 0.6}, process, steps)
        assert len(times) == steps + 1 and (np.diff(times) < 0).all() and times[-1] == 0.0
        assert times[0] == process.t_max
    plain = again({**kept, "share": 0.0}, process, 7)
    assert plain == USUAL[made.base_label](process, process.t_max, process.t_min, 7).tolist()


@pytest.mark.parametrize("proposal", ALL)
def test_degenerate_data_and_one_step_give_the_best_usual_schedule(proposal):
    point = search(VE, proposal, 4, DPMSolverPP(), data=POINT)
    one = search(VE, proposal, 1, DDIM())
    for made in (point, one):
        assert made.best is made.base and made.measured is None and made.after is not None
        assert len(again(made.extra(), VE, 6)) == 7


@pytest.mark.parametrize("proposal", ALL)
def test_identical_samples_and_two_steps(proposal):
    for options in ({"same": True}, {"data": GaussianMixture.gaussian(0.0, C**2, d=16)}):
        made = search(VE, proposal, 2, DPMSolverPP(), rows=3, **options)
        assert made.after.isfinite().all() and len(made.best.times) == 3


def test_measuring_ends_when_three_in_a_row_bring_nothing(monkeypatch):
    asked = []

    def stubborn(self, cohort, process, teacher, steps):
        for _ in range(10):
            asked.append(steps)
            yield {"n": len(asked)}

    monkeypatch.setattr(GITS, "measure", stubborn)
    usual = starts(VE, 4, DDIM())["Karras"].times
    monkeypatch.setattr(GITS, "times", lambda self, measured, process, steps, order: blended(VE, usual, usual, 1.0))
    search(VE, GITS(levels=20), 4, DDIM())
    assert len(asked) in (proposals.STALE, proposals.STALE + 1)  # the usual one again is better by rounding at most


def test_a_file_without_a_measurement_says_so():
    with pytest.raises(ValueError, match="for its own number of steps"):
        again({"sigmas": [1.0, 0.0]}, VE, 5)
    made = search(VE, GITS(levels=20), 4, DDIM()).extra()
    with pytest.raises(ValueError, match="at most 20 steps, not of 21"):
        again({**made, "share": 0.4}, VE, 21)
    with pytest.raises(ValueError, match="needs 'Unknown'"):
        again({**made, "proposal": {"id": "Unknown"}}, VE, 5)
