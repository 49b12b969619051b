"""Solver schedules as tables: a JSON text with one object per step, which people can read, change and share.

    {"usf": 1, "sigma": 14.6, "steps": [
      {"sigma": 7.7},
      {"sigma": 1.4, "prediction": "noise", "order": 2, "relax": "linear", "relax_value": 0.05, "corrector": "pseudo"},
      {"sigma": 0}
    ]}

``usf.USF`` says what the fields mean. What is left out has its default.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

FORMAT = 1
KIND = "solver_schedule"
"""Of the artifact whose table this is."""

RELAXATIONS = ("none", "dpmsolver-2", "unipc-bh1", "unipc-bh2", "0.5exp", "-0.5exp", "linear")


@dataclass(frozen=True)
class Update:
    """How x gets from the start of a step to its end."""

    order: int = 1
    points: tuple[int, ...] = ()
    relax: str = "none"
    relax_value: float = 0.0
    weights: tuple[float, ...] = ()

    @property
    def counts(self) -> tuple[int, ...]:
        """How many predictions, that at the start included, each derivative is estimated by, from the 0th on."""
        return (1, *(q + 1 for q in self.points))

    @property
    def accuracy(self) -> int:
        """Its order of convergence; weights are taken for those of the exact integral."""
        if self.weights:
            return len(self.weights)
        return min(self.order, *(q + 1 for q in self.points), 2 if self.relax != "none" else self.order)


@dataclass(frozen=True)
class Corrector(Update):
    """The update again, with the prediction at its end."""

    kind: str = "pseudo"


@dataclass(frozen=True)
class Row(Update):
    """One step."""

    sigma: float | None = None
    prediction: str = "data"
    variable: str = "lambda"
    start: int = 1
    corrector: Corrector | None = None

    @property
    def predictions(self) -> int:
        """How many it needs to be known."""
        corrected = (
            max(self.start + 1, *self.corrector.counts, len(self.corrector.weights)) - 1 if self.corrector else 0
        )
        return max(self.start, *self.counts, len(self.weights), corrected)

    @property
    def convergence_order(self) -> int:
        return min(self.accuracy + 1, self.corrector.accuracy) if self.corrector else self.accuracy

    def own_corrector(self, kind: str) -> Corrector:
        """One order and one point more."""
        if self.weights:
            n = len(self.weights)
            return Corrector(n + 1, (n,) * n, kind=kind)
        grown = tuple(q + 1 for q in self.points)
        return Corrector(self.order + 1, (*grown, max(grown, default=1)), kind=kind)


@dataclass(frozen=True)
class Table:
    """A solver schedule."""

    steps: tuple[Row, ...]
    sigma: float | None = None
    frame: str = "snr"
    afs: str = "none"
    repeat: int = 0

    def row(self, i: int) -> Row:
        """Step i of a run."""
        first = len(self.steps) - self.repeat
        return self.steps[i] if i < len(self.steps) else self.steps[first + (i - first) % self.repeat]

    @property
    def sigmas(self) -> list[float]:
        """Where the run starts and each step ends; empty if the table leaves that to the sampler."""
        return [] if self.sigma is None else [self.sigma, *(row.sigma for row in self.steps if row.sigma is not None)]

    def raw(self) -> dict[str, Any]:
        """As JSON values, defaults left out: what ``of`` reads, and an artifact holds."""
        return {"usf": FORMAT, **_raw(self), "steps": [_raw(row) for row in self.steps]}

    def text(self) -> str:
        """The table as JSON, one step per line."""
        head = json.dumps({key: value for key, value in self.raw().items() if key != "steps"})
        steps = ",\n".join(f"  {json.dumps(row)}" for row in self.raw()["steps"])
        return f'{head[:-1]}, "steps": [\n{steps}\n]}}\n'

    @classmethod
    def of(cls, raw: Any) -> Table:
        """Raises ValueError with one sentence that names step and field."""
        if not isinstance(raw, dict) or "usf" not in raw:
            raise ValueError('A USF table is a JSON object that begins with "usf": 1.')
        if raw["usf"] != FORMAT:
            raise ValueError(f"The USF table has the format {raw['usf']!r}; this version of Quickstep reads {FORMAT}.")
        given = _read(cls, {key: value for key, value in raw.items() if key != "usf"}, "USF table")
        if not given.get("steps"):
            raise ValueError("USF table: steps must be a list with an object for each step.")
        rows = tuple(_row(step, f"USF table, step {i}") for i, step in enumerate(given["steps"], 1))
        table = cls(**{**given, "steps": rows})
        _check(table)
        return table


@lru_cache(maxsize=32)
def parse(text: str) -> Table:
    """A table from its text."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise ValueError(f"The USF table is not valid JSON: {error}.") from None
    return Table.of(raw)


def _raw(part: Any) -> dict[str, Any]:
    found = {}
    for field in sorted(fields(part), key=lambda field: list(_ALLOWED).index(field.name)):
        value = getattr(part, field.name)
        if isinstance(part, Update) and field.name == "points" and value == _points(part.order):
            continue
        if isinstance(part, Row) and isinstance(value, Corrector):
            own = value == part.own_corrector(value.kind)
            value = value.kind if own else {"kind": value.kind, **_raw(value)}
        if value != field.default and field.name != "steps":
            found[field.name] = list(value) if isinstance(value, tuple) else value
    return found


def _points(order: int) -> tuple[int, ...]:
    return (order - 1,) * (order - 1)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    def allowed(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return allowed, f"a whole number from {low} to {high}"


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}"


def _list_of(each: Callable[[Any], bool], words: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, list) and len(value) > 0 and all(map(each, value)), f"a list of {words}"


_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "sigma": (lambda value: _number(value) and value >= 0.0, "a number of at least 0"),
    "frame": _one_of("snr", "vef"),
    "afs": _one_of("none", "zero", "mean"),
    "repeat": _whole(0, 1000),
    "steps": _list_of(lambda value: isinstance(value, dict), "objects, one for each step"),
    "prediction": _one_of("data", "noise", "v3"),
    "variable": _one_of("lambda", "rho", "t", "vp"),
    "start": _whole(1, 1000),
    "order": _whole(1, 6),
    "points": _list_of(_whole(1, 1000)[0], "whole numbers"),
    "relax": _one_of(*RELAXATIONS),
    "relax_value": (_number, "a number"),
    "weights": _list_of(_number, "numbers"),
    "corrector": (
        lambda value: value in ("pseudo", "implicit") or isinstance(value, dict),
        "pseudo, implicit or an object",
    ),
    "kind": _one_of("pseudo", "implicit"),
}


def _read(cls: type, raw: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of ``cls`` that raw gives, each of an allowed value."""
    names = [field.name for field in fields(cls)]
    for name, value in raw.items():
        if name not in names:
            raise ValueError(f"{where}: there is no field {name!r}; it has {', '.join(names)}.")
        allowed, words = _ALLOWED[name]
        if not allowed(value):
            shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
            raise ValueError(f"{where}: {name} = {shown} must be {words}.")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}


def _update(cls: type, raw: dict[str, Any], where: str) -> Any:
    given = _read(cls, raw, where)
    update = cls(**{"points": _points(given.get("order", 1)), **given})
    if update.weights:
        if given.keys() & {"order", "points", "relax", "relax_value"}:
            raise ValueError(f"{where}: weights stand instead of order, points and relax; leave these out.")
        if abs(sum(update.weights) - 1.0) > 1e-6:
            raise ValueError(f"{where}: weights add up to {sum(update.weights):g}, but must add up to 1.")
    if len(update.points) != update.order - 1:
        raise ValueError(
            f"{where}: order {update.order} has {update.order - 1} derivatives, so points needs as many numbers."
        )
    for m, q in enumerate(update.points, 1):
        if q < m:
            raise ValueError(f"{where}: derivative {m} needs at least {m} other predictions, but points gives it {q}.")
    if update.relax != "none" and update.order == 1:
        raise ValueError(f"{where}: relax is a factor on the first derivative, which order 1 does not have.")
    if "relax_value" in given and update.relax != "linear":
        raise ValueError(f"{where}: relax_value belongs to relax = linear.")
    return update


def _row(raw: dict[str, Any], where: str) -> Row:
    corrector = raw.get("corrector")
    row = _update(Row, {key: value for key, value in raw.items() if key != "corrector"}, where)
    if row.variable != "lambda" and row.prediction != "noise":
        raise ValueError(f"{where}: variable = {row.variable!r} is for noise predictions.")
    if corrector is None:
        return row
    _read(Row, {"corrector": corrector}, where)
    made = (
        row.own_corrector(corrector)
        if isinstance(corrector, str)
        else _update(Corrector, corrector, f"{where}, corrector")
    )
    return replace(row, corrector=made)


def _check(table: Table) -> None:
    """What concerns several steps."""
    if table.repeat > len(table.steps):
        raise ValueError(f"USF table: repeat = {table.repeat}, but there are only {len(table.steps)} steps.")
    sigma = table.sigma
    for i, row in enumerate(table.steps, 1):
        where = f"USF table, step {i}"
        if row.predictions > i:
            raise ValueError(f"{where}: it needs {row.predictions} predictions, but only {i} are known there.")
        if row.prediction == "v3" and table.frame == "vef":
            raise ValueError(f"{where}: v3 predictions need frame = snr.")
        if row.weights and (table.repeat or table.sigma is None):
            raise ValueError(
                f"{where}: weights are those of certain sigmas, so the table has to give these, and repeat to be 0."
            )
        if (row.sigma is None) != (table.sigma is None):
            raise ValueError(f"{where}: sigma must be given for the table and for all steps, or for none.")
        if sigma is not None and row.sigma is not None:
            if row.sigma >= sigma:
                raise ValueError(f"{where}: sigma = {row.sigma:g} must be below that of the step before, {sigma:g}.")
            sigma = row.sigma
    if table.repeat and table.sigma is not None:
        raise ValueError("USF table: a table with sigmas has a fixed number of steps; leave out the sigmas or repeat.")
