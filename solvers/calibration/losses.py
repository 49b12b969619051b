"""What is minimized: a mean over samples of some function of each sample's RMS distance to the teacher's.

A plain mean of squares is the wrong one for few steps: the few samples that end in another mode than the teacher's have
nearly all of it, and are bought at the expense of all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

_FLOOR = 1e-2
"""Of the weights: a sample nearer to its target than this share of the median weighs no more than one there."""


@dataclass(frozen=True)
class Loss:
    """``of``: the loss of each sample from its RMS error e. ``slope``: its derivative by e^2, up to a common factor. ``error``:
    from a mean loss back to something like an error, above 0."""

    of: Callable[[torch.Tensor], torch.Tensor]
    slope: Callable[[torch.Tensor], torch.Tensor]
    robust: str = ""
    error: Callable[[float], float] = lambda loss: loss

    @property
    def follow(self) -> Loss:
        """What searches that go step by step lower in its place.

        The mean error is ruled by the few samples that end in another mode than the teacher's: whether one of them turns over
        decides about a step, where it should be whether all others come nearer.
        """
        return LOSSES[self.robust] if self.robust else self

    def __call__(self, rms: torch.Tensor) -> float:
        """The mean; infinite where a sample is not finite."""
        value = float(self.of(rms).mean())
        return value if value == value else float("inf")

    def weights(self, rms: torch.Tensor) -> torch.Tensor:
        """Those with which a least-squares step lowers this loss (iteratively reweighted), mean 1."""
        w = self.slope(rms.clamp(min=max(_FLOOR * float(rms.median()), 1e-12)))
        return w / w.mean()


LOSSES: dict[str, Loss] = {
    "rms": Loss(lambda e: e, lambda e: 0.5 / e, "log"),
    "log": Loss(lambda e: (e + 1e-6).log(), lambda e: 0.5 / (e * (e + 1e-6)), error=math.exp),
    "mse": Loss(lambda e: e.square(), torch.ones_like),
}
"""By name: the mean error, the mean of its logarithm (close to the median), the mean square."""
