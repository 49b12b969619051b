"""Schedules as points of a vector space, for optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..process import ForwardProcess
from ..schedules.schedule import ratios

FLOOR = 0.02
"""Least distance of neighbours, as a share of the whole range in log noise-to-signal; less for more than 12 steps."""

_CUT = 0.999
"""Where the range begins on flow models, whose t_max has no finite ratio; the first time itself stays t_max."""


@dataclass(frozen=True)
class Curve:
    """All schedules of n steps from t_max to 0 whose times keep apart, by n logits p.

        y_i = y_0 - sum_{j <= i} [ g + (Y - (n - 1) g) softmax(p)_j ],   i = 1 .. n - 1,   y = log(sigma / alpha)

    Y is the range from t_max (``y_0``) to t_min, g the least gap. The n-th share is what the last call stays above t_min. So
    there are n - 1 degrees of freedom; without the gap optimizers collapse neighbours.
    """

    process: ForwardProcess
    t_max: float
    t_min: float
    n: int

    @property
    def ends(self) -> tuple[float, float]:
        """y at t_max and at t_min."""
        high, low = np.log(ratios(self.process, self.t_max, self.t_min, _CUT))
        return float(high), float(low)

    @property
    def gap(self) -> float:
        high, low = self.ends
        return min(FLOOR, 0.25 / self.n) * (high - low)

    @property
    def free(self) -> float:
        high, low = self.ends
        return high - low - (self.n - 1) * self.gap

    def levels(self, logits: np.ndarray) -> np.ndarray:
        """y_1 .. y_{n-1}."""
        return self.ends[0] - np.cumsum(self.gap + self.free * _softmax(logits))[:-1]

    def slope(self, logits: np.ndarray) -> np.ndarray:
        """d levels / d logits, (n - 1, n)."""
        w = _softmax(logits)
        return -self.free * np.cumsum(np.diag(w) - np.outer(w, w), axis=0)[:-1]

    def times(self, levels: np.ndarray) -> list[float]:
        """t_0 .. t_n, the last one 0."""
        inner = np.atleast_1d(self.process.t_of_rho(np.exp(np.asarray(levels, dtype=np.float64))))
        return [self.t_max, *inner.tolist(), 0.0]

    def levels_of(self, times: Sequence[float]) -> np.ndarray:
        """Those of a schedule, as it is."""
        return np.log(self.process.rho(times[1:-1])) if len(times) > 2 else np.empty(0)

    def logits(self, times: Sequence[float]) -> np.ndarray:
        """Of the schedule of this family nearest to a given one: gaps that are too small grow, calls below t_min rise."""
        high, low = self.ends
        y = np.array([high, *self.levels_of(times), low])
        share = np.maximum((-np.diff(y) - np.array([self.gap] * (self.n - 1) + [0.0])) / self.free, 1e-3)
        return np.log(share / share.sum())


def _softmax(p: np.ndarray) -> np.ndarray:
    e = np.exp(p - p.max())
    return e / e.sum()
