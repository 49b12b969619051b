"""The engine of solvers that choose their step sizes, one for each sample of the batch.

A trial step is taken by an embedded pair: a result and a lower-order solution from the same network calls, whose
difference is the error. A controller accepts or rejects it and proposes the next length. Each row of the batch has its own
time, length and verdict, so that its result does not depend on the other rows. The network is called once per stage
for the whole batch, with one time per row; rows that have arrived wait at their end.

The given times only say when a preview is due: a step ends once every row has passed its time. Its x is where each row
really is, which may be beyond. The last positive time is hit exactly; from there a step to 0 is the prediction itself.

The errors of all rows are read back from the device once per trial: a length cannot be chosen without.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from . import region
from .kernel import Kernel, begin, framed
from .process import ForwardProcess
from .runge_kutta import Stage, Tableau, reach, time_of
from .solver import Problem, Solver, Step

NEGLIGIBLE = 1e-5
"""Shortest step, in the kernel's variable; a rest shorter than this is taken along by the step before."""


@dataclass(frozen=True)
class Pair:
    """An embedded pair.

    inner: where the network is asked, besides the start.
    result: the stage that is the new x; None if it is the last of ``inner``, whose prediction then begins the next step.
    lower: one or two other solutions at the end, to compare with.
    """

    inner: Tableau
    result: Stage | None
    lower: tuple[Stage, ...]

    def error(self, e: Sequence[float]) -> float:
        """Of the distances to ``lower``; with two of them Hairer's stretched estimate, e_1^2 / sqrt(e_1^2 + 0.01 e_2^2)."""
        return e[0] if len(e) == 1 or e[0] == 0.0 else e[0] ** 2 / math.hypot(e[0], 0.1 * e[1])


@dataclass(frozen=True)
class Verdict:
    """accept: whether the trial counts. h: length of the next one. memory: the controller's."""

    accept: bool
    h: float
    memory: Any


class Controller(ABC):
    @abstractmethod
    def judge(self, E: float, h: float, memory: Any) -> Verdict:
        """About a trial of length h, whose error is E times what is allowed; memory is None at the start."""


@dataclass(frozen=True)
class Row:
    """One sample, of shape (1, ...).

    t, h: its time, and the length of its next trial in the kernel's variable.
    x0: the latest prediction; ``known`` if it is the one at t.
    low: the lower-order solution of the last accepted step.
    calls: the predictions it has needed itself.
    """

    x: torch.Tensor
    t: float
    h: float
    x0: torch.Tensor
    low: torch.Tensor
    known: bool = True
    calls: int = 1
    memory: Any = None


@dataclass(frozen=True)
class Run:
    """The given times and the rows, none before the first call."""

    times: tuple[float, ...]
    rows: tuple[Row, ...] = ()

    @property
    def end(self) -> float:
        """The last positive time."""
        return self.times[-1] or self.times[-2]


class Adaptive(Solver):
    """Abstract: a solver given by an embedded pair, its kernel and frame, a controller and a tolerance."""

    max_calls: int
    draws: ClassVar[None] = None

    @property
    @abstractmethod
    def kernel(self) -> Kernel: ...

    @property
    @abstractmethod
    def in_frame(self) -> str: ...

    @property
    @abstractmethod
    def pair(self) -> Pair: ...

    @property
    @abstractmethod
    def controller(self) -> Controller: ...

    @abstractmethod
    def first(self, length: float) -> float:
        """Length of the first trial of a run over ``length`` in the kernel's variable."""

    @abstractmethod
    def allowed(self, row: Row, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """The error allowed at every element."""

    @property
    def calls(self) -> int:
        """Of an accepted step; repeating a rejected one costs one less, since the prediction at its start is known."""
        return len(self.pair.inner) + (self.pair.result is not None)

    def nfe(self, steps: int) -> None:
        return None

    def start(self, times: Sequence[float]) -> Run:
        return Run(tuple(times))

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: Run) -> Step:
        process = framed(problem.process, self.in_frame)
        if state.rows:
            rows = tuple(replace(row, x=own) for row, own in zip(state.rows, x.split(1), strict=True))
        else:
            rows = self._first(problem, process, x, s, t, state.end)
        if t == 0.0:
            rows = _asked(problem, rows, state.end)
            x0 = torch.cat([row.x0 for row in rows])
            return Step(x0, x0, replace(state, rows=rows))
        while any(row.t > t for row in rows):
            rows = self._trial(problem, process, _asked(problem, rows, state.end), state)
        return Step(torch.cat([r.x for r in rows]), torch.cat([r.x0 for r in rows]), replace(state, rows=rows))

    def _first(self, problem, process: ForwardProcess, x: torch.Tensor, s: float, t: float, end: float):
        x0 = problem.denoise(x, s)
        if t > 0.0:
            x, s = begin(process, x, s, t, x0)
        h = self.first(abs(self.kernel.place(process, end) - self.kernel.place(process, s)))
        return tuple(Row(own, s, h, predicted, own) for own, predicted in zip(x.split(1), x0.split(1), strict=True))

    def _goal(self, process: ForwardProcess, row: Row, run: Run) -> float:
        """Where the next trial of a row leads."""
        if self._spent(row):
            return next(t for t in run.times if t < row.t)
        place, last = self.kernel.place(process, row.t), self.kernel.place(process, run.end)
        h = max(row.h, NEGLIGIBLE)
        if abs(last - place) - h < NEGLIGIBLE:
            return run.end
        return self.kernel.time(process, place + math.copysign(h, last - place))

    def _spent(self, row: Row) -> bool:
        return row.calls + len(self.pair.inner) > self.max_calls

    def _trial(self, problem: Problem, process: ForwardProcess, rows: tuple[Row, ...], run: Run) -> tuple[Row, ...]:
        """One trial step of every row that is not at the end."""
        kernel, pair = self.kernel, self.pair
        goals = {i: self._goal(process, row, run) for i, row in enumerate(rows) if row.t > run.end}
        values = [[kernel.read(process, row.x, row.x0, row.t)] for row in rows]

        def at(i: int, stage: Stage) -> torch.Tensor:
            u = time_of(process, kernel, stage, rows[i].t, goals[i])
            return reach(process, kernel, pair.inner, stage, rows[i].x, rows[i].t, u, values[i])

        points, answers = [row.x for row in rows], ()
        for stage in pair.inner:
            times = [row.t for row in rows]
            for i, goal in goals.items():
                points[i], times[i] = at(i, stage), time_of(process, kernel, stage, rows[i].t, goal)
            answers = _ask(problem, points, times)
            for i in goals:
                values[i].append(kernel.read(process, points[i], answers[i], times[i]))
        high = {i: points[i] if pair.result is None else at(i, pair.result) for i in goals}
        low = {i: [at(i, stage) for stage in pair.lower] for i in goals}
        errors = [self._distances(problem, i, rows[i], high[i], low[i]) for i in goals]

        moved = list(rows)
        for (i, goal), e in zip(goals.items(), torch.stack(errors).tolist(), strict=True):
            row, E = rows[i], pair.error(e)
            h = abs(kernel.place(process, goal) - kernel.place(process, row.t))
            verdict = (
                self.controller.judge(E, h, row.memory) if math.isfinite(E) else Verdict(False, h / 10, row.memory)
            )
            calls = row.calls + len(pair.inner)
            if not verdict.accept and not self._spent(row):
                moved[i] = replace(row, h=verdict.h, calls=calls, memory=verdict.memory)
            elif pair.result is None:
                moved[i] = Row(high[i], goal, verdict.h, answers[i], low[i][0], True, calls, verdict.memory)
            else:
                moved[i] = Row(high[i], goal, verdict.h, row.x0, low[i][0], False, calls, verdict.memory)
        return tuple(moved)

    def _distances(
        self, problem: Problem, i: int, row: Row, high: torch.Tensor, low: list[torch.Tensor]
    ) -> torch.Tensor:
        mask = problem.mask if problem.mask is None or len(problem.mask) == 1 else problem.mask[i : i + 1]
        allowed = self.allowed(row, high, low[0])
        return torch.stack([region.rms((high - other) / allowed, mask).flatten()[0] for other in low])


def _ask(problem: Problem, x: Sequence[torch.Tensor], times: Sequence[float]) -> tuple[torch.Tensor, ...]:
    """One network call for all rows."""
    same = all(t == times[0] for t in times)
    return problem.denoise(torch.cat(tuple(x)), times[0] if same else list(times)).split(1)


def _asked(problem: Problem, rows: tuple[Row, ...], end: float) -> tuple[Row, ...]:
    """The rows with their predictions known; a row that waits at the end does not count the call."""
    if all(row.known for row in rows):
        return rows
    answers = _ask(problem, [row.x for row in rows], [row.t for row in rows])
    return tuple(
        row if row.known else replace(row, x0=answer, known=True, calls=row.calls + (row.t > end))
        for row, answer in zip(rows, answers, strict=True)
    )
