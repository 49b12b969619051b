"""The level of guidance: leave out the unconditional side of a call and put something else in its place.

A guided call computes two denoised predictions, D_c for the positive and D_u for the negative conditioning, and joins
them. Write d = (x - D) / t, the noise or velocity that a prediction stands for, and

    delta = d_u - d_c = (D_c - D_u) / t.

delta changes slowly along a run and holds no noise, of stochastic samplers neither; D_u and d_u do. So what was left
out is made of the D_c of the same call and an older delta: D_u = D_c - t delta.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable

import torch

from .accelerator import Run, Session
from .forecast import Weights, lagrange, reuse
from .store import BranchStore

ALONE = (
    "{} did nothing: no call of this run had just a positive and a negative side (CFG 1, a distilled model, or a "
    "guider that joins more than two)"
)

FORECASTS: dict[str, Weights] = {"linear": lagrange(1), "reuse": reuse}
DROP = "drop"
AUTO = "auto"
POLICIES = (AUTO, *FORECASTS, DROP)
"""What stands in for a difference that was not computed. ``DROP``: none, the call is conditional only. ``AUTO``: linear, or
reuse where the sampler adds noise: then x jumps, and delta with it, more than a line through two values can bear."""


class Guiding(Session):
    """Abstract: a session that can do without the unconditional side of a call (``Plan.PARTIAL``).

    key: what tells the pairs of one call apart (context windows), x: (B, ...), t: (B,), D_c and D_u like x.
    """

    def __init__(self, run: Run, title: str):
        super().__init__(run)
        self._paired = False
        self._title = title

    @abstractmethod
    def ready(self, key: Hashable) -> bool:
        """Whether ``answer`` knows enough; if not, the call is computed in full."""

    @abstractmethod
    def learn(self, key: Hashable, x: torch.Tensor, t: torch.Tensor, D_c: torch.Tensor, D_u: torch.Tensor) -> None:
        """Both sides of a call that was computed in full. Nothing given may be changed or kept without a copy."""

    @abstractmethod
    def answer(self, key: Hashable, x: torch.Tensor, t: torch.Tensor, D_c: torch.Tensor) -> torch.Tensor:
        """D_u, without the network."""

    def met(self, pair: bool) -> None:
        """Says after the run, once, if none of its calls was a pair."""
        self._paired = self._paired or pair
        self.notes = [] if self._paired else [ALONE.format(self._title)]


class Difference:
    """The newest differences delta of a run, and what they are when none is computed.

    policy: of ``POLICIES``. store: the session's, so that it ends with it.
    """

    def __init__(self, run: Run, policy: str, store: BranchStore):
        if policy == AUTO:
            policy = "reuse" if run.stochastic else "linear"
        self.run, self.weights, self.store = run, FORECASTS.get(policy), store
        store.anchors = 2

    def ready(self, key: Hashable, since: float = -math.inf) -> bool:
        """Whether there is a difference for ``key``, of the coordinate ``since`` or later."""
        return self.weights is None or self.store.has([key], since=since)

    def learn(self, key: Hashable, at: float, t: torch.Tensor, D_c: torch.Tensor, D_u: torch.Tensor) -> None:
        if self.weights is not None:
            self.store.put([key], delta(t, D_c, D_u), self.run.coordinate(at))

    def answer(self, key: Hashable, at: float, t: torch.Tensor, D_c: torch.Tensor) -> torch.Tensor:
        if self.weights is None:
            return D_c.clone()
        found = self.store.forecast([key], self.run.coordinate(at), self.weights)
        assert found is not None, "ready() comes first"
        return unconditional(t, D_c, found)


def column(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """t of shape (B,) as (B, 1, ...), in float32 or better, to broadcast against ``like``."""
    return t.to(torch.promote_types(like.dtype, torch.float32)).reshape(-1, *[1] * (like.ndim - 1))


def direction(x: torch.Tensor, t: torch.Tensor, D: torch.Tensor) -> torch.Tensor:
    """d = (x - D) / t, in float32 or better."""
    t = column(t, D)
    return (x.to(t.dtype) - D.to(t.dtype)) / t


def delta(t: torch.Tensor, D_c: torch.Tensor, D_u: torch.Tensor) -> torch.Tensor:
    """d_u - d_c, in float32 or better."""
    t = column(t, D_c)
    return (D_c.to(t.dtype) - D_u.to(t.dtype)) / t


def unconditional(t: torch.Tensor, D_c: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """D_u = D_c - t delta, in the dtype of D_c."""
    t = column(t, D_c)
    return (D_c.to(t.dtype) - t * difference).to(D_c.dtype)
