"""All methods that propose schedules, and the schedule of another number of steps from what one of them measured."""

from __future__ import annotations

from typing import Any

from ..method import Method
from ..process import ForwardProcess
from ..schedules import CLOSED_FORMS
from .ays import AlignYourStepsOnModel
from .boss import BOSS
from .curvature import Curvature
from .dmn import DMN
from .gits import GITS
from .hso import HSO
from .kinetic import KineticOptimal
from .oss import OptimalSteps
from .proposal import Proposal, blended

PROPOSALS: tuple[type[Proposal], ...] = (
    AlignYourStepsOnModel,
    GITS,
    OptimalSteps,
    BOSS,
    Curvature,
    DMN,
    KineticOptimal,
    HSO,
)
"""Each is a node."""


def again(table: dict[str, Any], process: ForwardProcess, steps: int) -> list[float]:
    """The schedule of another number of steps, from the table of a file: as far as it went there from the same usual schedule.

    ValueError, in one sentence, for files that have no measurement, and for numbers of steps about which it says nothing.
    """
    if not isinstance(table.get("proposal"), dict):
        raise ValueError(
            "It was found for its own number of steps and measured nothing that others follow from; calibrate for this number."
        )
    made = _method(PROPOSALS, table["proposal"])
    begin = _method(CLOSED_FORMS, table["start"])(process, process.t_max, process.t_min, steps).tolist()
    if table["share"] == 0.0 or steps == 1:
        return begin
    if steps > made.most:
        raise ValueError(f"{made.title} has schedules of at most {made.most} steps, not of {steps}.")
    end = made.times(table["measured"], process, steps, table["order"])
    return blended(process, begin, end, table["share"])


def _method(classes: tuple[type, ...], stored: dict[str, Any]) -> Any:
    """What ``proposal.described`` wrote."""
    settings: dict[str, Any] = dict(stored)
    name = settings.pop("id", None)
    for known in classes:
        if issubclass(known, Method) and known.id == name:
            return known(**settings)
    raise ValueError(f"It needs {name!r}, which this version of Quickstep does not have.")
