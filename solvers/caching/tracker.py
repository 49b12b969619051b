"""Where in the schedule a call of the denoiser stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TOLERANCE = 1e-4  # relative; sigmas pass through float32


@dataclass(frozen=True)
class Position:
    """call: how many calls came before it in this run.
    step: index i of its interval, ``times[i + 1] < t <= times[i]``.
    on_grid: whether ``t`` is ``times[step]``; stages inside a step are not.
    restarted: whether t is larger than at the call before: noise was added, what was cached is about another image.
    """

    call: int
    step: int
    on_grid: bool
    restarted: bool


class StepTracker:
    """Tells the calls of one run apart by their time, not by counting them.

    Solvers call the network any number of times per step, at stages between the given times and sometimes twice at the
    same one (Heun's corrector and the next predictor); a count of calls says nothing about where the run is.
    """

    def __init__(self, times: Sequence[float]):
        self.times = [float(t) for t in times]
        self.steps = max(len(self.times) - 1, 0)
        self._calls = 0
        self._step = 0
        self._last: float | None = None

    def advance(self, t: float) -> Position:
        """The position of the next call, at time ``t``."""
        restarted = self._last is not None and t > self._last * (1 + TOLERANCE)
        self._step = self._interval(t)
        on_grid = bool(self.times) and abs(t - self.times[self._step]) <= TOLERANCE * abs(t)
        position = Position(self._calls, self._step, on_grid, restarted)
        self._calls += 1
        self._last = t
        return position

    def _interval(self, t: float) -> int:
        """The interval of t; where the schedule passes t more than once (restarts), the next one from here on."""
        last = max(self.steps - 1, 0)
        ends = [s * (1 + TOLERANCE) for s in self.times]
        inside = [i for i in range(self.steps) if ends[i + 1] < t <= ends[i]]
        ahead = [i for i in inside if i >= self._step]
        if ahead or inside:
            return (ahead or inside)[0]
        return 0 if self.times and t > self.times[0] else last
