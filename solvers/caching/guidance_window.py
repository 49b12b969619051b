"""Guidance in a limited interval of noise levels."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method import param
from .accelerator import Accelerator, Plan, Run
from .guiding import Guiding
from .tracker import Position


@dataclass(frozen=True)
class GuidanceWindow(Accelerator):
    """Guides only between two points of sampling; before and after, only the positive side is computed.

    Guidance at high noise takes variety away, at low noise it does hardly anything. The paper leaves it out at both
    ends and finds more variety and better pictures. Its interval for SDXL, sigma in (0.28, 5.42], is 0.19 to 0.93 of
    sampling, the defaults: a quarter of the calls of an even schedule costs half. It is another result than full
    guidance, not an approximation of it, so compare pictures, not errors; the guidance scale may need to be higher.

    From 0 to 1 gives exactly the unaccelerated result. Works with every model, sampler and guider that has one
    positive and one negative side; without one it does nothing and says so.

    Source: Kynkaanniemi et al. (2024), arXiv:2404.07724.
    """

    id: ClassVar[str] = "GuidanceWindow"
    title: ClassVar[str] = "Guidance Window"
    paper: ClassVar[str] = "Kynkaanniemi et al. (2024), arXiv:2404.07724"
    site: ClassVar[str] = "guidance"

    start_percent: float = param(
        0.19, "Guidance begins at this fraction of sampling: later gives more variety.", min=0.0, max=1.0, step=0.01
    )
    end_percent: float = param(
        0.93, "Guidance ends at this fraction of sampling: sooner saves more.", min=0.0, max=1.0, step=0.01
    )

    @property
    def percents(self) -> tuple[float, float]:
        return self.start_percent, self.end_percent

    def start(self, run: Run) -> GuidanceWindowSession:
        return GuidanceWindowSession(run, self.title)


class GuidanceWindowSession(Guiding):
    """Both sides inside the window, one outside."""

    def decide(self, t: float, position: Position) -> Plan:
        return Plan.FULL if self.active(t) else Plan.PARTIAL

    def ready(self, key: Hashable) -> bool:
        return True

    def learn(self, key: Hashable, x: torch.Tensor, t: torch.Tensor, D_c: torch.Tensor, D_u: torch.Tensor) -> None:
        """Nothing is kept."""

    def answer(self, key: Hashable, x: torch.Tensor, t: torch.Tensor, D_c: torch.Tensor) -> torch.Tensor:
        return D_c.clone()
