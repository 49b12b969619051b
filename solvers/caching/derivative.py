"""What accelerators of whole network calls share: the derivative of the sampling ODE, kept where the network gave it.

    d = (x - D) / sigma,     D the guided prediction of the clean picture;     D = x - sigma d

For every model type d is what an ODE solver integrates, dx / dsigma = d: the noise of EPS and V models, the velocity of flow
models. It changes slowly, and what is made of kept values of it belongs to the x at hand, so D is never a picture ago.

One tensor per anchor, of the size of the latent. At this level it stands for everything inside a call: conditionings, areas,
context windows, ControlNet, guidance passes (PAG, SLG), batches.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch

from .accelerator import Accelerator, Answering, Plan, Run
from .forecast import Weights
from .store import BranchStore
from .tracker import Position

FEW = 10


@dataclass(frozen=True)
class WholeCalls(Accelerator):
    """Abstract: answers whole calls of the network from the derivative's past."""

    site: ClassVar[str] = "evaluation"

    def off(self, run: Run) -> str | None:
        if run.both_sides:
            return f"{run.sampler} reads the unconditional prediction too, which a call that is not made does not give"
        if run.sampler == "ar_video":
            return "ar_video counts what the network itself remembers of every call, so none can be left out"
        if run.stochastic:
            return (
                "the sampler adds noise, which no forecast foresees; use a sampler without noise, or an accelerator of the "
                "network's inside (DeepCache, First-Block Cache)"
            )
        return super().off(run)

    def note(self, run: Run) -> str | None:
        if run.steps < FEW:
            return f"{self.title}: in {run.steps} steps little can be forecast; it is meant for {FEW} and more"
        return None


class DerivativeSession(Answering):
    """Keeps the newest ``anchors`` derivatives of full calls, and the place of the current call.

    domain: "d" or "x0", what is kept and forecast.
    """

    def __init__(self, run: Run, anchors: int, domain: str = "d"):
        super().__init__(run)
        self.store = BranchStore(anchors)
        self.domain = domain
        self.age = 0
        """Full calls since the beginning, or since everything was forgotten."""
        self.skipped = 0
        """Skipped calls since the last full one."""
        self.latest = 0.0
        """The time of the last full call."""
        self.position = Position(0, 0, True, False)

    def coordinate(self, t: float) -> float:
        return self.run.coordinate(t)

    def key(self, x: torch.Tensor) -> list[Hashable]:
        """Another size, dtype or device is another picture."""
        return [(self.domain, tuple(x.shape), x.dtype, x.device)]

    def decide(self, t: float, position: Position) -> Plan:
        self.position = position
        if not self.active(t) or t <= 0.0:
            self.flush()
            return Plan.PLAIN
        return self.plan_at(t)

    def plan_at(self, t: float) -> Plan:
        """The plan of a call inside the window. SKIP may still become FULL, where ``answer`` has none."""
        raise NotImplementedError

    def guarded_now(self, warmup: int, tail: int) -> bool:
        """Whether the call must be full: among the first since the beginning or a restart, or in the last steps."""
        return self.age < warmup or self.guarded(self.position, 0, tail)

    def learn(self, x: torch.Tensor, t: float, x0: torch.Tensor) -> None:
        self.store.put(self.key(x), self.value(x, t, x0), self.coordinate(t))
        self.age += 1
        self.skipped = 0
        self.latest = t

    def value(self, x: torch.Tensor, t: float, x0: torch.Tensor) -> torch.Tensor:
        """What is kept of a full call, in float32."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x.to(wide) - x0.to(wide)) / t if self.domain == "d" else x0.to(wide)

    def denoised(self, x: torch.Tensor, t: float, value: torch.Tensor) -> torch.Tensor:
        """``value``'s inverse: the prediction that belongs to it at ``x``."""
        return (x - t * value if self.domain == "d" else value).to(x.dtype)

    def foreseen(self, x: torch.Tensor, t: float, weights: Weights) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The newest value and the step from it to where ``weights`` see it at t; None without anchors."""
        key, at = self.key(x), self.coordinate(t)
        newest = self.store.get(key, x.device)
        found = self.store.forecast(key, at, weights, x.device)
        return None if newest is None or found is None else (newest, found - newest)

    def flush(self) -> None:
        super().flush()
        self.age = self.skipped = 0


def mean_square(*tensors: torch.Tensor) -> list[list[float]]:
    """The mean square of every sample of each tensor: the one read-back of a call."""
    return torch.stack([v.float().flatten(1).square().mean(1) for v in tensors]).tolist()


def mean_abs(*tensors: torch.Tensor) -> list[float]:
    """The mean absolute value of each tensor: the one read-back of a call."""
    return torch.stack([v.float().abs().mean() for v in tensors]).tolist()
