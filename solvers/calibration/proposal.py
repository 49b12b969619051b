"""Schedules proposed by what is measured on a model once: the base of all such methods, and the search that tries them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..artifact import settings_of
from ..method import Method
from ..process import ForwardProcess
from ..schedules import Schedule
from ..solver import Solver
from .cohort import Cohort, Running
from .families import Plan
from .fitted import FittedSolver
from .search import Ascent, Search, curve_of
from .teacher import Trajectories

Measured = dict[str, Any]
"""What was measured, as JSON values: small, and all that schedules of any number of steps need."""

Measuring = Iterator[Measured | None]
"""None after every visit of the network; a measurement whenever there is one to try, the last one being final."""

SHARES = (1.0, 0.6, 0.4, 0.2)
"""Of the way from the best usual schedule to the proposed one, in log noise-to-signal."""

STALE = 3
"""Measurements in a row without gain that end a search."""


@dataclass(frozen=True)
class Proposal(Method):
    """Abstract: a method that measures a model once, and makes schedules of any number of steps from that.

    It has an objective of its own, so what it proposes is a candidate: ``ProposalSearch`` decides by the finished samples.

    ``states``: whether ``measure`` reads the teacher's states; then ``teacher`` has at least ``levels`` of them.
    """

    states: ClassVar[bool] = False

    @property
    @abstractmethod
    def levels(self) -> int:
        """Of noise, at which is measured; 0 where nothing is."""

    @property
    @abstractmethod
    def most(self) -> int:
        """The largest number of steps that it has schedules for."""

    @abstractmethod
    def measure(self, cohort: Cohort, process: ForwardProcess, teacher: Trajectories | None, steps: int) -> Measuring:
        """Measures on a cohort that has its targets. A method that needs no network yields ``{}`` at once.

        steps: those of the run that is going to be improved, for methods that cannot serve all numbers equally.
        """

    @abstractmethod
    def times(self, measured: Measured, process: ForwardProcess, steps: int, order: int) -> list[float]:
        """t_max = t_0 > ... > t_steps = 0, for 2 to ``most`` steps. order: the sampler's order of convergence.

        ValueError, in one sentence, for a number of steps about which this measurement says nothing.
        """


@dataclass(frozen=True)
class Computed(Proposal):
    """Abstract: a proposal that needs no network, only the model's range of noise."""

    @property
    def levels(self) -> int:
        return 0

    @property
    def most(self) -> int:
        return 60

    def measure(self, cohort: Cohort, process: ForwardProcess, teacher: Trajectories | None, steps: int) -> Measuring:
        yield {}


def blended(process: ForwardProcess, begin: Sequence[float], end: Sequence[float], share: float) -> list[float]:
    """Some share of the way from one schedule to another of as many steps, in log noise-to-signal."""
    curve = curve_of(process, Plan(FittedSolver(), list(begin)))
    return curve.times((1.0 - share) * curve.levels_of(begin) + share * curve.levels_of(end))


def described(method: Method) -> dict[str, Any]:
    """A method as JSON."""
    return {"id": method.id, **settings_of(method)}


@dataclass(kw_only=True)
class ProposalSearch(Search):
    """What a ``Proposal`` makes of a model, tried against the usual schedules.

    The usual schedules are compared, the model is measured, and then the proposed schedule is tried, and some on the way to it
    from the best usual one: most such methods go too far, as their objective is not the finished sample. What is kept is the best
    on the samples that select, the usual one included. With 1 step, and where the best start is the teacher already, nothing is
    measured.

    schedules: by the names of ``starts``. samples, shape, folder: for the teacher's states.
    """

    solver: Solver
    proposal: Proposal
    schedules: Mapping[str, Schedule]
    folder: str = ""
    samples: int = 0
    shape: tuple[int, ...] = ()
    trajectories: Trajectories | None = None
    measured: Measured | None = None
    proposed: list[float] | None = None
    share: float = 0.0

    def teach(self) -> Running:
        if not self.proposal.states:
            return (yield from super().teach())
        steps = max(self.teacher_steps, self.proposal.levels)
        self.trajectories = Trajectories(self.process, steps, self.samples, self.shape, self.folder)
        yield from self.trajectories.teach(self.fit)

    def ascents(self, plans: dict[str, Plan]) -> Iterator[Ascent | None]:
        assert self.base is not None
        steps, order, stale = len(self.base.times) - 1, self.solver.convergence_order, 0
        if steps == 1:
            return
        for found in self.proposal.measure(self.fit, self.process, self.trajectories, steps):
            yield
            if found is None:
                continue
            times = self.proposal.times(found, self.process, steps, order)
            before = self.best
            yield from self._try(found, times)
            stale = 0 if self.best is not before else stale + 1
            if stale == STALE:
                return

    def _try(self, found: Measured, times: list[float]) -> Iterator[None]:
        assert self.base is not None
        if self.measured is None:
            self.measured, self.proposed = found, times
        for share in SHARES:
            plan = Plan(self.solver, blended(self.process, self.base.times, times, share))
            loss = self.loss((yield from self.fit.errors(plan)))
            yield from self._consider(plan, loss, f"{self.proposal.title}, {share:.0%} from {self.base_label}")
            if self.best is plan:
                self.measured, self.proposed, self.share = found, times, share

    def extra(self) -> dict[str, Any]:
        """All that a schedule of another number of steps is made of: see ``library.again``."""
        made = {"proposal": described(self.proposal), "start": described(self.schedules[self.base_label])}
        return made | {
            "share": self.share,
            "order": self.solver.convergence_order,
            "proposed": self.proposed,
            "measured": self.measured,
        }

    def release(self) -> None:
        if self.trajectories is not None:
            self.trajectories.close()
            self.trajectories = None


def rounded(values: Any) -> list:
    """Nested lists of numbers to 6 digits: short in a file, and what the schedule is computed from already."""
    if isinstance(values, np.ndarray):
        values = values.tolist()
    return [rounded(v) if isinstance(v, list) else float(f"{v:.6g}") for v in values]
