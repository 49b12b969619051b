"""Runs that leave parts of the network out, a set of its own in each step, within a budget of work."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch

from ..caching.auto_diffusion import Skips
from ..caching.block_skip import PROBED, Unit
from ..process import ForwardProcess
from ..solver import Problem, SameCost, Solver, Step, solve
from .families import Plan
from .space import Knob

Sets = tuple[frozenset[str], ...]
"""Names of the units that are left out, for each step."""

EPS = 1e-9
"""Of work: what rounding may do."""


@dataclass
class Left:
    """What the network leaves out at the moment, by name. Whoever has the network looks here in each call."""

    names: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Skipping(SameCost):
    """A solver whose calls in the i-th step are made without the units ``left_out[i]`` of the ``network``."""

    left_out: Sets = ()
    network: Left = field(default_factory=Left)

    @property
    def convergence_order(self) -> int:
        return self.solver.convergence_order

    def start(self, times: Sequence[float]) -> Any:
        return 0, self.solver.start(times)

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: Any) -> Step:
        i, inner = state

        def denoise(x: torch.Tensor, t: Any) -> torch.Tensor:
            self.network.names = self.left_out[i]
            try:
                return problem.denoise(x, t)
            finally:
                self.network.names = frozenset()

        step = self.solver.step(replace(problem, denoise=denoise), x, s, t, inner)
        return Step(step.x, step.x0, (i + 1, step.state))


def called_at(solver: Solver, process: ForwardProcess, times: Sequence[float]) -> list[float]:
    """The times at which a run calls the network, in order, found out without one."""
    seen: list[float] = []

    def denoise(x: torch.Tensor, t: Any) -> torch.Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    for _ in solve(Problem(denoise, process), solver, torch.zeros(1, 1, 1, 1), times):
        pass
    return seen


@dataclass(frozen=True)
class Allowance:
    """Which sets of ``units`` are within the ``budget``: the mean share of the network's work that a run of so many ``steps``
    may cost.

    ValueError where even all units left out in all steps cost more.
    """

    units: tuple[Unit, ...]
    steps: int
    budget: float

    def __post_init__(self):
        most = sum(unit.work for unit in self.units)
        if self.needed > self.steps * most + EPS:
            raise ValueError(
                f"budget = {self.budget:g} cannot be met: all {len(self.units)} parts that may be left out come to {most:.1%} of "
                f"the network's work; allow more parts, or a budget of at least {1.0 - most:.2f}."
            )

    @property
    def needed(self) -> float:
        """The work to be left out in all steps together."""
        return self.steps * (1.0 - self.budget)

    @cached_property
    def order(self) -> list[tuple[int, Unit]]:
        """All (step, unit), those of least score per work first. A unit's scores are of some parts of a run: between them lines."""

        def price(pair: tuple[int, Unit]) -> float:
            i, unit = pair
            at = i / (self.steps - 1) if self.steps > 1 else 0.5
            score = np.interp(at, PROBED, unit.scores) if len(unit.scores) == len(PROBED) else unit.score
            return float(score) / max(unit.work, 1e-12)

        return sorted(product(range(self.steps), self.units), key=price)

    def cost(self, left_out: Sequence[Collection[str]]) -> float:
        """The mean share of the network's work."""
        return 1.0 - sum(unit.work for names in left_out for unit in self.units if unit.name in names) / self.steps

    def within(self, marked: Sequence[Collection[str]]) -> Sets:
        """Sets within the budget, made of those that are ``marked``; sets that leave out no more than needed stay as they are.

        Units are left out until the work is no more than the budget, marked ones first, each in the order of score per work.
        Then those are computed after all, the last first, without which that still holds: nothing is left out in vain.
        """
        taken: list[tuple[int, Unit]] = []
        spent = 0.0
        for i, unit in sorted(self.order, key=lambda pair: pair[1].name not in marked[pair[0]]):
            if spent >= self.needed - EPS:
                break
            taken.append((i, unit))
            spent += unit.work
        left: list[set[str]] = [set() for _ in range(self.steps)]
        for i, unit in reversed(taken):
            if spent - unit.work >= self.needed - EPS:
                spent -= unit.work
            else:
                left[i].add(unit.name)
        return tuple(map(frozenset, left))


@dataclass(frozen=True)
class SkipSpace:
    """What is searched: for each step and unit whether it is marked to be left out. Whatever the values, the run is within the
    budget."""

    allowance: Allowance

    @property
    def knobs(self) -> list[Knob]:
        return [Knob(name, "units", 0, 1) for name, _, _ in self._marks] if self.allowance.needed > EPS else []

    @property
    def _marks(self) -> list[tuple[str, int, str]]:
        pairs = product(range(self.allowance.steps), enumerate(self.allowance.units))
        return [(f"left{i}_{j}", i, unit.name) for i, (j, unit) in pairs]

    def sets(self, values: Mapping[str, Any]) -> Sets:
        marked: list[set[str]] = [set() for _ in range(self.allowance.steps)]
        for name, i, unit in self._marks:
            if values.get(name):
                marked[i].add(unit)
        return self.allowance.within(marked)

    def values(self, marked: Sequence[Collection[str]]) -> dict[str, int]:
        """Of these marks."""
        return {name: int(unit in marked[i]) for name, i, unit in self._marks}


def skips_of(plan: Plan, units: Sequence[Unit]) -> Skips:
    """What a run leaves out."""
    assert isinstance(plan.solver, Skipping)
    return Skips(tuple(plan.times), plan.solver.left_out, tuple(units))
