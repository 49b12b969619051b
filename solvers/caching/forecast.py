"""Forecasts: a value that changes smoothly along the run, from its past values.

Every forecast is a linear combination f = sum_a w_a F_a of the anchors F_a kept at coordinates c_a; the weights are Python floats.
``weights(at, nodes) -> one weight per node`` with ``nodes`` oldest first; all of them sum to 1, so a constant stays what it is.

Where two nodes coincide (a corrector's call at the time of the next predictor's), the newer one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..weights import lagrange as polynomial

Weights = Callable[[float, Sequence[float]], list[float]]

REACH = 3.0
"""How far, in spans of the anchors, a polynomial is trusted; beyond, one order less."""


def reuse(at: float, nodes: Sequence[float]) -> list[float]:
    """The newest value as it is."""
    return [0.0] * (len(nodes) - 1) + [1.0]


def distinct(nodes: Sequence[float]) -> list[int]:
    """Places of the nodes that differ from every newer one, oldest first."""
    kept: list[int] = []
    for i in reversed(range(len(nodes))):
        if all(abs(nodes[i] - nodes[j]) > 1e-6 * max(1.0, abs(nodes[j])) for j in kept):
            kept.append(i)
    return kept[::-1]


def lagrange(order: int) -> Weights:
    """The polynomial of degree ``order`` through the newest ``order + 1`` anchors, exact on polynomials at any spacing.

    With fewer anchors, or where ``at`` lies more than ``REACH`` times their span beyond the newest, the order is lower.
    """

    def weights(at: float, nodes: Sequence[float]) -> list[float]:
        places = distinct(nodes)[-1 - order :]
        while len(places) > 1 and abs(at - nodes[-1]) > REACH * abs(nodes[-1] - nodes[places[0]]):
            places = places[1:]
        if len(places) < 2:
            return reuse(at, nodes)
        scale = abs(nodes[-1] - nodes[places[0]])
        u = [(nodes[i] - nodes[-1]) / scale for i in places]
        z = (at - nodes[-1]) / scale
        found = [0.0] * len(nodes)
        for j, i in enumerate(places):
            found[i] = sum(c * z**k for k, c in enumerate(polynomial(u, j, range(len(u)))))
        return found

    return weights


def damped(whole: Weights, gain: float) -> Weights:
    """Between reuse (gain 0) and ``whole`` (gain 1); see ``Gain``, which measures it, for why."""

    def weights(at: float, nodes: Sequence[float]) -> list[float]:
        return [gain * w + (1 - gain) * r for w, r in zip(whole(at, nodes), reuse(at, nodes), strict=True)]

    return weights


def taylor(order: int) -> Weights:
    """TaylorSeer's: f = sum_i D_i k^i / i!, k the distance from the newest anchor, D_i = (D_{i-1} - older D_{i-1}) / gap.

    A difference over a gap is not the derivative at its newer end, so from order 2 on this misses even a parabola. It is here to
    reproduce published numbers; ``lagrange`` is exact. Liu et al. (2025), arXiv:2503.06923.
    """

    def weights(at: float, nodes: Sequence[float]) -> list[float]:
        places = distinct(nodes)[-1 - order :]
        k, term, total = at - nodes[-1], 1.0, np.zeros(len(nodes))
        differences = np.eye(len(nodes))[places]
        c = np.array([nodes[i] for i in places])
        for i in range(len(places)):
            total += term * differences[-1]
            differences = np.diff(differences, axis=0) / np.diff(c)[i:, None]
            term *= k / (i + 1)
        return total.tolist()

    return weights


def chebyshev(degree: int, ends: tuple[float, float], ridge: float = 0.1, blend: float = 0.5) -> Weights:
    """Spectrum's: ``blend`` of a ridge fit in Chebyshev polynomials, the rest linear.

    With T the Chebyshev polynomials up to ``degree`` at the anchors, which are mapped to [-1, 1] from ``ends``, the
    coordinates between which the run goes, w = t(at) (T^T T + ridge I)^{-1} T^T. The authors map from 50 steps whatever the
    run is, and let the ridge pull towards zero; here it pulls towards the newest value. Linear alone below 4 anchors.
    Han et al. (2026), arXiv:2603.01623.
    """
    first, last = ends
    line = lagrange(1)

    def basis(c):
        u = np.clip(2.0 * (np.asarray(c, dtype=np.float64) - first) / (last - first) - 1.0, -1.0, 1.0)
        return np.polynomial.chebyshev.chebvander(u, degree)

    def weights(at: float, nodes: Sequence[float]) -> list[float]:
        linear = np.array(line(at, nodes))
        places = distinct(nodes)
        if len(places) < 4:
            return linear.tolist()
        T = basis([nodes[i] for i in places])
        fit = np.zeros(len(nodes))
        fit[places] = basis([at])[0] @ np.linalg.solve(T.T @ T + ridge * np.eye(degree + 1), T.T)
        fit[-1] += 1.0 - fit.sum()
        return ((1.0 - blend) * linear + blend * fit).tolist()

    return weights


class Gain:
    """How much of a forecast's step from the newest value was right, per sample: gamma in [0, 1], measured as it goes.

    A step s = f - F_0 towards a value that turned out to be F is best scaled by <s, F - F_0> / <s, s>; gamma is the mean of
    these, each older one counting half, and of ``prior``, which counts twice. Stays on the device.

    Networks are rougher than their ODE: the difference of two anchors contains noise, which a full step multiplies. HiCache's
    Hermite polynomials damp too: their first-order term is the line with gamma 0.5.
    """

    def __init__(self, prior: float, adapt: bool = True):
        self.prior, self.adapt = prior, adapt
        self.clear()

    def clear(self) -> None:
        self._sum: torch.Tensor | None = None
        self._count = 0.0

    def learn(self, step: torch.Tensor, truth: torch.Tensor) -> None:
        """A step was forecast, and ``truth`` is what it should have been."""
        if not self.adapt:
            return
        s, f = step.flatten(1), truth.flatten(1)
        square = s.square().sum(1)
        best = torch.where(square > 0.0, (s * f).sum(1) / square, self.prior)
        old = self._sum
        if old is not None and old.shape == best.shape and old.device == best.device:
            self._sum, self._count = best + 0.5 * old, 1.0 + 0.5 * self._count
        else:
            self._sum, self._count = best, 1.0

    def scale(self, step: torch.Tensor) -> torch.Tensor:
        """The part of ``step`` to go."""
        if self._sum is None or len(self._sum) != len(step):
            return step * self.prior
        gamma = (self._sum + 2.0 * self.prior) / (self._count + 2.0)
        return step * gamma.clamp(0.0, 1.0).view(-1, *[1] * (step.ndim - 1))


def bounded(forecast: torch.Tensor, newest: torch.Tensor, ratio: float = 1.5) -> torch.Tensor:
    """``forecast``, but ``newest`` for every sample where its norm is more than ``ratio`` times larger or not a number."""
    norm, most = forecast.flatten(1).norm(dim=1), ratio * newest.flatten(1).norm(dim=1)
    return torch.where((norm <= most).view(-1, *[1] * (forecast.ndim - 1)), forecast, newest)


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
