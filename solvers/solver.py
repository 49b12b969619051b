"""Problem, Step, Solver and the one sampling loop."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch

from .method import Method, part
from .process import ForwardProcess

Denoise = Callable[[torch.Tensor, float | Sequence[float]], torch.Tensor]
"""``(x_t, t) -> x_0``: the network's guess of the clean sample, guidance and masks included. One call is one NFE.

t is one time for the whole batch; only solvers with a step size per sample give a sequence, one time for each row."""

Noise = Callable[[float, float], torch.Tensor]
"""``(s, t) -> z``: standard normal noise for the interval from s down to t, of the shape, dtype and device of x."""


def no_noise(s: float, t: float) -> torch.Tensor:
    raise ValueError("this solver draws noise, but the problem has no noise source")


@dataclass(frozen=True)
class Problem:
    """What is to be solved: ``dx/dt`` given by a denoiser and a forward process, and where noise comes from.

    mask: 1 where the sample is edited, broadcastable to x; None: everywhere. For statistics only (``region.py``): the
        denoiser takes care of the kept part itself.
    cfg: the guidance scale inside ``denoise``, where it is known. For choosing defaults only.
    """

    denoise: Denoise
    process: ForwardProcess
    noise: Noise = no_noise
    mask: torch.Tensor | None = None
    cfg: float | None = None


@dataclass(frozen=True)
class Step:
    """The result of one step: the new ``x`` at t, the ``x0`` predicted on the way, the state for the next step."""

    x: torch.Tensor
    x0: torch.Tensor
    state: Any


@dataclass(frozen=True)
class Solver(Method):
    """A method to go from x_s to x_t: frozen settings and one pure step.

    Besides ``Method``'s, subclasses declare

    - ``calls``: network calls per step; a last step to t = 0 takes one.
    - ``draws``: which of ``solvers.noise.SOURCES`` a step draws from; None if it draws nothing.
    - ``convergence_order``: global order on a smooth problem, once the history is filled; with stochastic settings the
      weak order, that of the variance on Gaussian data.
    """

    calls: ClassVar[int] = 1

    @property
    @abstractmethod
    def convergence_order(self) -> int: ...

    @property
    @abstractmethod
    def draws(self) -> str | None: ...

    @property
    def stochastic(self) -> bool:
        """Whether a step draws noise with these settings."""
        return self.draws is not None

    def nfe(self, steps: int) -> int | None:
        """Network calls of a run over ``steps`` steps to t = 0; None where the data decide."""
        return self.calls * (steps - 1) + 1 if steps > 0 else 0

    @abstractmethod
    def start(self, times: Sequence[float]) -> Any:
        """The state before the first of the steps over ``times``."""

    @abstractmethod
    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: Any) -> Step:
        """One step from time s to t < s. Changes neither ``x`` nor ``state``; t = 0 is the clean sample."""


def check_times(times: Sequence[float], process: ForwardProcess) -> None:
    """Raise ``ValueError`` unless the times decrease strictly, are finite, and lie in the process' domain."""
    for i, t in enumerate(times):
        if not math.isfinite(t):
            raise ValueError(f"sigmas[{i}] is {t}; every sigma must be a finite number.")
        if t < 0:
            raise ValueError(f"sigmas[{i}] is {t!r}; a sigma cannot be negative.")
        if process.alpha(t) < 0:
            raise ValueError(f"sigmas[{i}] is {t!r}, but this is a flow model, whose sigmas lie between 0 and 1.")
    for i, (s, t) in enumerate(pairwise(times)):
        if t >= s:
            raise ValueError(f"sigmas must decrease, but sigmas[{i}] is {s!r} and sigmas[{i + 1}] is {t!r}.")


def solve(problem: Problem, solver: Solver, x: torch.Tensor, times: Sequence[float]) -> Iterator[Step]:
    """Run ``solver`` over ``times`` (strictly decreasing floats), yielding every step.

    The only loop of the pack: previews, trajectories, early stops and optimizers all consume this iterator. The last
    step's ``x`` is the sample at ``times[-1]``; with fewer than two times nothing is yielded.
    """
    times = [float(t) for t in times]
    check_times(times, problem.process)
    state = solver.start(times)
    for s, t in pairwise(times):
        step = solver.step(problem, x, s, t, state)
        x, state = step.x, step.state
        yield step


def sample(problem: Problem, solver: Solver, x: torch.Tensor, times: Sequence[float]) -> torch.Tensor:
    """The final x of ``solve``."""
    for step in solve(problem, solver, x, times):
        x = step.x
    return x


@dataclass(frozen=True)
class Wrapper(Solver):
    """Abstract: a solver made of another one, which it uses for its steps."""

    solver: Solver = part("solver", "The sampler to build on: one of Quickstep's.")  # noqa: RUF009


class SameCost(Wrapper):
    """Abstract: a wrapper whose runs make the calls, and draw the noise, of the wrapped solver's."""

    @property
    def calls(self) -> int:
        return self.solver.calls

    @property
    def draws(self) -> str | None:
        return self.solver.draws

    def nfe(self, steps: int) -> int | None:
        return self.solver.nfe(steps)
