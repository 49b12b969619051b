"""AutoDiffusion: what is within a budget, what is searched, and what is found where the answer is known."""

from __future__ import annotations

import random
from functools import cache
from itertools import product

import pytest
import torch
from quickstep_under_test.solvers.artifact import Artifact, load, save
from quickstep_under_test.solvers.caching.accelerator import Plan as Does
from quickstep_under_test.solvers.caching.accelerator import Run
from quickstep_under_test.solvers.caching.auto_diffusion import KIND, AutoDiffusion, Skips, skips_of, table_of
from quickstep_under_test.solvers.caching.block_skip import Unit
from quickstep_under_test.solvers.calibration import engine
from quickstep_under_test.solvers.calibration.cohort import Cohort
from quickstep_under_test.solvers.calibration.families import Plan
from quickstep_under_test.solvers.calibration.skip_search import SkipSearch
from quickstep_under_test.solvers.calibration.skip_space import Allowance, Left, Skipping, SkipSpace, called_at
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP
from quickstep_under_test.solvers.process import RectifiedFlow, VarianceExploding
from quickstep_under_test.solvers.rho_rk import RhoRK
from quickstep_under_test.solvers.schedules import ExponentialSchedule
from quickstep_under_test.solvers.solver import Problem, sample

VE = VarianceExploding(t_min=0.02, t_max=14.6)
FLOW = RectifiedFlow(t_min=0.003, t_max=1.0)


def unit(name: str, work: float, *scores: float) -> Unit:
    return Unit(name, False, work, scores or (1.0, 1.0, 1.0))


# The budget


def test_whatever_is_marked_the_run_is_within_the_budget_and_nothing_is_left_out_in_vain():
    rng = random.Random(0)
    for _ in range(300):
        steps, count = rng.randint(1, 5), rng.randint(1, 4)
        units = tuple(unit(f"u{j}", rng.uniform(0.01, 0.2), *(rng.random() for _ in range(3))) for j in range(count))
        least = 1.0 - sum(u.work for u in units)
        allowance = Allowance(units, steps, rng.choice([least, 1.0, rng.uniform(least, 1.0)]))
        marked = [{u.name for u in units if rng.random() < rng.choice([0.1, 0.5, 1.0])} for _ in range(steps)]
        sets = allowance.within(marked)
        assert allowance.cost(sets) <= allowance.budget + 1e-9
        assert Skips(tuple(range(steps, -1, -1)), sets, units).kept == pytest.approx(allowance.cost(sets))
        for i, names in enumerate(sets):
            for name in names:
                fewer = [s - {name} if j == i else s for j, s in enumerate(sets)]
                assert allowance.cost(fewer) > allowance.budget
        assert allowance.within(sets) == sets


def test_every_set_that_is_needed_can_be_reached():
    """By brute force: all sets within the budget from which nothing can be taken are what they make of themselves."""
    allowance = Allowance((unit("a", 0.1), unit("b", 0.2, 0.1, 0.2, 0.3)), 3, 0.85)
    reached = 0
    for bits in product((0, 1), repeat=6):
        sets = tuple(frozenset(n for n, bit in zip("ab", bits[2 * i :], strict=False) if bit) for i in range(3))
        fewer = [tuple(s - {n} if j == i else s for j, s in enumerate(sets)) for i in range(3) for n in sets[i]]
        minimal = allowance.cost(sets) <= 0.85 + 1e-9 < min(map(allowance.cost, fewer), default=1.0)
        reached += minimal
        assert (allowance.within(sets) == sets) == minimal
    assert reached > 5


def test_the_least_score_per_work_of_the_step_goes_first():
    early, late = unit("early", 0.1, 0.0, 0.5, 1.0), unit("late", 0.1, 1.0, 0.5, 0.0)
    sets = Allowance((early, late), 4, 0.9).within([()] * 4)
    assert sets == ({"early"}, {"early"}, {"late"}, {"late"})
    assert Allowance((early, late), 2, 0.95).within([(), {"early"}]) == (frozenset(), {"early"})  # marked: before all


def test_nothing_to_leave_out():
    assert Allowance((), 3, 1.0).within([()] * 3) == (frozenset(),) * 3
    assert Allowance((unit("a", 0.5),), 1, 1.0).within([{"a"}]) == (frozenset(),)
    assert Allowance((unit("a", 0.5),), 1, 0.9).within([()]) == ({"a"},)
    with pytest.raises(ValueError, match=r"all 1 parts .* come to 10\.0% .* a budget of at least 0\.90"):
        Allowance((unit("a", 0.1),), 4, 0.8)


# A toy whose answer is known


D = 8
DATA = GaussianMixture(
    torch.ones(1).double(), torch.zeros(1, D).double(), torch.full((1, D), 0.5).double(), torch.eye(D).double()[None]
)
HARM = {"a": 0.1 * torch.eye(D).double()[0], "b": 0.25 * torch.eye(D).double()[1]}
UNITS = (unit("a", 0.2, 3.0, 3.0, 3.0), unit("b", 0.2))  # the scores say that b matters less, which is wrong


def toy(process, seed: int, left: Left, rows: int = 6):
    """A network that is exact when whole; without "a", and more so without "b", it is off, the more the later."""
    half = torch.randn(rows // 2, 1, 1, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise = torch.cat([half, -half])  # so that harm is harm whatever the error of few steps
    exact = DATA.denoiser(process)

    def denoise(x, t):
        assert left.names <= HARM.keys()
        harm = 4.0 / (1.0 + min(float(process.rho(t)[0]), 100.0))
        return exact(x, t) + harm * sum(HARM[name] for name in left.names)

    problem = Problem(denoise, process)
    scale = 14.6 if process.alpha(process.t_max) == 1.0 else 1.0
    return Cohort([lambda visit: visit(problem, scale * noise)], size=rows)


def search(process=VE, steps: int = 3, budget: float = 0.8, units=UNITS, **options) -> SkipSearch:
    left = Left()
    allowance = Allowance(tuple(units), steps, budget)

    def times(n):
        return ExponentialSchedule()(process, process.t_max, process.t_min, n).tolist()

    start = Plan(Skipping(DPMSolverPP(), allowance.within([()] * steps), left), times(steps))
    whole = {"2 whole steps": Plan(DPMSolverPP(), times(2))}
    return SkipSearch(
        process, *(toy(process, seed, left) for seed in (1, 2, 3)), {"exponential": start}, solver=DPMSolverPP(),
        allowance=allowance, network=left, whole=whole, **{"tries": 60, **options},
    )  # fmt: skip


def run(made: SkipSearch) -> SkipSearch:
    for _ in made.run():
        assert made.network.names == frozenset()  # whole between visits
        for plan in (made.best, made.base):
            assert plan is None or made.allowance.cost(plan.solver.left_out) <= made.allowance.budget + 1e-9
    return made


def loss(made: SkipSearch, plan: Plan) -> float:
    running = made.select.errors(plan)
    try:
        while True:
            next(running)
    except StopIteration as end:
        return made.loss(end.value)


@cache
def searched(process, sampler: str) -> SkipSearch:
    return run(search(process, sampler=sampler))


@pytest.mark.parametrize(("process", "sampler"), [(VE, "tpe"), (FLOW, "tpe"), (VE, "nsga-ii")])
def test_the_best_sets_are_found(process, sampler):
    made = searched(process, sampler)
    every = {}
    for bits in product((0, 1), repeat=6):
        sets = made.allowance.within(
            [{n for n, bit in zip("ab", bits[2 * i :], strict=False) if bit} for i in range(3)]
        )
        every[sets] = loss(made, Plan(Skipping(made.solver, sets, made.network), made.best.times))
    assert len(every) == 20 and made.best.solver.left_out == min(every, key=every.__getitem__)
    assert made.base.solver.left_out == ({"b"},) * 3  # what the scores say
    assert made.after.mean() < 0.6 * made.before.mean()
    assert made.select_loss == pytest.approx(loss(made, made.best)) and made.tried == 60


def test_fewer_whole_steps_are_compared_with():
    made = searched(VE, "tpe")
    plan = made.whole["2 whole steps"]
    assert made.whole_label == "2 whole steps" and made.whole_select == pytest.approx(loss(made, plan))
    assert made.extra()["whole_select"] == made.whole_select and made.extra()["kept"] == pytest.approx(0.8)


@pytest.mark.parametrize("options", [{"steps": 1}, {"budget": 1.0}, {"units": (), "budget": 1.0}], ids=str)
def test_little_to_search_is_no_error(options):
    made = run(search(tries=15, **options))
    assert made.select_loss <= loss(made, made.base) and made.after is not None
    assert len(frozenset().union(*made.best.solver.left_out)) == ("steps" in options)  # one of the two, or nothing
    assert made.tried == (15 if "steps" in options else 0)


@pytest.mark.parametrize(("left", "tried"), [(0.1, 0), (0.3, 8), (1.0, 8)])
def test_turns_end_by_the_time_that_is_left(left, tried):
    made = run(search(tries=8, left=lambda: left))
    assert made.tried == tried and made.after is not None


def test_sets_that_were_seen_before_are_counted_once_and_the_user_can_stop_there_too():
    made = search(steps=1, tries=30)
    last = 0
    for _ in made.run():
        assert made.tried <= last + 1
        last = made.tried
    assert made.tried == 30 and made.seen == {(frozenset("a"),), (frozenset("b"),)}


def test_optuna_is_told_the_losses(monkeypatch):
    optuna, studies = engine.needed("optuna"), []
    real = optuna.create_study
    monkeypatch.setattr(optuna, "create_study", lambda **given: studies.append(real(**given)) or studies[-1])
    made = run(search(tries=12))
    told = [trial.value for one in studies for trial in one.trials if trial.value is not None]
    better = {t.label: t.fit for t in made.trials if t.label.startswith("sets")}
    assert len(studies) == 2 and len(told) == 12 and len(better) > 2
    for label, fit in better.items():
        assert told[int(label.split()[-1]) - 1] == fit


def test_it_stops_at_any_time_with_the_network_whole_and_a_valid_plan():
    for stop in (8, 45):
        made = search()
        running = made.run()
        for _ in range(stop):
            next(running)
        running.close()
        assert made.network.names == frozenset()
        assert made.best is None or made.allowance.cost(made.best.solver.left_out) <= 0.8 + 1e-9


def test_an_error_in_the_network_leaves_it_whole():
    left, solver = Left(), DDIM()

    def denoise(x, t):
        assert left.names == {"a"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(
            Problem(denoise, VE), Skipping(solver, (frozenset({"a"}),), left), torch.zeros(1, 1, 1, 1), [VE.t_max, 0.0]
        )
    assert left.names == frozenset()


def test_calls_of_a_run():
    times = [14.6, 3.0, 1.0, 0.0]
    assert called_at(DPMSolverPP(), VE, times) == times[:-1] != called_at(RhoRK(), VE, times)


def test_values_of_the_space():
    space = SkipSpace(Allowance(UNITS, 3, 0.8))
    sets = (frozenset("a"), frozenset(), frozenset("ab"))
    assert len(space.knobs) == 6 and space.sets(space.values(sets)) == sets
    assert space.sets({}) == space.allowance.within([()] * 3)
    assert SkipSpace(Allowance(UNITS, 3, 1.0)).knobs == SkipSpace(Allowance((), 1, 1.0)).knobs == []


def test_optuna_is_asked_for_first(monkeypatch):
    monkeypatch.setitem(engine.importlib.sys.modules, "optuna", None)
    with pytest.raises(ImportError, match="Search AutoDiffusion needs the Python package optuna"):
        run(search())


# The file


SKIPS = Skips((4.0, 2.0, 1.0, 0.0), (frozenset("ab"), frozenset(), frozenset("b")), UNITS)


def test_a_plan_survives_its_file(tmp_path):
    save(tmp_path / "f.json", Artifact(KIND, {"sigmas": list(SKIPS.sigmas), **table_of(SKIPS)}))
    found = load(tmp_path / "f.json", KIND)
    assert skips_of(found) == SKIPS and SKIPS.kept == pytest.approx(1 - 0.6 / 3)
    assert [u.name for u in AutoDiffusion(found).left_out()] == ["a", "b"] and AutoDiffusion().left_out() == []


def test_calls_are_told_by_their_sigma():
    artifact = Artifact(KIND, {"sigmas": list(SKIPS.sigmas), **table_of(SKIPS)})
    session = AutoDiffusion(artifact).start(Run([4.0, 2.0, 1.0, 0.0]))
    expected = [(4.0 + 1e-6, "ab", Does.FULL), (2.0, "", Does.PLAIN), (1.5, "", Does.PLAIN), (1.0, "b", Does.FULL),
                (1.01, "", Does.PLAIN), (4.0, "ab", Does.FULL)]  # fmt: skip
    for t, names, does in expected:
        with session.call(t):
            assert (set(session.left_out), session.plan) == (set(names), does)
    assert len(session.notes) == 1 and "such as 1.5, were computed whole" in session.notes[0]
    nothing = AutoDiffusion().start(Run([4.0, 0.0]))
    with nothing.call(4.0):
        assert nothing.plan is Does.PLAIN and not nothing.notes


@pytest.mark.parametrize(
    "wrong",
    [{"sigmas": [4.0, 5.0, 1.0, 0.0]}, {"sigmas": [4.0, 0.0]}, {"sigmas": None}, {"left_out": [["c"], [], []]}, {"left_out": []},
     {"left_out": ["a", [], []]}, {"units": [{"name": "a"}]}],
    ids=str,
)  # fmt: skip
def test_bad_files_are_refused(wrong):
    good = {"sigmas": list(SKIPS.sigmas), **table_of(SKIPS)}
    with pytest.raises(ValueError, match=r"is damaged; run Search AutoDiffusion again|do not belong together"):
        AutoDiffusion(Artifact(KIND, {**good, **wrong}))
    with pytest.raises(ValueError, match="the file holds schedule, but step-skips is needed here"):
        AutoDiffusion(Artifact("schedule", good))
