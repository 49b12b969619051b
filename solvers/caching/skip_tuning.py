"""Skip-Tuning: a UNet's skip connections, weakened, give few-step sampling a stronger network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..method import param
from .accelerator import Accelerator, Plan, Run, Session
from .declared import END, START
from .tracker import Position

CURVES = {
    "constant": lambda u: 1.0,
    "early": lambda u: 1.0 - u,
    "middle": lambda u: math.sin(math.pi * u),
    "late": lambda u: u,
}
"""How strongly the skips are weakened at the fraction u of the run."""


@dataclass(frozen=True)
class SkipTuning(Accelerator):
    """Weakens the skip connections of a UNet a little, which may repair pictures made in 5 to 10 steps.

    For UNets only. It saves nothing by itself: the point is to get by with fewer steps. Try ``rho_bottom`` between 0.7
    and 0.95; compare with 1. Works with every sampler, guider and cache.

    Output block i of k + 1, counted from the deepest, joins the decoder's features u_i to the encoder's d_i. It gets
    rho_i d_i instead of d_i,

    rho_i = rho_bottom + (rho_top - rho_bottom) i / k,

    before they are concatenated. ``curve`` lets rho_i go to 1 in parts of the run: 1 + w(u) (rho_i - 1) with w(u) = 1,
    1 - u, sin(pi u) or u at the fraction u of the steps; the authors find intermediate noise levels to matter most.

    Measured on the demo UNet with DPM-Solver++(2M) and CFG 4, RMS distance to the converged picture: at 8 steps 0.161
    without, 0.153, 0.125, 0.114 with rho_bottom 0.9, 0.8, 0.7 (10 plain steps: 0.112), at 5 steps 0.223 without and
    0.219, 0.216, 0.217: it repairs part of what few steps lose, as long as there are some. rho_bottom 1.1 did harm;
    weakening the outermost skips too, or by "early", "middle" and "late", gave less.

    Both rho 1 give exactly the plain result. FreeU's scales come on top; ControlNet residuals are part of d_i and are
    weakened too.

    Source: Ma et al. (2024), arXiv:2402.15170, the rule for rho_i. Their rho differ by network and number of steps and
    are tuned by FID, and could not be read; the default is our own, and so are the curves.
    """

    id: ClassVar[str] = "SkipTuning"
    title: ClassVar[str] = "Skip-Tuning"
    paper: ClassVar[str] = "Ma et al. (2024), arXiv:2402.15170"
    site: ClassVar[str] = "tuning"

    rho_bottom: float = param(
        0.8, "Scale of the deepest skip connection; less than 1 weakens it.", min=0.0, max=2.0, step=0.01
    )
    rho_top: float = param(1.0, "Scale of the outermost skip connection.", min=0.0, max=2.0, step=0.01)
    curve: str = param(
        "constant",
        "Where in the run the scales are in full effect; elsewhere they go towards 1.",
        options=tuple(CURVES),
    )
    start_percent: float = START()
    end_percent: float = END()

    @property
    def percents(self) -> tuple[float, float]:
        return self.start_percent, self.end_percent

    def off(self, run: Run) -> str | None:
        return None

    def start(self, run: Run) -> SkipTuningSession:
        return SkipTuningSession(self, run)


class SkipTuningSession(Session):
    """``w``: how much of the scales is in effect in the current call."""

    def __init__(self, settings: SkipTuning, run: Run):
        super().__init__(run)
        self.settings, self.w = settings, 0.0

    def decide(self, t: float, position: Position) -> Plan:
        s = self.settings
        self.w = CURVES[s.curve](position.step / max(self.tracker.steps - 1, 1))
        changes = self.w != 0.0 and (s.rho_bottom, s.rho_top) != (1.0, 1.0)
        return Plan.FULL if changes and self.active(t) else Plan.PLAIN

    def rho(self, block: int, blocks: int) -> float:
        """The scale at output block ``block`` of ``blocks``."""
        s = self.settings
        rho = s.rho_bottom + (s.rho_top - s.rho_bottom) * block / max(blocks - 1, 1)
        return 1.0 + self.w * (rho - 1.0)
