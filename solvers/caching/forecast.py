"""Forecasts: a value that changes smoothly along the run, from its past values.

Every forecast is a linear combination f = sum_a w_a F_a of the anchors F_a kept at coordinates c_a; the weights are Python floats.
``weights(at, nodes) -> one weight per node`` with ``nodes`` oldest first; all of them sum to 1, so a constant stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..weights import lagrange as polynomial

Weights = Callable[[float, Sequence[float]], list[float]]

REACH = 3.0
"""How far, in spans of the anchors, a polynomial is trusted; beyond, one order less."""


def reuse(at: float, nodes: Sequence[float]) -> list[float]:
    """The newest value as it is."""
    return [0.0] * (len(nodes) - 1) + [1.0]


def lagrange(order: int) -> Weights:
    """The polynomial of degree ``order`` through the newest ``order + 1`` anchors, exact on polynomials at any spacing.

    With fewer anchors, or where ``at`` lies more than ``REACH`` times their span beyond the newest, the order is lower.
    """

    def weights(at: float, nodes: Sequence[float]) -> list[float]:
        m = min(order, len(nodes) - 1)
        while m > 0 and abs(at - nodes[-1]) > REACH * abs(nodes[-1] - nodes[-1 - m]):
            m -= 1
        if m <= 0:
            return reuse(at, nodes)
        used = list(nodes[-1 - m :])
        scale = abs(used[-1] - used[0])
        u = [(c - used[-1]) / scale for c in used]
        z = (at - used[-1]) / scale
        found = [sum(c * z**k for k, c in enumerate(polynomial(u, j, range(m + 1)))) for j in range(m + 1)]
        return [0.0] * (len(nodes) - 1 - m) + found

    return weights


def damped(order: int, gain: float) -> Weights:
    """Between reuse (gain 0) and ``lagrange`` (gain 1)."""
    whole = lagrange(order)

    def weights(at: float, nodes: Sequence[float]) -> list[float]:
        return [gain * w + (1 - gain) * r for w, r in zip(whole(at, nodes), reuse(at, nodes), strict=True)]

    return weights


def combine(weights: Sequence[float], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """sum_a w_a F_a as a new tensor, in float32 (or better), with the dtype of the newest value."""
    used = [(w, value) for w, value in zip(weights, values, strict=True) if w != 0.0]
    newest = values[-1]
    if len(used) == 1 and used[0][0] == 1.0:
        return used[0][1].clone()
    wide = torch.promote_types(newest.dtype, torch.float32)
    total = used[0][1].to(wide) * used[0][0]
    for w, value in used[1:]:
        total.add_(value.to(wide), alpha=w)
    return total.to(newest.dtype)
