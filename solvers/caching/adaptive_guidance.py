"""Adaptive Guidance: leave the unconditional side out for good once both sides agree."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method import param
from .accelerator import Accelerator, Plan, Run
from .declared import END, START
from .guiding import DROP, Difference, Guiding, direction
from .tracker import Position


@dataclass(frozen=True)
class AdaptiveGuidance(Accelerator):
    """Stops computing the negative side for the rest of a run, as soon as it agrees with the positive one.

    A full call measures, with d = (x - D) / t,

        gamma = min over the samples of the batch of  cos(d_c, d_u).

    From the first gamma >= ``threshold`` on, inside the window, calls are conditional. The decision holds for the rest
    of the run, or until noise is added (restarts). The paper finds a quarter of all network evaluations superfluous, at
    0.991; how early gamma gets there depends on the model and on the prompt, so a threshold may never be met, or at
    once: on our small DiT 0.991 ends guidance after a sixth to half of the run, too early (distance to full guidance
    0.14 to 0.19, where Guidance Cache at more work has 0.01 to 0.08). Then raise it, or ``start_percent``.

    ``policy`` drop is the paper's: guidance ends. reuse keeps the last difference of the two sides and so the strength
    of guidance; it stays closer to the full result. At the same cost Guidance Cache is closer than either, because it
    keeps measuring.

    gamma is read on the host once per full call; NaN keeps guidance on. Works with every model, sampler and guider that
    has one positive and one negative side; without one it does nothing and says so. CFG++ samplers get the positive
    prediction as their unconditional one (drop).

    Source: Castillo et al. (2023), arXiv:2312.12487.
    """

    id: ClassVar[str] = "AdaptiveGuidance"
    title: ClassVar[str] = "Adaptive Guidance"
    paper: ClassVar[str] = "Castillo et al. (2023), arXiv:2312.12487"
    site: ClassVar[str] = "guidance"

    threshold: float = param(
        0.991,
        "Cosine of the two sides from which on only the positive one is computed: lower is sooner. Above 1 it never is.",
        min=-1.0,
        max=1.01,
        step=0.001,
    )
    policy: str = param(
        DROP,
        "What follows: drop ends guidance, as published; reuse keeps the last difference of the two sides.",
        options=(DROP, "reuse"),
    )
    start_percent: float = START()
    end_percent: float = END()

    @property
    def percents(self) -> tuple[float, float]:
        return self.start_percent, self.end_percent

    def start(self, run: Run) -> AdaptiveGuidanceSession:
        return AdaptiveGuidanceSession(self, run)


class AdaptiveGuidanceSession(Guiding):
    """Full until gamma, of all context windows of a call, reaches the threshold."""

    def __init__(self, settings: AdaptiveGuidance, run: Run):
        super().__init__(run, settings.title)
        self.settings = settings
        self.difference = Difference(run, settings.policy, self.store)
        self.latched = False
        self.gammas: list[torch.Tensor] = []

    def decide(self, t: float, position: Position) -> Plan:
        if not self.active(t):
            self.gammas.clear()
            return Plan.PLAIN
        if self.gammas and not self.latched:
            self.latched = bool(torch.stack(self.gammas).min() >= self.settings.threshold)
        self.gammas.clear()
        return Plan.PARTIAL if self.latched else Plan.FULL

    def flush(self) -> None:
        self.latched = False
        self.gammas.clear()
        super().flush()

    def ready(self, key: Hashable) -> bool:
        return self.difference.ready(key)

    def learn(self, key: Hashable, x: torch.Tensor, t: torch.Tensor, D_c: torch.Tensor, D_u: torch.Tensor) -> None:
        self.difference.learn(key, self.t, t, D_c, D_u)
        d_c, d_u = (direction(x, t, D).flatten(1) for D in (D_c, D_u))
        self.gammas.append(torch.nn.functional.cosine_similarity(d_c, d_u, dim=1).min())

    def answer(self, key: Hashable, x: torch.Tensor, t: torch.Tensor, D_c: torch.Tensor) -> torch.Tensor:
        return self.difference.answer(key, self.t, t, D_c)
