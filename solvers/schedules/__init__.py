"""Schedules: at which noise levels the network is called."""

from .ays import AlignYourSteps
from .recipes import RecipeSchedule
from .schedule import Schedule, times
from .sigma import CosineSchedule, ExponentialSchedule, KarrasSchedule, PolyexponentialSchedule
from .timestep import BetaSchedule, LinearQuadraticSchedule, UniformSchedule

CLOSED_FORMS: tuple[type[Schedule], ...] = (
    KarrasSchedule,
    ExponentialSchedule,
    PolyexponentialSchedule,
    UniformSchedule,
    BetaSchedule,
    CosineSchedule,
    LinearQuadraticSchedule,
    AlignYourSteps,
    RecipeSchedule,
)
"""Every schedule that needs no model evaluation, one class each."""

__all__ = ["CLOSED_FORMS", "Schedule", "times", *(schedule.__name__ for schedule in CLOSED_FORMS)]
