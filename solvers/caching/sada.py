"""SADA: leave out the next call where the trajectory is stable; after the middle, compute one in four."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method import param
from ..weights import lagrange as polynomial
from .accelerator import Run
from .declared import END, START, TAIL, WARMUP
from .derivative import WholeCalls
from .forecast import bounded, combine, distinct, lagrange
from .gated import GatedSession, Newest

PUBLISHED = (-3 / 8, 6 / 8, 5 / 8)


@dataclass(frozen=True)
class SADA(WholeCalls):
    """Leaves out calls while the trajectory is stable, by the sign of one number; after the middle it computes one call in four.

    For comparison with its paper; Step Forecast knows how large an error is, not only its sign. With f the derivative
    d = (x - D) / sigma of the last three calls (forecast ones included), h = t - s the step that led from x_s to x_t, and

        x^_t = x_s + h (5/8 f_0 + 6/8 f_1 - 3/8 f_2)                    (published)
        x^_t = x_s + integral of the parabola through f_0, f_1, f_2     (corrected),

    the call at t is left out if the mean of (x_t - x^_t) (f_0 - 2 f_1 + f_2) is not positive: the curve bends back. Then
    D = x^_t - t f_0 (published), or D = x_t - t f with f on the line through the last two full calls (corrected). From
    ``middle`` on every ``lagrange_int``-th step is computed, and D between them is the polynomial in the step through the
    last ``lagrange_term`` computed ones.

    The published weights are no quadrature of order two: they come to f_0 - 3/8 (f_0 - 2 f_1 + f_2), so after a step of Euler
    the mean is 3/8 h |f_0 - 2 f_1 + f_2|^2, h negative, never positive: the test always passes, and only ``max_interval`` ends a
    stretch. They are kept to compare. Published defaults (50 steps): ``lagrange_term`` 4, steps 10 to 47, middle 24; an
    extrapolation of D of that order was far worse on the demo networks, so the default is a line.

    The token-wise part (recompute only unstable tokens where the step is not left out) works inside attention layers and is not
    here: see ToDo and AT-EDM for fewer tokens. Reads one number back per call before the middle, none after. The same limits as
    Step Forecast. ``max_interval`` 0 is exactly the unaccelerated result.

    Source: Jiang et al. (2025), arXiv:2507.17135, and the authors' program; written here in sigma, theirs is in training time.
    """

    id: ClassVar[str] = "SADA"
    title: ClassVar[str] = "SADA"
    paper: ClassVar[str] = "Jiang et al. (2025), arXiv:2507.17135"

    max_interval: int = param(4, "The most calls left out in a row; 0 switches it off.", min=0, max=20)
    coefficients: str = param(
        "corrected", "The weights of the last three directions, as published or such that they integrate a parabola.",
        options=("corrected", "published"),
    )  # fmt: skip
    lagrange_term: int = param(2, "Computed pictures that those after the middle are extrapolated from; 0: no second part.",
                               min=0, max=6)  # fmt: skip
    lagrange_int: int = param(4, "After the middle, one step in this many is computed.", min=2, max=10)
    middle: float = param(0.48, "From this fraction of the steps on, one step in so many is computed.", min=0.0, max=1.0, step=0.01,
                          advanced=True)  # fmt: skip
    start_percent: float = START()
    end_percent: float = END()
    warmup: int = WARMUP(5)
    tail: int = TAIL()

    @property
    def percents(self) -> tuple[float, float]:
        return self.start_percent, self.end_percent

    def start(self, run: Run) -> SADASession:
        return SADASession(self, run)


def quadrature(s: float, t: float, nodes: Sequence[float]) -> list[float]:
    """Weights of values at ``nodes``, oldest first, for the integral from s to t of the polynomial through them."""
    places, found = distinct(nodes), [0.0] * len(nodes)
    u = [(nodes[i] - s) / (t - s) for i in places]
    for j, i in enumerate(places):
        found[i] = (t - s) * sum(c / (k + 1) for k, c in enumerate(polynomial(u, j, range(len(u)))))
    return found


class SADASession(GatedSession):
    """``store`` has full calls; ``f`` the last three derivatives, forecast or not, at ``times``; ``x`` the last state."""

    def __init__(self, settings: SADA, run: Run):
        super().__init__(run, 2, settings.warmup, settings.tail, settings.max_interval)
        self.settings = settings
        self.f, self.x, self.pictures = Newest(3), Newest(1), Newest(settings.lagrange_term)
        self.times: list[float] = []
        self.steps: list[int] = []
        self.predicted: torch.Tensor | None = None

    @property
    def late(self) -> bool:
        return self.settings.lagrange_term > 0 and self.position.step >= self.settings.middle * self.tracker.steps

    def watch(self, x: torch.Tensor, t: float) -> bool:
        f, before = self.f.fit(x), self.x.fit(x)
        self.predicted = None
        if self.late:
            return bool(self.pictures.fit(x)) and self.position.step % self.settings.lagrange_int != 1
        if len(f) < 3 or not before or t >= self.times[-1]:
            return False
        s, nodes = self.times[-1], self.times[-3:]
        weights = [(t - s) * w for w in PUBLISHED]
        if self.settings.coefficients == "corrected":
            weights = quadrature(s, t, nodes)
        self.predicted = before[0] + combine(weights, f)
        bend = (x - self.predicted) * combine([1.0, -2.0, 1.0], f)
        return float(bend.float().mean()) <= 0.0

    def guess(self, x: torch.Tensor, t: float) -> torch.Tensor:
        if self.late:
            weights = lagrange(self.settings.lagrange_term - 1)(self.position.step, self.steps)
            x0 = combine(weights, self.pictures.kept).to(x.dtype)
        elif self.settings.coefficients == "published" and self.predicted is not None:
            x0 = self.denoised(self.predicted, t, self.f.kept[-1])
        else:
            seen = self.foreseen(x, t, lagrange(1))
            x0 = self.denoised(x, t, self.f.kept[-1] if seen is None else bounded(sum(seen), seen[0]))
        self.keep(x, t, x0)
        return x0

    def learn(self, x: torch.Tensor, t: float, x0: torch.Tensor) -> None:
        super().learn(x, t, x0)
        self.keep(x, t, x0)
        if self.settings.lagrange_term > 0:
            self.pictures.add(x0)
            self.steps = [*self.steps, self.position.step][-len(self.pictures.kept) :]

    def keep(self, x: torch.Tensor, t: float, x0: torch.Tensor) -> None:
        self.f.add(self.value(x, t, x0))
        self.x.add(x)
        self.times = [*self.times, t][-len(self.f.kept) :]

    def flush(self) -> None:
        super().flush()
        for kept in (self.f, self.x, self.pictures):
            kept.clear()
