"""A budget instead of knobs: which accelerators, with which settings, for the work one is ready to pay.

A *recipe* is one accelerator or several with their settings; a *trial* is what a recipe did on the user's own model, steps and
guidance: the share of the network's work it computed, and how far its result was from the uncached one. From the trials a
recipe is chosen, for the least error within a budget of work or for the least work within a budget of error.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..method import params
from .accelerator import Accelerator
from .library import ACCELERATORS, RECIPES

KIND = "acceleration plan"
ROOM = 1.03
"""How far the measured work may lie above the budget: a call more or less in twenty-five."""
USELESS = 0.97
"""A recipe that computes more than this share does nothing here (it switched itself off)."""

Part = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Trial:
    """What a recipe did.

    parts: ``(accelerator id, settings)`` in the order in which they are put on; none for plain sampling with fewer steps.
    steps: of the run. work: of the uncached run's work, the share computed. error: root mean square distance to its result,
    relative to that result's root mean square. seconds: of the run.
    """

    parts: tuple[Part, ...]
    steps: int
    work: float
    error: float
    seconds: float = 0.0

    @property
    def label(self) -> str:
        return " + ".join(label(part) for part in self.parts) or f"{self.steps} plain steps"

    @property
    def accelerators(self) -> list[Accelerator]:
        return [made(part) for part in self.parts]


def made(part: Part) -> Accelerator:
    """The accelerator of an ``(id, settings)``; raises ValueError with one sentence for what does not exist."""
    name, settings = part
    kind = {a.id: a for a in ACCELERATORS}.get(name)
    if kind is None:
        raise ValueError(f"The plan needs an accelerator called {name!r}, which this version does not have.")
    unknown = set(settings) - {p.name for p in params(kind)}
    if unknown:
        raise ValueError(
            f"The plan sets {', '.join(sorted(unknown))} of {kind.title}, which this version does not have."
        )
    return kind(**settings)


def label(part: Part) -> str:
    """``DeepCache(interval=3)``"""
    return f"{part[0]}({', '.join(f'{k}={v:g}' if isinstance(v, float) else f'{k}={v}' for k, v in part[1].items())})"


def recipes(usable: Container[str]) -> list[tuple[Part, ...]]:
    """The recipes to try, whatever the target, as they are kept for the next one: those of ``usable`` accelerators only."""
    return [parts for parts in RECIPES if all(name in usable for name, _ in parts)]


def useful(trials: Sequence[Trial]) -> list[Trial]:
    return [t for t in trials if t.parts and t.work < USELESS]


def cheapest_enough(trials: Sequence[Trial], work: float) -> Trial | None:
    """The least error among the trials within the budget of ``work``; if there is none, the least work of all.

    None if no recipe does anything.
    """
    found = useful(trials)
    within = [t for t in found if t.work <= work * ROOM]
    if within:
        return min(within, key=lambda t: t.error)
    return min(found, key=lambda t: t.work, default=None)


def close_enough(trials: Sequence[Trial], error: float) -> Trial | None:
    """The least work among the trials with at most this ``error``; None if there is none."""
    return min((t for t in useful(trials) if t.error <= error), key=lambda t: t.work, default=None)


def fewer_steps(trials: Sequence[Trial], work: float) -> Trial | None:
    """The plain run with fewer steps whose work comes closest to ``work``."""
    return min((t for t in trials if not t.parts), key=lambda t: abs(t.work - work), default=None)


def to_table(trials: Sequence[Trial]) -> dict[str, Any]:
    """The trials as an artifact's table."""
    return {"trials": [{**asdict(t), "parts": [[name, dict(settings)] for name, settings in t.parts]} for t in trials]}


def from_table(table: Mapping[str, Any]) -> list[Trial]:
    """The trials of an artifact's table; raises ValueError for one that holds none."""
    try:
        return [
            Trial(
                tuple((str(name), dict(settings)) for name, settings in row["parts"]),
                *(row[key] for key in ("steps", "work", "error", "seconds")),
            )
            for row in table["trials"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The acceleration plan is damaged ({type(error).__name__}: {error}).") from None
