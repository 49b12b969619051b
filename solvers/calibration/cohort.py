"""A set of samples, what the teacher makes of each, and how far runs end from that."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from ..solver import Problem, SameCost, Solver, Step, sample, solve
from .families import Family, Plan

Visit = Callable[[Problem, torch.Tensor], Any]
Batch = Callable[[Visit], Any]
"""Some samples that are run together: ``batch(visit)`` returns ``visit(problem, x)``, x being their noised starts at t_max.
Whoever has the network makes these; between two visits it may be stopped, or serve others."""

Running = Generator[None, None, Any]
"""Yields after every visit: whoever iterates shows progress, or stops. Returns the result."""

SKETCH = 4096


def drained(running: Running, tick: Callable[[], None] = lambda: None) -> Any:
    """The result, with ``tick``, which may raise, after each visit."""
    try:
        while True:
            try:
                next(running)
            except StopIteration as end:
                return end.value
            tick()
    finally:
        running.close()  # at once: what it has taken up is then free for others


@dataclass
class Cohort:
    """Batches, and the teacher's end of each. ``calls`` counts network calls, each sample of a batch for itself; ``size`` is the
    number of samples, where it is known beforehand."""

    batches: Sequence[Batch]
    targets: list[torch.Tensor] = field(default_factory=list)
    calls: int = 0
    size: int = 0

    def visit(self, batch: Batch, visit: Visit) -> Any:
        """``batch(visit)``, with its calls counted."""

        def counted(problem: Problem, x: torch.Tensor) -> Any:
            def denoise(x: torch.Tensor, t: Any) -> torch.Tensor:
                self.calls += len(x)
                return problem.denoise(x, t)

            return visit(Problem(denoise, problem.process, problem.noise, problem.mask, problem.cfg), x)

        return batch(counted)

    def ends(self, plan: Plan) -> Running:
        """Where a run ends, batch by batch, on the CPU."""
        found = []
        for i in range(len(self.batches)):
            found.append((yield from self.end(i, plan)))
        return found

    def end(self, i: int, plan: Plan) -> Running:
        """Of one batch."""
        found = self.visit(self.batches[i], lambda problem, x: sample(problem, *_of(plan, x)).cpu())
        yield
        return found

    def residuals(self, plan: Plan) -> Running:
        """Difference to the targets, sketched, (samples, at most SKETCH), and its RMS for each sample."""
        ends = yield from self.ends(plan)
        apart = [end - target for end, target in zip(ends, self.targets, strict=True)]
        return torch.cat(list(map(sketch, apart))), torch.cat([a.flatten(1).square().mean(1).sqrt() for a in apart])

    def errors(self, plan: Plan) -> Running:
        """RMS for each sample."""
        return (yield from self.residuals(plan))[1]

    def jacobian(self, family: Family, eta: np.ndarray, share: float = 1.0) -> Running:
        """d residuals / d eta, (samples, at most SKETCH, eta), by forward differences, for this share of the batches.

        Steps before the one that a parameter acts on are not repeated: a step is a pure function of its state.
        """
        plan, found = family.plan(eta), []
        for batch in self.batches[: math.ceil(share * len(self.batches))]:
            trail = self.visit(batch, lambda problem, x: track(problem, plan, x))
            yield
            columns: list[torch.Tensor] = []
            for since, group in groupby(range(len(eta)), lambda q: family.since[q]):
                moved = [(q, family.plan(_moved(eta, q, family.delta[q]))) for q in group]

                def visit(
                    problem: Problem, x: torch.Tensor, moved=moved, since=since, trail=trail
                ) -> list[torch.Tensor]:
                    ends = [rejoin(problem, other, trail, since) for _, other in moved]
                    return [sketch((end - trail[-1].x).cpu()) for end in ends]

                made = self.visit(batch, visit)
                columns += [column / float(family.delta[q]) for column, (q, _) in zip(made, moved, strict=True)]
                yield
            found.append(torch.stack(columns, -1) if columns else sketch(trail[-1].x.cpu())[..., None][..., :0])
        return torch.cat(found)


class Mark(NamedTuple):
    """Where a run is before a step, and after the last one."""

    x: torch.Tensor
    state: Any


def track(problem: Problem, plan: Plan, x: torch.Tensor) -> list[Mark]:
    """A run with all its states."""
    marks = [Mark(x, plan.solver.start(plan.times))]
    for step in solve(problem, plan.solver, x, plan.times):
        marks.append(Mark(step.x, step.state))
    return marks


def rejoin(problem: Problem, plan: Plan, trail: Sequence[Mark], since: int) -> torch.Tensor:
    """The end of a run that is the tracked one up to step ``since``; of the whole run if its solver looks ahead."""
    if plan.solver.start(plan.times) != trail[0].state:
        since = 0
    mark = trail[since]
    if since == 0:
        return sample(problem, *_of(plan, mark.x))
    return sample(problem, Resumed(plan.solver, mark.state), mark.x, plan.times[since:])


@dataclass(frozen=True)
class Resumed(SameCost):
    """A solver in the middle of its run."""

    state: Any = None

    @property
    def convergence_order(self) -> int:
        return self.solver.convergence_order

    def start(self, times: Sequence[float]) -> Any:
        return self.state

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: Any) -> Step:
        return self.solver.step(problem, x, s, t, state)


def _of(plan: Plan, x: torch.Tensor) -> tuple[Solver, torch.Tensor, list[float]]:
    return plan.solver, x, plan.times


def _moved(eta: np.ndarray, q: int, by: float) -> np.ndarray:
    moved = eta.copy()
    moved[q] += by
    return moved


def sketch(apart: torch.Tensor) -> torch.Tensor:
    """Each row as at most SKETCH numbers whose sum of squares is about the mean square of the row.

    Numbers are thrown, with random signs, on SKETCH heaps, always the same: inner products keep their mean. Exact if there are
    no more than that.
    """
    flat = apart.flatten(1)
    d = flat.shape[1]
    if d > SKETCH:
        heap, sign = _heaps(d)
        flat = flat.new_zeros(len(flat), SKETCH).index_add_(1, heap, flat * sign)
    return flat / d**0.5


@lru_cache(maxsize=2)
def _heaps(d: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randint(SKETCH, (d,), generator=g), torch.randint(2, (d,), generator=g) * 2.0 - 1.0
