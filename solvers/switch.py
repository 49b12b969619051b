"""One solver in a window of the run, another one outside: ODE, then SDE, then ODE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .anew import check_given_times, check_starts_anew, remembers
from .method import param, part
from .process import ForwardProcess
from .solver import Problem, Solver, Step, Wrapper


@dataclass(frozen=True)
class Switch(Wrapper):
    """Two samplers in one run: one between start_percent and end_percent, the other before and after. Noise in the
    middle only (SDE-DPM-Solver++ inside, DPM-Solver++ outside) redraws the picture where errors are made, and leaves
    its layout and its fine detail to the quieter sampler.

    A step from sigma s is taken by ``inside`` if  t(1 - end_percent) < s <= t(1 - start_percent),  where t(u) is the
    model's sigma at training time u: ComfyUI's percents, 0 for pure noise, 1 for clean. A window that no sigma falls
    into changes nothing.

    Where the samplers take turns, the new one starts without a past, so a multistep sampler begins with a first-order
    step there, and the order of the whole is at most 2. Calls are those of the sampler that takes the step. Noise is
    one path for both if neither asks for independent noise.

    Raises ValueError for samplers that choose their own steps.

    Source: the mixed window is that of MixGRPO (Li et al. 2025, arXiv:2507.21802) and of EDM's S_tmin, S_tmax.
    """

    id: ClassVar[str] = "Switch"
    title: ClassVar[str] = "Switch samplers in a window"
    paper: ClassVar[str] = "Li et al. (2025), arXiv:2507.21802"

    inside: Solver = part("solver", "The sampler inside the window: one of Quickstep's.")  # noqa: RUF009
    start_percent: float = param(
        0.2, "Where the window starts: 0 is the start of the run, pure noise.", min=0.0, max=1.0, step=0.01
    )
    end_percent: float = param(
        0.8, "Where the window ends: 1 is the end, the clean picture.", min=0.0, max=1.0, step=0.01
    )

    def __post_init__(self):
        super().__post_init__()
        for solver in self.both:
            check_given_times(solver, self.title)
        if self.start_percent > self.end_percent:
            raise ValueError(f"{self.title}: start_percent must not be above end_percent.")

    @property
    def both(self) -> tuple[Solver, Solver]:
        return self.solver, self.inside

    @property
    def calls(self) -> int:
        return max(solver.calls for solver in self.both)

    @property
    def convergence_order(self) -> int:
        order = min(solver.convergence_order for solver in self.both)
        return min(order, 2) if any(map(remembers, self.both)) else order

    @property
    def draws(self) -> str | None:
        wanted = {solver.draws for solver in self.both} - {None}
        return "gaussian" if "gaussian" in wanted else next(iter(wanted), None)

    def nfe(self, steps: int) -> int | None:
        """None where it depends on who takes which step."""
        outside, inside = (solver.nfe(steps) for solver in self.both)
        forgetful = outside != steps and any(map(remembers, self.both))
        return None if outside != inside or forgetful else outside

    def start(self, times: Sequence[float]) -> tuple[tuple[float, ...], int, Solver | None, Any]:
        for solver in self.both:
            check_starts_anew(solver, times, self.title)
        return tuple(times), 0, None, None

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: Any) -> Step:
        times, i, before, inner = state
        solver = self.inside if self.covers(problem.process, s) else self.solver
        if solver is not before:
            inner = solver.start(times[i:])
        step = solver.step(problem, x, s, t, inner)
        return Step(step.x, step.x0, (times, i + 1, solver, step.state))

    def covers(self, process: ForwardProcess, s: float) -> bool:
        """Whether the step from s belongs to ``inside``."""
        begins = self.start_percent == 0.0 or s <= process.t_of_u(1.0 - self.start_percent)
        ended = self.end_percent < 1.0 and s <= process.t_of_u(1.0 - self.end_percent)
        return bool(begins and not ended)
