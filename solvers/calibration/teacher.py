"""The teacher: a run with so many steps that its end is the solution, and how that is known."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import or_

import torch

from ..exponential import DPMSolverPP
from ..process import ForwardProcess
from ..schedules import ExponentialSchedule
from ..solver import Problem
from .cohort import Cohort, Running, sketch, track
from .families import Plan
from .losses import LOSSES, Loss
from .shared import Do, Job, in_turn
from .states import States

STEPS, MOST, SHARE, ROOM = 40, 640, 0.1, 0.8


def lesson(process: ForwardProcess, steps: int) -> Plan:
    """The teacher's run: third order, uniform in log-SNR."""
    times = ExponentialSchedule()(process, process.t_max, process.t_min, steps)
    return Plan(DPMSolverPP(order=3, third_order="exact", lower_order_final="never"), times.tolist())


def named(kind: str, which: object, batch: int) -> str:
    """A result of one batch: of the teacher with so many steps, or of a student, by what it does."""
    return f"{kind}-{which}-{batch}"


def converge(
    cohort: Cohort,
    process: ForwardProcess,
    students: Sequence[Plan],
    left: Callable[[], float] = lambda: 1.0,
    loss: Loss = LOSSES["rms"],
    do: Do = in_turn,
) -> Running:
    """How many steps the teacher needs, its mean error then, and the losses of students by number, all on a few samples.

    It has enough steps when twice as many change its end by no more than SHARE of what the best student is off, which is the
    error that is going to be made smaller. No more than MOST, nor when less than ROOM of the budget is left; then no more
    students are run either, but the first one is. do: who does the runs, which are named after ``named``.
    """
    few, steps = range(max(len(cohort.batches) // 4, 1)), STEPS

    def runs(steps: int) -> dict[str, Job]:
        return {named("teacher", steps, i): partial(cohort.end, i, lesson(process, steps)) for i in few}

    def student(plan: Plan, i: int) -> Running:
        return sketch((yield from cohort.end(i, plan)))

    def wanted(name: str) -> bool:
        return name not in more or left() >= ROOM

    signs = [hashlib.sha256(repr(plan).encode()).hexdigest()[:12] for plan in students]
    tried = [
        {named("start", sign, i): partial(student, plan, i) for i in few}
        for sign, plan in zip(signs, students, strict=True)
    ]
    more = {name for jobs in tried[1:] for name in jobs} - tried[0].keys()
    found = yield from do(reduce(or_, tried, runs(steps)) | runs(2 * steps), wanted)
    whole = {
        k: torch.cat([found[name] for name in jobs]) for k, jobs in enumerate(tried) if jobs.keys() <= found.keys()
    }
    while True:
        coarse, fine = (sketch(torch.cat([found[name] for name in runs(n)])) for n in (steps, 2 * steps))
        change, off = (coarse - fine).norm(dim=1), {k: (made - fine).norm(dim=1) for k, made in whole.items()}
        if _mean(change) <= SHARE * min(map(_mean, off.values())) or 4 * steps > MOST or left() < ROOM:
            return steps, _mean(change), {k: loss(rms) for k, rms in off.items()}
        steps *= 2
        found |= yield from do(runs(2 * steps), wanted)


def _mean(rms: torch.Tensor) -> float:
    """Infinite where one is not finite."""
    mean = float(rms.mean())
    return mean if math.isfinite(mean) else math.inf


def teach(cohort: Cohort, process: ForwardProcess, steps: int) -> Running:
    """Gives the cohort its targets."""
    cohort.targets = yield from cohort.ends(lesson(process, steps))


class Trajectories:
    """The teacher's states of a cohort, at any time.

    Kept are x and dx / dlog sigma = x - D at the teacher's own steps; between them x is the cubic with these values and slopes,
    in log sigma, where the equation has this form for all models.
    """

    def __init__(self, process: ForwardProcess, steps: int, samples: int, shape: Sequence[int], folder: str):
        self.plan = lesson(process, steps)
        self.x, self.slope = (States(steps, samples, shape, folder, files=files) for files in (2, 1))

    @property
    def nbytes(self) -> int:
        return self.x.nbytes + self.slope.nbytes

    def teach(self, cohort: Cohort) -> Running:
        """Stores the cohort's, and gives it its targets."""
        cohort.targets, at = [], 0
        for batch in cohort.batches:

            def visit(problem: Problem, x: torch.Tensor, at=at) -> torch.Tensor:
                seen: list[torch.Tensor] = []

                def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
                    x0 = problem.denoise(x, t)
                    self.x.put(len(seen), at, x)
                    self.slope.put(len(seen), at, x - x0)
                    seen.append(x[:0])
                    return x0

                return track(Problem(denoise, problem.process), self.plan, x)[-1].x.cpu()

            cohort.targets.append(cohort.visit(batch, visit))
            at += len(cohort.targets[-1])
            yield

    def at(self, t: float, sample: int, count: int) -> torch.Tensor:
        """x at time t of some samples."""
        times = self.plan.times[:-1]
        i = min(max(bisect_right([-time for time in times], -t) - 1, 0), len(times) - 2)
        a, b = math.log(times[i]), math.log(times[i + 1])
        u, h = (math.log(t) - a) / (b - a), b - a
        x0, x1 = (self.x.get(level, sample, count) for level in (i, i + 1))
        m0, m1 = (self.slope.get(level, sample, count) for level in (i, i + 1))
        return (
            x0 * ((1 + 2 * u) * (1 - u) ** 2)
            + x1 * (u * u * (3 - 2 * u))
            + m0 * (h * u * (1 - u) ** 2)
            - m1 * (h * u * u * (1 - u))
        )

    def close(self) -> None:
        self.x.close()
        self.slope.close()
