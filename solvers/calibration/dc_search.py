"""DC-Solver's ratios, searched on the end of runs; and the cascade of polynomials through those of several searches."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from ..artifact import Artifact, FoundFor, now
from ..dc_solver import KIND, DCSolver, cascade
from .families import Family, Plan
from .search import Ascent, Search

BOUND = 0.5
"""Ratios lie within 1 +- this."""

ENOUGH = 2
"""Numbers of steps, and guidance scales, that a cascade needs at least."""

_SAME = ("model", "process", "solver", "settings", "shape")


@dataclass(frozen=True)
class Ratios(Family):
    """A DC-Solver on fixed times by its ratios: eta = 1 + BOUND tanh(theta / BOUND), from the first step on that has one."""

    solver: DCSolver
    times: tuple[float, ...]

    @property
    def since(self) -> list[int]:
        return list(range(self.solver.dc_order, len(self.times) - 1))

    @property
    def delta(self) -> np.ndarray:
        return np.full(len(self.since), 0.02)

    def natural(self, theta: np.ndarray) -> np.ndarray:
        return 1.0 + BOUND * np.tanh(theta / BOUND)

    def slope(self, theta: np.ndarray) -> np.ndarray:
        return np.diag(1.0 - np.tanh(theta / BOUND) ** 2)

    def plan(self, eta: np.ndarray) -> Plan:
        given = [1.0] * (len(self.times) - 1 - len(eta)) + [float(rho) for rho in eta]
        return Plan(replace(self.solver, ratios=", ".join(map(repr, given))), list(self.times))

    def theta(self, plan: Plan) -> np.ndarray:
        """Of a plan of this family, its ratios within the bounds."""
        known = np.array(ratios_of(plan))[-len(self.since) :] if self.since else np.empty(0)
        return BOUND * np.arctanh(np.clip((known - 1.0) / BOUND, -0.99, 0.99))


def ratios_of(plan: Plan) -> list[float]:
    """One for each step."""
    assert isinstance(plan.solver, DCSolver)
    return plan.solver.ratios_at(None, len(plan.times) - 1)


@dataclass
class RatioSearch(Search):
    """The ratios of a DC-Solver, on the end of runs, all together.

    The paper's search goes step by step and compares with the teacher on the way; it can make every state better and the end
    worse, so it is not used. ``unworthy``: on the samples kept aside they are no better than the sampler as it is.
    """

    def ascents(self, plans: dict[str, Plan]) -> Generator[Ascent | None, None, None]:
        for name, plan in plans.items():
            assert isinstance(plan.solver, DCSolver)
            family = Ratios(replace(plan.solver, ratios=""), tuple(plan.times))
            yield Ascent(name, family, family.theta(plan))

    def extra(self) -> dict[str, Any]:
        if self.best is None or not isinstance(self.best.solver, DCSolver):
            return {}
        return {"ratios": ratios_of(self.best), "dc_order": self.best.solver.dc_order}

    @property
    def unworthy(self) -> bool:
        if self.best is self.base or self.before is None or self.after is None:
            return self.best is self.base
        return self.loss(self.after) >= self.loss(self.before)


def fitted_cascade(found: Sequence[Artifact]) -> Artifact:
    """The cascade through the ratios of several searches, over their numbers of steps and guidance scales.

    Least squares; where they do not tell all 36 numbers, those nearest to no compensation. In the table, ``off``: the largest
    distance of a ratio from its polynomial. ``range``: of guidance scales and steps, outside of which it is a guess.

    ValueError, in one sentence, for searches with another model, sampler or shape, and where there are too few.
    """
    those = [a for a in found if a.kind == KIND and "ratios" in a.table and a.found_for.cfg is not None]
    steps = sorted({len(a.table["ratios"]) for a in those})
    scales = sorted({float(a.found_for.cfg or 0.0) for a in those})
    if len(steps) < ENOUGH or len(scales) < ENOUGH:
        raise ValueError(
            f"DC-Solver: a cascade needs ratios found for at least {ENOUGH} numbers of steps and {ENOUGH} guidance scales; these "
            f"are for steps {_listed(steps)} and CFG {_listed(scales)}."
        )
    first = those[0].found_for
    for other in those:
        differ = [name for name in _SAME if getattr(other.found_for, name) != getattr(first, name)]
        differ += ["dc_order"] * (other.table.get("dc_order") != those[0].table.get("dc_order"))
        if differ:
            raise ValueError(f"DC-Solver: these ratios do not belong together: their {differ[0]} differs.")
    numbers = _regression([(a.table["ratios"], float(a.found_for.cfg or 0.0)) for a in those])
    off = 0.0
    for artifact in those:
        ratios = artifact.table["ratios"]
        near = cascade(numbers, float(artifact.found_for.cfg or 0.0), len(ratios))
        off = max([off, *(abs(a - b) for a, b in zip(near[2:], ratios[2:], strict=True))])
    table: dict[str, Any] = {
        "cascade": numbers.tolist(),
        "off": off,
        "searches": len(those),
        "range": {"steps": [steps[0], steps[-1]], "cfg": [scales[0], scales[-1]]},
    }
    if "dc_order" in those[0].table:
        table["dc_order"] = those[0].table["dc_order"]
    made_for = FoundFor(**{name: getattr(first, name) for name in _SAME}, created=now())
    return Artifact(KIND, table, {}, made_for)


def _regression(searches: Sequence[tuple[list[float], float]]) -> np.ndarray:
    """The (4, 3, 3) numbers of ``cascade`` from (ratios, guidance scale) of each search."""
    rows, wanted = [], []
    for ratios, w in searches:
        n = len(ratios)
        for k, rho in enumerate(ratios[2:], 3):
            powers = product(range(4), (2, 1, 0), (2, 1, 0))
            rows.append([(k / n) ** i * (w / 12.0) ** p * (n / 50.0) ** q for i, p, q in powers])
            wanted.append(rho - 1.0)
    numbers = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=1e-8)[0].reshape(4, 3, 3)
    numbers[0, 2, 2] += 1.0
    return numbers


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values) or "none"
