"""The space that black-box searches look in: solver schedules (USF tables) of few steps, by named parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ..process import ForwardProcess
from ..usf import USF
from ..usf_table import Row, Table
from .curve import Curve
from .families import Plan

WIDE, NEAR, BENT = 4.0, 0.9, 0.3
"""Range of the logits of gaps, about their mean or, NEAR, about a given centre; and of ``relax_value``."""

PREDICTIONS = {"data": ("data", "lambda"), "noise": ("noise", "lambda"), "noise in rho": ("noise", "rho")}
RELAXATIONS = ("none", "dpmsolver-2", "unipc-bh1", "linear")
DECISIONS = ("times", "order", "prediction", "derivative", "corrector")
"""What may be decided for each step."""

Values = Mapping[str, Any]


class Knob(NamedTuple):
    """A parameter: one of ``options``, or a number from low to high, whole where these are."""

    name: str
    decision: str
    low: float = 0.0
    high: float = 0.0
    options: tuple[str, ...] = ()


KNOWN: dict[str, dict[str, Any]] = {
    "DDIM": {},
    "DPM-Solver++ 2M": {"order": 2, "relax": "dpmsolver-2"},
    "DPM-Solver++ 3M": {"order": 3},
    "UniPC 2": {"order": 2, "corrector": "pseudo"},
    "UniPC 3": {"order": 3, "corrector": "pseudo"},
    "DPM-Solver 2M": {"order": 2, "prediction": "noise"},
    "DEIS 2": {"order": 2, "prediction": "noise in rho"},
    "DEIS 3": {"order": 3, "prediction": "noise in rho"},
}
"""Usual samplers by their decisions, the same in each step as far as enough predictions are known."""


@dataclass(frozen=True)
class Space:
    """Solver schedules with ``least`` to ``most`` steps.

    Of each step: where it ends (``time``: logits of a ``Curve``, about their mean), its ``order``, what is predicted
    (``prediction``), how derivatives are estimated (``more``: with one prediction more than needed; ``relax`` and ``bend``, see
    ``USF``) and the ``corrector``; those with the prediction evaluated once more (implicit) only where calls are not fixed.

    All parameters always exist, those of steps that a schedule does not have are idle. ``fixed``: values that are not
    searched; ``centre``: times about which to search. Whatever the values, a valid table comes out: no order is higher than
    what is known by then allows.
    """

    process: ForwardProcess
    least: int
    most: int
    orders: int = 3
    decisions: tuple[str, ...] = DECISIONS
    fixed: Values = field(default_factory=dict)
    centre: Values = field(default_factory=dict)

    @property
    def knobs(self) -> list[Knob]:
        """All that is searched."""
        made = [Knob("steps", "calls", self.least, self.most)] if self.least < self.most else []
        if self.most > 1:
            made += [Knob(f"time{i}", "times", *self._reach(f"time{i}")) for i in range(1, self.most + 1)]
        correctors = ("none", "pseudo", "implicit") if self.least < self.most else ("none", "pseudo")
        for i in range(1, self.most):  # the last step is the prediction itself
            if i > 1:
                made.append(Knob(f"order{i}", "order", 1, min(i, self.orders)))
                made.append(Knob(f"prediction{i}", "prediction", options=tuple(PREDICTIONS)))
                made.append(Knob(f"relax{i}", "derivative", options=RELAXATIONS))
                made.append(Knob(f"bend{i}", "derivative", -BENT, BENT))
            if i > 2:
                made.append(Knob(f"more{i}", "derivative", 0, 1))
            made.append(Knob(f"corrector{i}", "corrector", options=correctors))
        return [knob for knob in made if self._searched(knob)]

    def _reach(self, name: str) -> tuple[float, float]:
        at = self.centre.get(name)
        return (-WIDE, WIDE) if at is None else (at - NEAR, at + NEAR)

    def _searched(self, knob: Knob) -> bool:
        single = not knob.options and knob.low == knob.high
        return knob.decision in (*self.decisions, "calls") and knob.name not in self.fixed and not single

    def curve(self, steps: int) -> Curve:
        return Curve(self.process, self.process.t_max, self.process.t_min, steps)

    def table(self, values: Values) -> Table:
        """The schedule with these values."""
        given = {**self.fixed, **values}
        steps = int(given.get("steps", self.most))
        curve = self.curve(steps)
        times = curve.times(curve.levels(np.array([given.get(f"time{i}", 0.0) for i in range(1, steps + 1)])))
        rows = [self._row(given, i, steps, t) for i, t in enumerate(times[1:], 1)]
        return Table.of(Table(tuple(rows), times[0]).raw())  # checked

    def _row(self, given: Values, i: int, steps: int, t: float) -> Row:
        if i == steps:
            return Row(sigma=t)
        order = int(given.get(f"order{i}", 1))
        prediction, variable = PREDICTIONS[given.get(f"prediction{i}", "data")]
        relax = given.get(f"relax{i}", "none") if order > 1 else "none"
        known = order - 1 + min(int(given.get(f"more{i}", 0)), i - order) if order > 1 else 0
        row = Row(
            order, (known,) * (order - 1), relax, given.get(f"bend{i}", 0.0) if relax == "linear" else 0.0,
            sigma=t, prediction=prediction, variable=variable,
        )  # fmt: skip
        kind = given.get(f"corrector{i}", "none")
        return row if kind == "none" else Row(**{**vars(row), "corrector": row.own_corrector(kind)})

    def plan(self, values: Values) -> Plan:
        return plan_of(self.table(values))

    def values(self, times: Sequence[float], known: Mapping[str, Any]) -> dict[str, Any]:
        """Of a usual sampler on a schedule, all of them, whether searched or not; the nearest ones, where they have no such."""
        steps = len(times) - 1
        logits = self.curve(steps).logits(times)
        found: dict[str, Any] = {"steps": steps, **{f"time{i}": 0.0 for i in range(1, self.most + 1)}}
        for i, p in enumerate(logits - logits.mean(), 1):
            found[f"time{i}"] = float(np.clip(p, -WIDE, WIDE))
        for i in range(1, self.most):
            order = min(known.get("order", 1), i, self.orders)
            usual = known if order > 1 else {}  # a step of first order has nothing else to be chosen
            found |= {
                f"order{i}": order,
                f"prediction{i}": usual.get("prediction", "data"),
                f"relax{i}": usual.get("relax", "none"),
                f"bend{i}": 0.0,
                f"more{i}": 0,
                f"corrector{i}": known.get("corrector", "none"),
            }
        return found

    def about(self, values: Values) -> Space:
        """This space, with all that it does not search as in ``values``."""
        names = {knob.name for knob in self.knobs}
        return replace(self, fixed={**self.fixed, **{name: v for name, v in values.items() if name not in names}})

    def own(self, values: Values) -> dict[str, Any]:
        """Those of the values that are searched; numbers out of range at its end."""
        return {k.name: values[k.name] if k.options else min(max(values[k.name], k.low), k.high) for k in self.knobs}

    def has(self, values: Values) -> bool:
        """Whether these are values of the space."""
        return {**values, **self.fixed, **self.own(values)} == {**values}

    def features(self, values: Values) -> list[float]:
        """Numbers for a predictor of the loss: gaps and levels in log noise-to-signal, decisions, and both together."""
        given = {**self.fixed, **values}
        table = self.table(given)
        steps = len(table.steps)
        high, low = self.curve(steps).ends
        inner = np.log(self.process.rho(np.array(table.sigmas[1:-1]))) if steps > 1 else np.empty(0)
        level = (np.array([high, *inner]) - low) / (high - low)
        gap = -np.diff(level, append=0.0)
        found = [float(steps), float(np.square(gap).sum())]
        for i in range(self.most):
            row = table.steps[i] if i < steps else Row()
            h = float(gap[i]) if i < steps else 0.0
            noise = float(row.prediction == "noise") + float(row.variable == "rho")
            bent = math.copysign(1.0, row.relax_value) if row.relax == "linear" else 0.0
            corrected = 0.0 if row.corrector is None else 1.0 + (row.corrector.kind == "implicit")
            found += [float(level[i]) if i < steps else 0.0, h, row.order, h * row.order, noise, row.relax_value, bent]
            found += [RELAXATIONS.index(row.relax), max(row.points, default=0), corrected]
        return found


def plan_of(table: Table) -> Plan:
    """A table with its own times."""
    return Plan(USF(table.text()), table.sigmas)
