"""Black-box searches of solver schedules: the space, what is found, and what outlives kill -9. With the real Optuna."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from quickstep_under_test.solvers.calibration import ends, engine, shared
from quickstep_under_test.solvers.calibration import study as studies
from quickstep_under_test.solvers.calibration.cohort import Cohort, drained
from quickstep_under_test.solvers.calibration.predictor import Predictor, proposals
from quickstep_under_test.solvers.calibration.space import KNOWN, Space
from quickstep_under_test.solvers.calibration.study import Study
from quickstep_under_test.solvers.deis import DEIS
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP
from quickstep_under_test.solvers.process import RectifiedFlow, VarianceExploding
from quickstep_under_test.solvers.schedules import ExponentialSchedule, KarrasSchedule
from quickstep_under_test.solvers.solver import Problem, sample
from quickstep_under_test.solvers.unipc import UniPC
from quickstep_under_test.solvers.usf import USF

K_MAX, K_MIN = 14.6, 0.02
VE = VarianceExploding(t_min=K_MIN, t_max=K_MAX)
FLOW = RectifiedFlow(t_min=K_MIN / (1 + K_MIN), t_max=K_MAX / (1 + K_MAX))
NOISE = RectifiedFlow(t_min=0.003, t_max=1.0)  # from pure noise on
PROCESSES = [pytest.param(VE, id="ve"), pytest.param(FLOW, id="flow"), pytest.param(NOISE, id="pure noise")]


def mixture(components: int = 3, std: float = 0.3, seed: int = 1, size: int = 4) -> GaussianMixture:
    m = torch.from_numpy(np.random.default_rng(seed).standard_normal((components, size)))
    one, eye = torch.full((components,), 1.0 / components).double(), torch.eye(size).double()
    return GaussianMixture(one, m, torch.full((components, size), std**2).double(), eye.expand(components, size, size))


DATA = mixture()


def batch(process, rows: int, seed: int, data: GaussianMixture = DATA):
    x = torch.randn(rows, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    k = 1.0 if process.alpha(process.t_max) == 0.0 else K_MAX * process.alpha(process.t_max)
    problem = Problem(data.denoiser(process), process)
    return lambda visit: visit(problem, k * x)


def cohort(process, seed: int, batches: int = 3, rows: int = 4, **options) -> Cohort:
    return Cohort([batch(process, rows, 100 * seed + i, **options) for i in range(batches)], size=batches * rows)


def starts(space: Space) -> dict[str, dict]:
    schedules = {"Karras": KarrasSchedule(), "Exponential": ExponentialSchedule()}
    found = {}
    for n in range(space.least, space.most + 1):
        for name, schedule in schedules.items():
            times = schedule(space.process, space.process.t_max, space.process.t_min, n).tolist()
            for known in ("DDIM", "DPM-Solver++ 2M"):
                found[f"{known}, {name}, {n}"] = space.values(times, KNOWN[known])
    return found


def study(
    file: Path | None = None, process=VE, steps: int = 3, least: int | None = None, about=None, data=DATA, **options
) -> Study:
    space = Space(process, least or steps, steps)
    some = [cohort(process, seed, data=data) for seed in (1, 2)]
    return Study(
        *some, cohort(process, 3, 1, 100, data=data), space, starts(space), "s", f"sqlite:///{file}" if file else "",
        {"model": "m"} if about is None else about, **{"sampler": "tpe", "trials": 12, **options},
    )  # fmt: skip


def end(plan, process) -> torch.Tensor:
    return batch(process, 3, 0)(lambda problem, x: sample(problem, plan.solver, x, plan.times))


def drawn(space: Space, rng: random.Random) -> dict:
    def value(knob):
        if knob.options:
            return rng.choice(knob.options)
        return rng.randint(knob.low, knob.high) if isinstance(knob.low, int) else rng.uniform(knob.low, knob.high)

    return {knob.name: value(knob) for knob in space.knobs}


# The space


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("DDIM", DDIM()),
        ("DPM-Solver++ 2M", DPMSolverPP()),
        ("DPM-Solver++ 3M", DPMSolverPP(order=3, correction="taylor", third_order="exact", lower_order_final="never")),
        ("UniPC 2", UniPC(order=2, variant="exact", lower_order_final="never")),
        ("UniPC 3", UniPC(order=3, variant="exact", lower_order_final="never")),
        ("DPM-Solver 2M", None),
        ("DEIS 2", DEIS(points=2, variable="rho", frame="snr")),
        ("DEIS 3", DEIS(points=3, variable="rho", frame="snr")),
    ],
)
def test_usual_samplers_are_points_of_the_space(process, name, solver):
    space = Space(process, 6, 6)
    times = ExponentialSchedule()(process, process.t_max, process.t_min * 1.5, 6).tolist()
    values = space.values(times, KNOWN[name])
    plan = space.plan(space.own(values))
    assert space.has(values) and np.allclose(plan.times, times, rtol=1e-9)
    if solver is not None:
        same = batch(process, 3, 0)(lambda problem, x: sample(problem, solver, x, times))
        assert (end(plan, process) - same).abs().max() < 1e-9


@pytest.mark.parametrize("process", PROCESSES)
def test_whatever_the_values_a_valid_schedule_comes_out(process):
    rng = random.Random(0)
    for space in (Space(process, 6, 6), Space(process, 2, 5, orders=4)):
        for _ in range(40):
            values = drawn(space, rng)
            table = space.table(values)
            steps = values.get("steps", space.most)
            assert len(table.steps) == steps and table.sigma == process.t_max and table.sigmas[-1] == 0.0
            plan = space.plan(values)
            implicit = sum(values[f"corrector{i}"] == "implicit" for i in range(1, steps))
            assert plan.solver.nfe(steps) == steps + implicit and end(plan, process).isfinite().all()
            assert len(space.features(values)) == 2 + 10 * space.most


def test_one_step_leaves_nothing_to_search():
    space = Space(VE, 1, 1)
    assert space.knobs == [] and space.plan({}).times == [K_MAX, 0.0]


def test_what_is_not_searched_is_as_in_the_best_start():
    space = Space(VE, 4, 4, decisions=("times",))
    times = KarrasSchedule()(VE, K_MAX, K_MIN, 4).tolist()
    uni, ddim = (space.values(times, KNOWN[name]) for name in ("UniPC 2", "DDIM"))
    about = space.about(uni)
    assert {knob.decision for knob in about.knobs} == {"times"} and about.has(uni) and not about.has(ddim)
    assert [row.corrector is not None for row in about.table(about.own(ddim)).steps] == [True] * 3 + [False]


# The search


@pytest.mark.parametrize("sampler", ["tpe", "cma-es", "quasi-random"])
def test_a_search_keeps_all_it_saw_and_is_not_worse_than_the_best_start(sampler):
    made = study(sampler=sampler, trials=20)
    made.run()
    trials = made.study.get_trials()
    assert len(trials) >= 20 and {t.state.name for t in trials} <= {"COMPLETE", "PRUNED", "WAITING"}
    for trial in trials:
        errors = trial.user_attrs.get("errors", [])
        assert len(errors) == 12 if trial.state.name == "COMPLETE" else len(errors) < 12
        if trial.state.name == "COMPLETE":
            assert trial.value == pytest.approx(sum(errors) / 12)
    again = torch.cat([made._errors(made.fit, space_plan(made))])
    assert made.best_trial().user_attrs["errors"] == pytest.approx(again.tolist(), rel=1e-6)
    assert made.best_trial().user_attrs["select"] <= made.base_trial().user_attrs["select"]
    assert made.after.mean() < made.before.mean()
    assert trials[0].user_attrs["start"] == made.teacher["ranking"][0]


def test_starts_for_which_there_was_no_time_are_queued_last():
    made = study(left=lambda: 0.1)
    made.join()
    assert made._rank()["ranking"] == list(made.starts)


def space_plan(made: Study):
    table = made.best
    return type(made.space.plan(made.space.own(made.starts[made.teacher["ranking"][0]])))(
        USF(table.text()), table.sigmas
    )


def test_clearly_worse_trials_stop_early():
    made = study(trials=25)
    made.run()
    pruned = [t for t in made.study.get_trials() if t.state.name == "PRUNED"]
    best = made.best_trial().user_attrs["errors"]
    assert pruned
    for trial in pruned:
        errors = trial.user_attrs["errors"]
        assert len(errors) in (4, 8) and sum(errors) > sum(best[: len(errors)])


def test_error_against_calls():
    made = study(sampler="nsga-ii", least=2, steps=4, trials=24)
    made.run()
    front = made.front()
    assert len(front) >= 3 and front[-1].table == made.best
    for a, b in pairwise(front):
        assert a.calls < b.calls and a.select > b.select
    for point in front:
        plan = USF(point.table.text())
        assert plan.nfe(len(point.table.steps)) == point.calls


def test_both_kinds_of_model_give_the_same():
    made = []
    for process in (VE, FLOW):
        one = study(sampler="quasi-random", process=process, trials=6, left=lambda: 0.5)
        one.join()
        one.teach()
        one.search()
        made.append(one)
    first, second = ([t.params for t in one.finished()] for one in made)
    assert len(first) >= 2 and all(a.keys() == b.keys() for a, b in zip(first, second, strict=True))
    for a, b in zip(first, second, strict=True):
        numbers = [name for name in a if not isinstance(a[name], str)]
        assert [a[n] for n in numbers] == pytest.approx([b[n] for n in numbers]) and all(
            a[n] == b[n] for n in a if n not in numbers
        )
    for a, b in zip(*(one.finished() for one in made), strict=True):
        assert a.user_attrs["errors"] == pytest.approx(b.user_attrs["errors"], rel=1e-3)


def test_data_of_one_point_and_one_step_leave_everything_as_it_is():
    point = study(data=mixture(1, 0.0))
    point.run()
    assert point.best_trial() == point.base_trial() and point.after.max() < 1e-9
    one = study(steps=1)
    one.run()
    assert len(one.finished()) == 1 and one.best.sigmas == [K_MAX, 0.0]


# Going on


class Stop(BaseException):
    """As ComfyUI's."""


def test_a_search_goes_on_with_the_trial_it_would_have_made(tmp_path):
    whole = study(tmp_path / "a.db", steps=2, trials=7)
    whole.run()
    for trials in (5, 7):
        parts = study(tmp_path / "b.db", steps=2, trials=trials)
        parts.join()
        parts.teach()
        parts.search()
    a, b = ([t.params for t in one.study.get_trials()[:7]] for one in (whole, parts))
    assert a == b and parts.ran == 2


def test_two_workers_do_not_propose_the_same():
    """Asked with the same history, for trials of different numbers."""
    made = study()
    made.join()
    made.study.sampler = engine.Proposer("tpe", made.space, 0)
    first, second = (engine.suggested(made.study.ask(), made.space) for _ in range(2))
    assert first != second


def followed(batch, tick):
    """The batch, with ``tick`` called in each visit of the network."""

    def run(visit):
        def visited(problem, x):
            def denoise(x, t):
                tick()
                return problem.denoise(x, t)

            return visit(replace(problem, denoise=denoise), x)

        return batch(visited)

    return run


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize(("where", "most"), [("between visits", 20), ("in the network", 25)])
def test_stopped_in_the_middle_the_running_trial_is_tried_again(tmp_path, where, most, error):
    made, seen = study(tmp_path / "s.db", steps=2), []

    def tick():
        seen.append(made.stage)
        if seen.count("search") > most:
            raise error

    if where == "in the network":
        made.fit.batches = [followed(one, tick) for one in made.fit.batches]
    else:
        made.tick = tick
    with pytest.raises(error):
        made.run()
    trials = made.study.get_trials()
    finished, (failed,) = made.finished(), [t for t in trials if t.state.name == "FAIL"]
    waiting = [t.system_attrs["fixed_params"] for t in trials if t.state.name == "WAITING"]
    assert len(finished) >= 2 and made.best is not None and waiting.count(failed.params) == 1
    assert "RUNNING" not in {t.state.name for t in trials}
    again = study(tmp_path / "s.db", steps=2)
    again.run()
    assert [t.params for t in again.finished()[: len(finished)]] == [t.params for t in finished]
    assert failed.params in [t.params for t in again.study.get_trials() if t.state.name in ("COMPLETE", "PRUNED")]


def test_a_trial_that_another_took_for_dead_does_not_end_the_worker(tmp_path):
    optuna, given_up = engine.needed("optuna"), []
    made = study(tmp_path / "s.db", steps=2, trials=6)

    def tick():
        if made.ran == 2 and not given_up:
            other = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/s.db")
            given_up.extend(t.number for t in other.trials if t.state.name == "RUNNING")
            other.tell(given_up[0], state=optuna.trial.TrialState.FAIL)

    made.tick = tick
    made.run()
    failed = [t.number for t in made.study.get_trials() if t.state.name == "FAIL"]
    assert failed == given_up and len(failed) == 1 and made.ran == 6 and made.after is not None


def test_an_error_in_the_network_ends_the_worker():
    made = study(steps=2)

    def tick():
        assert made.ran < 2

    made.fit.batches = [followed(one, tick) for one in made.fit.batches]
    with pytest.raises(AssertionError):
        made.run()
    assert len(made.finished()) == 2 and "RUNNING" not in {t.state.name for t in made.study.get_trials()}


@pytest.mark.parametrize(
    ("options", "without", "ran"),
    [({}, "", 1), ({}, "times", 5), ({"sampler": "nsga-ii", "least": 2}, "", 5), ({"lead": False}, "", 5)],
    ids=["times are refined", "not searched", "error against calls", "by another"],
)
def test_time_is_held_back_for_times_only_where_they_are_refined(options, without, ran):
    made = study(trials=5, left=lambda: 0.2, **options)
    made.space = replace(made.space, decisions=tuple(d for d in made.space.decisions if d != without))
    made.join()
    made.teach()
    made.search()
    assert made.ran == ran


def queued(made: Study) -> list[str]:
    return [t.user_attrs["start"] for t in made.study.get_trials() if "start" in t.user_attrs]


@pytest.mark.parametrize("when", ["while the starts are ranked", "while the teacher runs"])
def test_two_who_begin_at_once_have_one_ranking_and_one_queue(tmp_path, monkeypatch, when):
    """The second one does all of its part between two visits of the first one, with another opinion of the teacher."""
    first, second = (study(tmp_path / "s.db") for _ in range(2))
    first.join()
    second.join()
    converge, asked = studies.converge, []

    def otherwise(cohort, *rest):
        steps, error, off = yield from converge(cohort, *rest)
        asked.append(cohort)
        return (steps, error, off) if cohort is first.fit else (2 * steps, error, {k: -loss for k, loss in off.items()})

    monkeypatch.setattr(studies, "converge", otherwise)

    def tick():
        if bool(first.teacher) == (when == "while the teacher runs") and not second.teacher:
            second.teach()

    first.tick = tick
    first.teach()
    known = first.study.user_attrs[studies.TEACHER]
    assert second.teacher and len(asked) == (2 if when == "while the starts are ranked" else 1)
    for made in (first, second):
        assert {**known, **made.teacher} == known
    assert sorted(queued(first)) == sorted(first.starts) and queued(first) == known["ranking"]


def test_who_ranked_queues_and_the_others_wait_for_it(tmp_path, monkeypatch):
    """Two at the same time, in threads, each with a connection of its own."""
    both, queue, called = [study(tmp_path / "s.db", folder=str(tmp_path)) for _ in range(2)], Study._queue, []

    def slowly(self, ranking):
        called.append(self)
        time.sleep(1.0)
        queue(self, ranking)

    monkeypatch.setattr(Study, "_queue", slowly)
    for made in both:
        made.join()
    threads = [threading.Thread(target=made.teach) for made in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(called) == 1 and sorted(queued(both[0])) == sorted(both[0].starts)


def test_killed_while_the_starts_are_queued_the_next_queues_the_rest(tmp_path, monkeypatch):
    made = study(tmp_path / "s.db")
    made.join()
    enqueue = made.study.enqueue_trial

    def killed(*arguments, **options):
        if len(queued(made)) == 2:
            raise Stop
        enqueue(*arguments, **options)

    monkeypatch.setattr(made.study, "enqueue_trial", killed)
    with pytest.raises(Stop):
        made.teach()
    again = study(tmp_path / "s.db")
    again.join()
    again.teach()
    assert len(queued(made)) == len(again.starts) and sorted(queued(again)) == sorted(again.starts)


def test_only_the_same_search_is_joined(tmp_path):
    study(tmp_path / "s.db", steps=2, trials=1).run()
    with pytest.raises(ValueError, match="its model is m, and here it is other"):
        study(tmp_path / "s.db", steps=2, about={"model": "other"}).run()
    with pytest.raises(ValueError, match="its loss is rms, and here it is log"):
        study(tmp_path / "s.db", steps=2, loss_name="log").run()
    with pytest.raises(ValueError, match="another model or other prompts"):
        study(tmp_path / "s.db", steps=2, data=mixture(seed=2)).run()


def taught(folder: str, data=DATA, stop: int | None = None):
    """Calls it took, and the ends."""
    some = [cohort(VE, seed, data=data) for seed in (1, 2)]
    kept = ends.Ends(*some, shared.Shared(folder))
    running = kept.teach(VE, 40)
    for n, _ in enumerate(running, 1):
        if n == stop:
            break
    running.close()
    return sum(c.calls for c in some), [t for c in some for t in c.targets], kept


def test_the_teachers_ends_are_taken_from_files_if_they_are_of_this_network(tmp_path):
    here, batch = str(tmp_path), 4 * 40
    calls, first, kept = taught(here)
    again, same, _ = taught(here)
    assert calls == 6 * batch and again == batch and all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert kept.agree(kept.signs()) and len(list(tmp_path.iterdir())) == 6
    other, made, theirs = taught(here, mixture(seed=2))
    assert other == 6 * batch and not torch.allclose(made[0], first[0]) and not theirs.agree(kept.signs())
    assert all(torch.equal(a, b) for a, b in zip(first, taught(here)[1], strict=True))  # the others wrote none
    assert taught("")[0] == 6 * batch


@pytest.mark.parametrize("left", [("teacher-40-2", "select-40-0"), ("select-40-0", "select-40-1")], ids=str)
def test_whichever_files_there_are_one_is_compared(tmp_path, left):
    """Some of another network's: none of them counts."""
    taught(str(tmp_path))
    for file in tmp_path.iterdir():
        if file.stem not in left:
            file.unlink()
    assert taught(str(tmp_path), mixture(seed=2))[0] == 6 * 4 * 40


def test_killed_while_the_teacher_runs_it_loses_a_batch(tmp_path):
    taught(str(tmp_path), stop=4)  # three are in files, the fourth is not yet
    assert len(list(tmp_path.iterdir())) == 3
    calls = taught(str(tmp_path))[0]
    assert calls == 4 * 4 * 40  # one of them is run again to see


def test_two_who_begin_at_once_do_half_of_the_jobs_each(tmp_path):
    """In turns, a visit each: but for one to compare and what the other is about to end, nobody does what the other has done."""
    done = {"a": [], "b": []}

    def job(who: str, name: str):
        done[who].append(name)
        yield
        return torch.tensor([float(name)])

    workers = {
        who: shared.Shared(str(tmp_path)).do({str(i): partial(job, who, str(i)) for i in range(12)}) for who in done
    }
    results = {}
    while len(results) < 2:
        for who, running in workers.items():
            try:
                next(running)
            except StopIteration as end:
                results.setdefault(who, end.value)
    assert results["a"] == results["b"] and sorted(results["a"]) == sorted(map(str, range(12)))
    assert len(done["a"]) + len(done["b"]) <= 12 + 2 + 1 and min(map(len, done.values())) >= 6
    assert len(list(tmp_path.iterdir())) == 12


def test_what_a_dead_one_has_taken_up_is_done_in_the_end(tmp_path):
    (tmp_path / "0.taken").touch()
    order = []

    def job(name: str):
        order.append(name)
        yield
        return torch.zeros(1)

    found = drained(shared.Shared(str(tmp_path)).do({name: partial(job, name) for name in "012"}))
    assert order == ["1", "2", "0"] and len(found) == 3 and len(list(tmp_path.iterdir())) == 3


def test_a_damaged_file_is_made_again(tmp_path):
    taught(str(tmp_path))
    (tmp_path / "teacher-40-1.safetensors").write_bytes(b"half")
    assert taught(str(tmp_path))[0] == (1 + 1) * 4 * 40  # one of the others is compared
    assert taught(str(tmp_path))[0] == 4 * 40


def test_results_that_are_no_numbers_are_the_same_where_they_are():
    x = torch.tensor([1.0, float("nan"), 2.0])
    assert shared.near(x, x.clone()) and not shared.near(x, torch.tensor([1.0, 2.0, 3.0]))
    assert not shared.near(x, x[:2])


def test_a_study_of_other_starts_does_not_take_these_for_its_own(tmp_path):
    """In the same folder, as where a study was deleted and begun again: the teacher's runs are shared, the starts' are not."""
    first, second = study(folder=str(tmp_path)), study(folder=str(tmp_path), steps=4)
    alone = study(steps=4)
    for made in (first, second, alone):
        made.join()
    first._rank()
    again, ranked = second._rank(), alone._rank()
    assert again["ranking"] == ranked["ranking"] and again["steps"] == ranked["steps"]
    assert second.calls < alone.calls and not set(second.shared.own) & {n for n in first.shared.own if "start" in n}


def test_workers_rank_the_starts_together(tmp_path):
    """The second one finds what the first one has left when it was stopped, and comes to the same ranking."""
    alone, parts = study(), [study(folder=str(tmp_path)) for _ in range(2)]
    alone.join()
    ranked = alone._rank()
    seen = []

    def tick():
        seen.append(parts[0].calls)
        if len(seen) == 5:
            raise Stop

    parts[0].tick = tick
    for made in parts:
        made.join()
    with pytest.raises(Stop):
        parts[0]._rank()
    again = parts[1]._rank()
    assert again == {**ranked, "error": pytest.approx(ranked["error"])}
    assert parts[1].calls < alone.calls - 400  # the runs of 40 and 80 steps are there


CHILD = """
import sys, types
sys.path[:0] = [{tests!r}]
package = types.ModuleType("quickstep_under_test"); package.__path__ = [{root!r}]
sys.modules["quickstep_under_test"] = package
import pathlib, time, test_study
made = test_study.study(pathlib.Path({file!r}), steps=2, heartbeat=1, trials=1000)
def tick():
    if made.ran == 5:
        print("in the middle", flush=True)
        time.sleep(100)
made.tick = tick
made.run()
"""


def test_kill_9_loses_at_most_the_trial_that_ran(tmp_path):
    """A child is killed in the middle of a trial. Who goes on finds all that was finished, and tries the running one again."""
    here, file = Path(__file__).resolve().parent, tmp_path / "s.db"
    code = CHILD.format(tests=str(here), root=str(here.parent), file=str(file))
    child = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    )
    said = child.stdout.readline()
    time.sleep(4.0)  # signs of life, on slow machines too
    child.kill()
    child.wait()
    assert said == "in the middle\n" and child.returncode == -signal.SIGKILL
    optuna = engine.needed("optuna")
    left = optuna.load_study(study_name="s", storage=f"sqlite:///{file}").get_trials()
    before = [t for t in left if t.state.name in ("COMPLETE", "PRUNED")]
    assert len(before) == 5
    (running,) = [t for t in left if t.state.name == "RUNNING"]
    time.sleep(9.0)  # longer than two heartbeats, by a clock of whole seconds
    made = study(file, steps=2, heartbeat=1, trials=len(left))
    made.run()
    trials = made.study.get_trials()
    assert [t.params for t in trials[: len(before)]] == [t.params for t in before]
    assert trials[running.number].state.name == "FAIL"
    again = [t for t in trials if t.system_attrs.get("failed_trial") == running.number]
    assert len(again) == 1 and again[0].params.items() >= running.params.items()


# Predictor


def score(space: Space, values: dict) -> float:
    """A known function of a schedule: even gaps and high orders are good."""
    table = space.table(values)
    gaps = -np.diff(np.log(table.sigmas[:-1]))
    order = sum(row.order for row in table.steps)
    return float(np.exp(np.square(gaps).sum() / 10.0 - 0.3 * order))


def test_the_predictor_ranks_and_proposes(monkeypatch):
    """The spec's: a known score, Kendall's tau above 0.8 with 400 samples; and what is proposed is better than all of them."""
    space, rng = Space(VE, 4, 4), random.Random(0)
    tried = [drawn(space, rng) for _ in range(400)]
    losses = [score(space, values) for values in tried]
    predictor = Predictor(space, tried, losses, 0)
    assert predictor.tau > 0.8
    best = sorted(range(400), key=losses.__getitem__)[:15]
    monkeypatch.setattr("quickstep_under_test.solvers.calibration.predictor._GENERATIONS", 12)
    made = proposals(predictor, [tried[i] for i in best], 0)
    assert max(score(space, values) for values in made[:10]) < losses[best[5]]
    assert min(score(space, values) for values in made) < losses[best[0]]
    noise = Predictor(space, tried[:60], [rng.random() for _ in range(60)], 0)
    assert noise.tau < 0.4


def test_the_predictor_in_a_study(monkeypatch):
    from quickstep_under_test.solvers.calibration import predictor

    monkeypatch.setattr(predictor, "FIRST", 10)
    made = study(sampler="predictor", trials=18, left=lambda: 0.5)
    asked = []
    monkeypatch.setattr(predictor, "proposals", lambda *a: asked.append(a) or proposals(*a))
    monkeypatch.setattr(predictor, "TRUST", -1.0)
    made.run()
    listed = [values for _, parents, _ in asked for values in parents]
    assert asked and all(values.keys() == listed[0].keys() for values in listed)
    assert len({tuple(sorted(t.params.items())) for t in made.study.get_trials()}) == len(made.study.get_trials())


# Packages


@pytest.mark.parametrize(("package", "sampler"), [("optuna", "tpe"), ("cmaes", "cma-es"), ("sklearn", "predictor")])
def test_a_missing_package_is_one_sentence(monkeypatch, package, sampler):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f'needs the Python package {package}, which is not installed: "pip install'):
        study(sampler=sampler).run()


def test_postgresql_goes_through_psycopg(monkeypatch):
    seen = []
    optuna = engine.needed("optuna")
    monkeypatch.setattr(optuna.storages, "RDBStorage", lambda url, **options: seen.append((url, options)))
    engine.storage("postgresql://me@host/db", 7)
    ((url, options),) = seen
    assert (
        url == "postgresql+psycopg://me@host/db"
        and options["heartbeat_interval"] == 7
        and options["grace_period"] == 21
    )


def test_a_database_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(engine.time, "sleep", lambda seconds: None)
    with pytest.raises(ValueError, match="unable to open database file"):
        engine.storage(f"sqlite:///{tmp_path}/none/s.db", 10)
    with pytest.raises(ValueError, match=r"database postgresql\+psycopg://me@127.0.0.1:9/x cannot be opened"):
        engine.storage("postgresql://me:secret@127.0.0.1:9/x", 10)


def test_two_who_begin_at_once_both_create_the_tables(tmp_path, monkeypatch):
    """The second one's first attempt finds them half made."""
    optuna, made = engine.needed("optuna"), []
    real = optuna.storages.RDBStorage

    def first(*arguments, **options):
        made.append(arguments)
        if len(made) == 1:
            raise engine.needed("sqlalchemy").exc.OperationalError("CREATE", {}, Exception("table exists"))
        return real(*arguments, **options)

    monkeypatch.setattr(optuna.storages, "RDBStorage", first)
    assert engine.storage(f"sqlite:///{tmp_path}/s.db", 10).get_all_studies() == [] and len(made) == 2
