"""The solver that chooses: by the kind of model, the guidance scale and the number of steps, when sampling starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .deis import DEIS
from .momentum import GHVB
from .process import ForwardProcess
from .solver import Problem, Solver, Step
from .unipc import UniPC


def choose(process: ForwardProcess, steps: int, cfg: float | None) -> Solver:
    """By the tables over all cells of a kind in ``benchmarks/results/solvers_ranking.md``; an unknown guidance scale counts as a
    high one."""
    if process.alpha(process.t_max) < 1.0:
        return UniPC(order=2, variant="exact")
    return DEIS(variable="lambda") if steps >= 10 and cfg is not None and cfg <= 1.5 else GHVB()


@dataclass(frozen=True)
class Auto(Solver):
    """Chooses the solver when sampling starts: by the kind of model, the guidance scale and the number of steps.

    Flow models: UniPC of order 2, with exact weights. Others: GHVB 1.8, or from 10 steps on without guidance (CFG at most
    1.5) DEIS in log-SNR. One network call per step, no added noise. Chosen because they are never far from the best over the
    exact problems and the demo networks from 5 to 10 calls (benchmarks/results/solvers_ranking.md), which does not make them the
    best of every cell; none was measured on a large checkpoint.
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
