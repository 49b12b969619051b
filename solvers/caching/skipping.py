"""Which calls of a run are full, for accelerators that leave out whole calls."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Container
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from .step_forecast import StepForecastSession


class Policy(ABC):
    """When a call is full.

    learns: whether it wants to know what the forecasts would have been worth in full calls.
    """

    learns: ClassVar[bool] = False

    @abstractmethod
    def full(self, session: StepForecastSession, t: float) -> bool:
        """Whether the call at t is."""

    def learn(self, error: float, distance: float) -> None:  # noqa: B027 - most plans stand before the run
        """A forecast over ``distance`` was wrong by ``error``, in parts of the state, per unit of time."""

    def forget(self) -> None:  # noqa: B027
        """The next call is about another picture."""


class Planned(Policy):
    """The given steps."""

    def __init__(self, steps: Container[int]):
        self.steps = steps

    def full(self, session: StepForecastSession, t: float) -> bool:
        return session.position.step in self.steps


class Spaced(Policy):
    """One call in ``interval``, and ``flex`` more for every full call after the first ``warmup``."""

    def __init__(self, interval: int, flex: float, warmup: int):
        self.interval, self.flex, self.warmup = interval, flex, max(warmup, 1)

    def full(self, session: StepForecastSession, t: float) -> bool:
        gap = math.floor(self.interval + self.flex * (session.age - self.warmup))
        return session.skipped >= gap - 1


class Verified(Policy):
    """Until the cost of the forecasts since the last full call reaches ``tol``.

    The cost is judged by what this call's own forecast would have been worth, and by how much worse that was than at the full
    call before: the curve may be about to bend. For the same reason a gap is at most one longer than the one before.
    """

    learns: ClassVar[bool] = True

    def __init__(self, tol: float, most: int):
        self.tol, self.most = tol, most
        self.forget()

    def full(self, session: StepForecastSession, t: float) -> bool:
        if session.skipped == 0:
            self.spent = 0.0
        cost = self.rate * session.distance(t) * (t - session.ending())
        # A NaN compares as false: full.
        if session.skipped >= min(self.most, self.gap + 1) or not self.spent + cost < self.tol:
            self.gap = session.skipped
            return True
        self.spent += cost
        return False

    def learn(self, error: float, distance: float) -> None:
        now = error / distance
        worse = now / self.last if 0.0 < self.last < now else 1.0
        self.rate, self.last = now * worse, now

    def forget(self) -> None:
        self.rate = math.inf
        self.spent = self.last = 0.0
        self.gap = 0
