"""GuidanceCache: the unconditional side of guidance every few calls, forecast in between."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method import param
from .accelerator import Accelerator, Plan, Run
from .declared import END, START, TAIL, WARMUP
from .guiding import AUTO, POLICIES, Difference, Guiding
from .tracker import Position


@dataclass(frozen=True)
class GuidanceCache(Accelerator):
    """TODO"""

    id: ClassVar[str] = "GuidanceCache"
    title: ClassVar[str] = "Guidance Cache"
    paper: ClassVar[str] = "This pack; after Castillo et al. (2023), arXiv:2312.12487"
    site: ClassVar[str] = "guidance"

    interval: int = param(
        3, "Both sides are computed in one call of this many; 1 switches the cache off.", min=1, max=20
    )
    policy: str = param(
        AUTO,
        "What stands in for the difference of the two sides: linear extrapolates it, reuse keeps the last one, drop "
        "leaves guidance out; auto is linear, or reuse where the sampler adds noise.",
        options=POLICIES,
    )
    warmup: int = WARMUP(4)
    tail: int = TAIL(0)
    start_percent: float = START(0.25)
    end_percent: float = END()

    @property
    def percents(self) -> tuple[float, float]:
        return self.start_percent, self.end_percent

    def start(self, run: Run) -> GuidanceCacheSession:
        return GuidanceCacheSession(self, run)


class GuidanceCacheSession(Guiding):
    """Counts the calls since the last full one."""

    def __init__(self, settings: GuidanceCache, run: Run):
        super().__init__(run, settings.title)
        self.settings = settings
        self.difference = Difference(run, settings.policy, self.store)
        self.left = 0

    def decide(self, t: float, position: Position) -> Plan:
        if self.settings.interval == 1 or not self.active(t):
            self.flush()
            return Plan.PLAIN
        if self.left > 0 and not self.guarded(position, self.settings.warmup, self.settings.tail):
            self.left -= 1
            return Plan.PARTIAL
        self.left = self.settings.interval - 1
        return Plan.FULL

    def flush(self) -> None:
        self.left = 0
        super().flush()

    def ready(self, key: Hashable) -> bool:
        return self.difference.ready(key)

    def learn(self, key: Hashable, x: torch.Tensor, t: torch.Tensor, D_c: torch.Tensor, D_u: torch.Tensor) -> None:
        self.difference.learn(key, self.t, t, D_c, D_u)

    def answer(self, key: Hashable, x: torch.Tensor, t: torch.Tensor, D_c: torch.Tensor) -> torch.Tensor:
        return self.difference.answer(key, self.t, t, D_c)
