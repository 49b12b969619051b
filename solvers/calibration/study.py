"""A black-box search over solver schedules as a study of Optuna's, which several processes may work on."""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from ..usf import USF
from ..usf_table import Table
from .cohort import Cohort, Running, drained
from .ends import Ends
from .engine import FRONT, Proposer, distributions, needed, storage, suggested
from .families import Plan, Schedules
from .levenberg import refine
from .losses import LOSSES
from .shared import Job, Shared
from .space import Space, plan_of
from .teacher import converge, teach

ABOUT, TEACHER, LIMIT = "quickstep", "teacher", 1e6
"""Attributes of a study: what it is of, and its teacher. The error of a sample that is not finite."""

SEARCHED, QUEUED, PATIENCE = 0.75, 6, 5.0
"""Share of the time after which the best one's times are refined; starts in the queue for each number of steps, if there are
several; seconds for which others wait for the one who queues them."""


class Point(NamedTuple):
    """Of the front: a schedule, its network calls, its loss on the samples that select."""

    table: Table
    calls: int
    select: float
    label: str


@dataclass
class Study:
    """Searches ``space``, or joins those who do; ``run`` ends when the study has so many ``trials``, or no time is left.

    Everybody who joins has the same samples, so that losses can be compared, and needs the teacher's ends. First the ``starts`` are
    measured on a few samples, and put in the queue, best first. Those who begin together and have the same ``folder`` divide
    both among themselves, and what is in it need not be done again. Each trial runs one schedule on the samples ``fit``, sample
    by sample, and is pruned when these say that it is worse than the best one (Wilcoxon's test, pairs of the same sample). The
    error of every sample is kept with the trial. What is best on ``fit`` at its time is run on ``select`` too, and the best there
    is the result: see ``best``, ``front``.

    about: what all who join must agree in, such as the model's fingerprint. lead: measures and refines the result; others only
    run trials. tick: called after each visit of the network; may raise. What is no Exception, there or in the network, is the
    user's stop, and the trial is put in the queue again. left: share of the time that is left.
    """

    fit: Cohort
    select: Cohort
    report: Cohort
    space: Space
    starts: Mapping[str, Mapping[str, Any]]
    name: str
    url: str
    about: dict[str, Any] = field(default_factory=dict)
    sampler: str = "predictor"
    trials: int = 200
    loss_name: str = "rms"
    seed: int = 0
    folder: str = ""
    lead: bool = True
    tick: Callable[[], None] = lambda: None
    left: Callable[[], float] = lambda: 1.0
    heartbeat: int = 10
    stage: str = "teacher"
    study: Any = None
    teacher: dict[str, Any] = field(default_factory=dict)
    before: torch.Tensor | None = None
    after: torch.Tensor | None = None
    ran: int = 0
    lost: bool = False

    def __post_init__(self):
        self.shared, self.own = Shared(self.folder), uuid.uuid4().hex

    @property
    def loss(self):
        return LOSSES[self.loss_name]

    @property
    def calls(self) -> int:
        return self.fit.calls + self.select.calls + self.report.calls

    @property
    def refines(self) -> bool:
        """Whether the best one's times are refined in the end."""
        return self.lead and self.sampler != FRONT and "times" in self.space.decisions

    # What happens, in this order

    def run(self) -> None:
        """All of it; Optuna's storage has every finished trial at every moment."""
        self.join()
        self.teach()
        self.stage = "search"
        self.search()
        if self.lead:
            self.stage = "times"
            self.refine()
            self.stage = "report"
            self.measure()

    def join(self) -> None:
        """Creates the study, or joins the one of that name. ValueError if it is of something else."""
        optuna = needed("optuna")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        goals = ["minimize"] * (2 if self.sampler == FRONT else 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # this pruner is called experimental
            pruner = optuna.pruners.WilcoxonPruner(p_threshold=0.1, n_startup_steps=4)
        self.study = optuna.create_study(
            study_name=self.name, storage=storage(self.url, self.heartbeat), directions=goals, load_if_exists=True,
            pruner=pruner,
        )  # fmt: skip
        own = {
            "sampler": self.sampler,
            "loss": self.loss_name,
            "seed": self.seed,
            "steps": [self.space.least, self.space.most],
        }
        own |= {
            "orders": self.space.orders,
            "decisions": list(self.space.decisions),
            "samples": self.fit.size,
            **self.about,
        }
        there = self.study.user_attrs.get(ABOUT)
        if there is None:
            self.study.set_user_attr(ABOUT, own)
            there = self.study.user_attrs[ABOUT]
        for name, value in own.items():
            if there.get(name) != value:
                raise ValueError(
                    f"The study {self.name!r} is of another search: its {name} is {there.get(name)}, and here it is {value}; "
                    "join it with the same, or choose another name."
                )

    def teach(self) -> None:
        """The teacher's ends, from the file if they are there. The first one of the study also ranks the starts."""
        if TEACHER not in self.study.user_attrs:
            ranked = {**self._rank(), "by": self.own}
            if TEACHER not in self.study.user_attrs:  # nobody was faster
                self.study.set_user_attr(TEACHER, ranked)
        found = self.study.user_attrs[TEACHER]
        self.teacher = found
        base = self.starts[found["ranking"][0]]
        if self.sampler == "cma-es":  # which searches numbers only
            self.space = replace(self.space, decisions=("times",), centre=base)
        self.space = self.space.about(base)
        ends = Ends(self.fit, self.select, self.shared)
        self._drain(ends.teach(self.space.process, found["steps"]))
        signs = self._queued()
        if signs is None:
            self._queue(found["ranking"])  # first: who is killed here leaves the rest of it to the next
            self.study.set_user_attr(TEACHER, {**found, "signs": ends.signs()})
        elif not ends.agree(signs):
            raise ValueError(
                f"The study {self.name!r} is of another model or other prompts: the teacher's pictures are different ones here; "
                "use the same checkpoint, LoRAs, prompts and settings."
            )

    def _queued(self) -> list[list[float]] | None:
        """The signs of the teacher's ends, which say that the starts are in the queue; None for the one who is to put them there:
        whose ranking it is, and another if that one seems to be gone."""
        began = time.monotonic()
        while True:
            known = self.study.user_attrs[TEACHER]  # again: others may have been faster
            if known.get("signs") is not None:
                return known["signs"]
            if known.get("by") == self.own or time.monotonic() - began > PATIENCE:
                return None
            time.sleep(0.2)
            self.tick()

    def search(self) -> None:
        """Trials until there are enough of them, or no time is left for more."""
        optuna = needed("optuna")
        states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
        most = self.trials if self.space.knobs else 1
        if len(self.study.get_trials(deepcopy=False, states=states)) >= most:
            return
        self.study.sampler = Proposer(self.sampler, self.space, self.seed)
        enough = optuna.study.MaxTrialsCallback(most, states=states)

        def late(study: Any, trial: Any) -> None:
            self.ran += 1
            if self.left() <= (1.0 - SEARCHED if self.refines else 0.0) or self._solved():
                study.stop()

        while True:
            self.lost = False
            try:
                return self.study.optimize(self._objective, callbacks=[enough, late])
            except Exception:  # Optuna's, which does not expect that others end a trial
                if not self.lost:
                    raise

    def refine(self) -> None:
        """The times of the best one, by Levenberg-Marquardt, with what time is left."""
        trial = self.best_trial()
        if trial is None or not self.refines or self._solved():
            return
        values, table = self._values(trial), self.space.table(self._values(trial))
        rows = tuple(replace(row, sigma=None) for row in table.steps)
        family = Schedules(USF(Table(rows).text()), self.space.curve(len(rows)))
        best, lowest = None, trial.user_attrs["select"]
        for found in refine(self.fit, family, family.theta(table.sigmas), self.loss):
            self.tick()
            if self.left() <= 0.0:
                break
            if found is not None:
                select = self.loss(self._errors(self.select, found.plan))
                if select < lowest:
                    best, lowest = found, select
        if best is not None:
            moved = {f"time{i}": float(p) for i, p in enumerate(best.theta - best.theta.mean(), 1)}
            self._add({**values, **moved}, best.loss, best.rms, lowest)

    def measure(self) -> None:
        """The best start, and the best of all, on samples kept aside."""
        base, best = self.base_trial(), self.best_trial()
        if base is None or best is None:
            return
        self._drain(teach(self.report, self.space.process, self.teacher["steps"]))
        self.before = self._errors(self.report, plan_of(self.table_of(base)))
        self.after = self.before if best is base else self._errors(self.report, plan_of(self.table_of(best)))

    # What was found

    def finished(self) -> list[Any]:
        """Trials that were run on all samples."""
        if self.study is None:
            return []
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]

    def best_trial(self) -> Any:
        """The best on the samples that select, with as many calls as there may be; None before there is one."""
        return min(self._selected(), key=_select, default=None)

    def base_trial(self) -> Any:
        """The best start."""
        return min((t for t in self._selected() if "start" in t.user_attrs), key=_select, default=None)

    def table_of(self, trial: Any) -> Table:
        return self.space.table(self._values(trial))

    @property
    def best(self) -> Table | None:
        trial = self.best_trial()
        return None if trial is None else self.table_of(trial)

    def front(self) -> list[Point]:
        """Schedules of which none has less loss at as few calls, by calls."""
        found: list[Point] = []
        for trial in sorted(self._selected(), key=lambda t: (t.user_attrs["calls"], _select(t))):
            if not found or _select(trial) < found[-1].select:
                label = trial.user_attrs.get("start", "")
                found.append(Point(self.table_of(trial), trial.user_attrs["calls"], _select(trial), label))
        return found

    # How

    def _selected(self) -> list[Any]:
        return [trial for trial in self.finished() if "select" in trial.user_attrs]

    def _values(self, trial: Any) -> dict[str, Any]:
        return trial.user_attrs.get("values", trial.params)

    def _objective(self, trial: Any) -> Any:
        plan = self.space.plan(suggested(trial, self.space))
        try:
            errors = self._raced(trial, plan)
            value, calls = self.loss(torch.tensor(errors)), calls_of(plan)
            trial.set_user_attr("calls", calls)
            better = [t for t in self.finished() if t.user_attrs["calls"] <= calls and t.values[0] <= value]
            if not better:
                trial.set_user_attr("select", self.loss(self._errors(self.select, plan)))
        except BaseException as error:
            if not isinstance(error, Exception) and self._running(trial):
                label = {k: v for k, v in trial.user_attrs.items() if k == "start"}
                self.study.enqueue_trial(trial.params, label)
                if not isinstance(error, KeyboardInterrupt):  # of which Optuna tells by itself
                    self.study.tell(trial, state=needed("optuna").trial.TrialState.FAIL)
            raise
        finally:
            self.lost = not self._running(trial)
        return (value, float(calls)) if self.sampler == FRONT else value

    def _running(self, trial: Any) -> bool:
        """Not so if another worker took it for dead, since there was no sign of life, and put it in the queue again."""
        return self.study.get_trials(deepcopy=False)[trial.number].state.name == "RUNNING"

    def _raced(self, trial: Any, plan: Plan) -> list[float]:
        """Errors, as far as it is worth knowing them."""
        errors: list[float] = []
        races = self.sampler not in (FRONT, "cma-es") and len(self.fit.batches) > 1  # these rank all trials
        for i in range(len(self.fit.batches)):
            made = self._errors(self.fit, plan, slice(i, i + 1))
            if races:
                for j, loss in enumerate(self.loss.of(made).tolist(), len(errors)):
                    trial.report(loss, j)
            errors += made.tolist()
            trial.set_user_attr("errors", errors)
            if races and i + 1 < len(self.fit.batches) and trial.should_prune():
                raise needed("optuna").TrialPruned
        return errors

    def _errors(self, cohort: Cohort, plan: Plan, part: slice = slice(None)) -> torch.Tensor:
        some = Cohort(cohort.batches[part], cohort.targets[part])
        try:
            errors = self._drain(some.errors(plan)).double()
        finally:
            cohort.calls += some.calls
        return errors.nan_to_num(LIMIT, LIMIT).clamp(max=LIMIT)

    def _drain(self, running: Running) -> Any:
        return drained(running, self.tick)

    def _rank(self) -> dict[str, Any]:
        """How many steps the teacher needs, and the starts, best first."""
        labels, plans = list(self.starts), [self.space.plan(values) for values in self.starts.values()]

        def teacher_first(jobs: Mapping[str, Job], wanted: Callable[[str], bool]) -> Running:
            """It takes long, and who has nothing else to do in the end would wait for it."""
            return self.shared.do(dict(sorted(jobs.items(), key=lambda job: job[0].startswith("start"))), wanted)

        made = converge(self.fit, self.space.process, plans, self.left, self.loss, teacher_first)
        steps, error, off = self._drain(made)
        ranking = [label for _, label in sorted((loss, labels[k]) for k, loss in off.items())]
        ranking += [label for label in labels if label not in ranking]  # for which there was no time
        return {"steps": steps, "error": error, "ranking": ranking}

    def _queue(self, ranking: list[str]) -> None:
        """The starts that the space has, best first; of each number of steps only some, if there are several."""
        room = {values["steps"]: QUEUED if self.sampler == FRONT else len(ranking) for values in self.starts.values()}
        for label in ranking:
            values = self.starts[label]
            if self.space.has(values) and room[values["steps"]] > 0:
                room[values["steps"]] -= 1
                self.study.enqueue_trial(self.space.own(values), {"start": label}, skip_if_exists=True)

    def _add(self, values: dict[str, Any], loss: float, rms: torch.Tensor, select: float) -> None:
        """A trial that was not proposed: as the nearest one that the space has, with its true values beside it."""
        plan = self.space.plan(values)
        attrs = {"errors": rms.double().tolist(), "select": select, "calls": calls_of(plan)}
        made = needed("optuna").create_trial(
            params=self.space.own(values), distributions=distributions(self.space), value=loss,
            user_attrs={**attrs, "values": values}, intermediate_values=dict(enumerate(self.loss.of(rms).tolist())),
        )  # fmt: skip
        self.study.add_trial(made)

    def _solved(self) -> bool:
        """Whether the best start is the teacher to rounding, as with data of one point: then there is nothing to find."""
        best = self.best_trial()
        return best is not None and float(np.mean(best.user_attrs["errors"])) <= self._rounding()

    def _rounding(self) -> float:
        targets = torch.cat(self.fit.targets)
        return 10.0 * torch.finfo(targets.dtype).eps * float(targets.square().mean().sqrt())


def calls_of(plan: Plan) -> int:
    """Of the network, in a run."""
    calls = plan.solver.nfe(len(plan.times) - 1)
    assert calls is not None  # tables of this space have their length
    return calls


def _select(trial: Any) -> float:
    return trial.user_attrs["select"]
