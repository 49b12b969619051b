"""The solver that chooses: by the kind of model, the guidance scale and the number of steps, when sampling starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .exponential import DPMSolverPP
from .process import ForwardProcess
from .solver import Problem, Solver, Step


def choose(process: ForwardProcess, steps: int, cfg: float | None) -> Solver:
    """What ``benchmarks/results/solvers.md`` found best; an unknown guidance scale counts as a high one."""
    return DPMSolverPP(order=2)


@dataclass(frozen=True)
class Auto(Solver):
    """Chooses the solver when sampling starts: by the kind of model, the guidance scale and the number of steps.

    One network call per step, no added noise. What it chooses is what was best in this pack's own measurements.
    """

    id: ClassVar[str] = "Auto"
    title: ClassVar[str] = "auto"
    paper: ClassVar[str] = ""

    convergence_order: ClassVar[int] = 2
    draws: ClassVar[None] = None

    def start(self, times: Sequence[float]) -> Any:
        return tuple(times), None, None

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: Any) -> Step:
        times, solver, inner = state
        if solver is None:
            solver = choose(problem.process, len(times) - 1, problem.cfg)
            inner = solver.start(times)
        step = solver.step(problem, x, s, t, inner)
        return Step(step.x, step.x0, (times, solver, step.state))
