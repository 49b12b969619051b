"""Error against cost: what a curve gives at a price, which points are worth taking, who is better. Pure arithmetic.

A point is ``(cost, error)``; cost is the share of the plain run's work or seconds, so 0.5 is a speed-up of 2.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Mapping, Sequence

Point = tuple[float, float]
SPEEDUPS = (1.3, 1.5, 2.0, 2.5, 3.0)
AS_FAST = 1.02  # a cost this much above the asked one still counts as that speed-up
AS_GOOD = 1.05  # a ratio of errors this close to 1 is a draw


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other one beats or equals in both numbers, by rising cost (and so falling error)."""
    best: list[Point] = []
    for cost, error in sorted(points):
        if not best or error < best[-1][1]:
            best.append((cost, error))
    return best


def at(points: Iterable[Point], cost: float) -> float | None:
    """The error of a curve at ``cost``: straight lines between its points in log-log, plain where an error is 0.

    None below the cheapest point; beyond the dearest its error. Of points of one cost the first counts.
    """
    curve: dict[float, float] = {}
    for c, error in sorted(points, key=lambda p: p[0]):
        curve.setdefault(c, error)
    costs = list(curve)
    if not costs or cost < costs[0] * (1 - 1e-9):
        return None
    if cost >= costs[-1]:
        return curve[costs[-1]]
    i = max(bisect_left(costs, cost), 1)
    (c0, e0), (c1, e1) = ((c, curve[c]) for c in costs[i - 1 : i + 1])
    if min(e0, e1) <= 0.0:
        return e0 + (e1 - e0) * (cost - c0) / (c1 - c0)
    share = math.log(cost / c0) / math.log(c1 / c0)
    return math.exp((1 - share) * math.log(e0) + share * math.log(e1))


def at_each(curve: Sequence[tuple[float, Sequence[float]]], cost: float) -> list[float] | None:
    """``at`` for every picture: a curve of ``(cost, errors of the pictures)``."""
    found = [at([(c, errors[i]) for c, errors in curve], cost) for i in range(len(curve[0][1]))] if curve else [None]
    return None if None in found else found


def best(points: Mapping[Hashable, Point], speedup: float) -> Hashable | None:
    """The label of the smallest error among the points that are at least this fast."""
    fast = {label: error for label, (cost, error) in points.items() if cost <= AS_FAST / speedup}
    return min(fast, key=fast.__getitem__, default=None)


def verdict(*ratios: float | None) -> str:
    """In a word, from ratios of our error to the baseline's: ``better``, ``worse``, ``equal`` or ``mixed``; None is left out."""
    known = [r for r in ratios if r is not None]
    if not known:
        return "-"
    better, worse = (any(wins(r) for r in known) for wins in (lambda r: r < 1 / AS_GOOD, lambda r: r > AS_GOOD))
    return "mixed" if better and worse else "better" if better else "worse" if worse else "equal"
