"""The searches: starts compared, the best ones improved, the winner chosen on samples that no fit has seen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from ..process import ForwardProcess
from ..solver import Solver
from .cohort import Cohort, Running
from .curve import Curve
from .decoupled import Decoupled
from .families import Family, Joint, Plan, Schedules, Weights, fitted_plan
from .fitted import FittedSolver
from .least_squares import sequential
from .levenberg import refine
from .losses import LOSSES, Loss
from .teacher import Trajectories, converge, teach
from .wider import Rescaled, Wider

FINALISTS, CLIMBS = 4, 3
"""How many starts are compared on all samples, all being so on a few; and how many are improved."""

RESUMED = "resumed"


class Trial(NamedTuple):
    """One point of the curve: network calls so far, loss on the samples of the fit and on those that select."""

    calls: int
    fit: float
    select: float
    label: str


class Ascent(NamedTuple):
    """Where an improvement begins."""

    label: str
    family: Family
    theta: np.ndarray


@dataclass
class Search(ABC):
    """Common to all: teacher, starts, improvement, report. ``run`` yields after every visit of the network.

    Whoever iterates may stop at any yield; ``close`` then still measures what was found, ``release`` forgets the teacher.

    fit, select, report: three sets of samples. ``best`` is at every moment the candidate with the least loss on ``select`` of all
    that were run there: of the starts these are the FINALISTS that are best on a few samples of ``fit``, and ``base`` is the best
    of them. resumed: what an earlier search found, to go on from. left: the share of the budget that is left, 1 to 0.

    ValueError where the teacher's samples are not finite.
    """

    process: ForwardProcess
    fit: Cohort
    select: Cohort
    report: Cohort
    starts: Mapping[str, Plan]
    resumed: Plan | None = None
    loss: Loss = LOSSES["rms"]
    left: Callable[[], float] = lambda: 1.0
    stage: str = "teacher"
    trials: list[Trial] = field(default_factory=list)
    best: Plan | None = None
    base: Plan | None = None
    base_label: str = ""
    teacher_steps: int = 0
    teacher_error: float = 0.0
    before: torch.Tensor | None = None
    after: torch.Tensor | None = None

    @abstractmethod
    def ascents(self, plans: dict[str, Plan]) -> Generator[Ascent | None, None, None]:
        """Where to improve from, given starts, best first; None while something is being prepared."""

    def teach(self) -> Running:
        """Gives ``fit`` its targets."""
        return (yield from teach(self.fit, self.process, self.teacher_steps))

    @property
    def calls(self) -> int:
        return self.fit.calls + self.select.calls + self.report.calls

    def run(self) -> Generator[None, None, None]:
        """All of it."""
        names, plans = list(self.starts), list(self.starts.values())
        made = yield from converge(self.fit, self.process, plans, self.left, self.loss)
        self.teacher_steps, self.teacher_error, off = made
        yield from self.teach()
        yield from teach(self.select, self.process, self.teacher_steps)
        if not all(bool(ends.isfinite().all()) for ends in (*self.fit.targets, *self.select.targets)):
            raise ValueError(
                f"The model's own samples of {self.teacher_steps} steps are not finite numbers: lower cfg, or load the model in "
                "another precision, bf16 or fp32."
            )
        self.stage = "starts"
        ranked = yield from self._rank([n for _, n in sorted((loss, names[k]) for k, loss in off.items())[:FINALISTS]])
        self.stage = "search"
        yield from self._climb(ranked)
        yield from self.close()

    def close(self) -> Generator[None, None, None]:
        """The losses on samples kept aside: all that is left to do when the time is up."""
        self.stage = "report"
        if self.best is None or self.base is None:
            return
        yield from teach(self.report, self.process, self.teacher_steps)
        self.before = yield from self.report.errors(self.base)
        self.after = self.before if self.best is self.base else (yield from self.report.errors(self.best))

    def release(self) -> None:
        """Frees what the teacher keeps; here nothing."""
        return

    def extra(self) -> dict[str, Any]:
        """What else goes into the file; here nothing."""
        return {}

    def _rank(self, finalists: list[str]) -> Running:
        """The starts, best first; what is resumed before all, so that it is kept however little time there is."""
        losses, lowest = {}, float("inf")
        resumed = {} if self.resumed is None else {RESUMED: self.resumed}
        for name, plan in (resumed | {name: self.starts[name] for name in finalists}).items():
            loss = self.loss((yield from self.fit.errors(plan)))
            select = yield from self._consider(plan, loss, name)
            if name in resumed:
                continue
            losses[name] = loss
            if self.base is None or select < lowest:
                self.base, self.base_label, lowest = plan, name, select
        return resumed | {name: self.starts[name] for name in sorted(losses, key=losses.__getitem__)[:CLIMBS]}

    def _climb(self, ranked: dict[str, Plan]) -> Generator[None, None, None]:
        if not self._worthwhile():
            return
        for ascent in self.ascents(ranked):
            yield
            if ascent is None:
                continue
            for found in refine(self.fit, ascent.family, ascent.theta, self.loss.follow):
                if found is not None:
                    yield from self._consider(found.plan, self.loss(found.rms), ascent.label)
                yield

    def _consider(self, plan: Plan, loss: float, label: str) -> Generator[None, None, float]:
        """The loss on the samples that select."""
        select = self.loss((yield from self.select.errors(plan)))
        if self.best is None or select < min(trial.select for trial in self.trials):
            self.best = plan
        self.trials.append(Trial(self.calls, loss, select, label))
        return select

    def _worthwhile(self) -> bool:
        """False where the best start is the teacher to rounding already, as with data of one point."""
        targets = torch.cat(self.fit.targets)
        apart = self.loss.of(torch.tensor(10.0 * torch.finfo(targets.dtype).eps) * targets.square().mean().sqrt())
        return min(trial.fit for trial in self.trials) > float(apart)


@dataclass
class ScheduleSearch(Search):
    """The schedule of a given solver. decouple: with noise levels of its own at which the network is asked."""

    solver: Solver = field(default_factory=FittedSolver)
    decouple: bool = False

    def ascents(self, plans: dict[str, Plan]) -> Generator[Ascent | None, None, None]:
        for name, plan in plans.items():
            family = Schedules(self.solver, curve_of(self.process, plan))
            yield ascent(name, family, family.theta(plan.times), plan, [Decoupled] if self.decouple else [])


@dataclass
class SolverSearch(Search):
    """The weights of a fitted solver, with its schedule (``joint``), or on each start's own.

    memory: how many predictions a step mixes. rescale, decouple: also the sizes of what a step is made of, and the noise levels at
    which the network is asked. folder: for the teacher's states, if they are large. From every start there are two ways: from its
    own weights, and from those of ``sequential``; each may end in another minimum.
    """

    memory: int = 10
    joint: bool = True
    rescale: bool = False
    decouple: bool = False
    folder: str = ""
    samples: int = 0
    shape: tuple[int, ...] = ()
    trajectories: Trajectories | None = None

    def teach(self) -> Running:
        self.trajectories = Trajectories(self.process, self.teacher_steps, self.samples, self.shape, self.folder)
        yield from self.trajectories.teach(self.fit)

    def ascents(self, plans: dict[str, Plan]) -> Generator[Ascent | None, None, None]:
        assert self.trajectories is not None
        kinds, tried = [*[Rescaled] * self.rescale, *[Decoupled] * self.decouple], []
        for name, plan in plans.items():
            curve, times = curve_of(self.process, plan), plan.times
            if self.joint:
                times = curve.times(curve.levels(curve.logits(times)))
            family = Joint(curve, self.memory) if self.joint else Weights(tuple(times), self.memory)
            ways, losses = {"": moved(plan, times)}, {}
            if times not in tried:  # what is fitted from the start depends on the times alone
                tried.append(times)
                rows = yield from sequential(self.fit, self.process, times, self.memory, self.trajectories.at)
                ways[", fitted"] = fitted_plan(times, rows)
            for way, begin in ways.items():
                losses[way] = self.loss((yield from self.fit.errors(begin)))
            for way in sorted(losses, key=losses.__getitem__):
                rows = rows_of(ways[way])
                theta = family.theta(times, rows) if isinstance(family, Joint) else family.theta(rows)
                yield ascent(name + way, family, theta, ways[way], kinds)

    def release(self) -> None:
        if self.trajectories is not None:
            self.trajectories.close()
            self.trajectories = None


def ascent(label: str, family: Family, theta: np.ndarray, begin: Plan, kinds: Sequence[type[Wider]]) -> Ascent:
    """From parameters of a family, and of those wider by ``kinds``, with the numbers of ``begin``."""
    for kind in kinds:
        family = kind(family, len(begin.times) - 1, begin.solver.calls > 1)
        theta = family.begin(theta, begin)
    return Ascent(label, family, theta)


def rows_of(plan: Plan) -> list[list[float]]:
    """The weights of a plan with a fitted solver."""
    assert isinstance(plan.solver, FittedSolver)
    return plan.solver.weights


def moved(plan: Plan, times: Sequence[float]) -> Plan:
    """All numbers of a plan with a fitted solver, on other times."""
    assert isinstance(plan.solver, FittedSolver)
    return fitted_plan(times, plan.solver.weights, plan.solver.offsets or None, plan.solver.scales or None)


def curve_of(process: ForwardProcess, plan: Plan) -> Curve:
    """All schedules from the same start in as many steps."""
    return Curve(process, plan.times[0], process.t_min, len(plan.times) - 1)
