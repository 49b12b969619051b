"""DPM-Solver-12 and -23: adaptive step sizes in lambda."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .declared import FRAME
from .kernel import Data, Kernel, Noise
from .method import param
from .runge_kutta import Stage
from .singlestep import THIRDS, exponential
from .step_size import Adaptive, Controller, Pair, Row, Verdict


@dataclass(frozen=True)
class Proportional(Controller):
    """DPM-Solver's: accept if E <= 1, h <- theta h E^(-1/order)."""

    order: int
    theta: float

    def judge(self, E: float, h: float, memory: Any) -> Verdict:
        return Verdict(E <= 1.0, self.theta * h * max(E, 1e-10) ** (-1.0 / self.order), None)


@dataclass(frozen=True)
class PID(Controller):
    """k-diffusion's: proportional-integral-derivative control of log h, softly limited; accepts while h shrinks by less
    than a factor of 0.81. The memory is 1 / E of this trial and of the last two accepted ones."""

    order: int
    p: float
    i: float
    d: float

    def judge(self, E: float, h: float, memory: tuple[float, float, float] | None) -> Verdict:
        now = 1.0 / (E + 1e-8)
        _, before, earlier = memory or (now, now, now)
        exponents = (self.p + self.i + self.d, -(self.p + 2 * self.d), self.d)
        factor = math.prod(v ** (b / self.order) for v, b in zip((now, before, earlier), exponents, strict=True))
        factor = 1.0 + math.atan(factor - 1.0)
        accept = factor >= 0.81
        return Verdict(accept, h * factor, (now, now, before) if accept else (now, before, earlier))


@dataclass(frozen=True)
class DPMSolverAdaptive(Adaptive):
    """DPM-Solver-12 and -23: chooses its own step sizes to keep an error tolerance. Take it to find out how many calls a
    picture needs, or as an accurate reference; the sigmas given to it only say where it starts and ends.

    A step from lambda_s over h is taken with order k (``order``: DPM-Solver-2 or -3, or the DPM-Solver++ forms) and, from the
    same network calls, with order k - 1 (DPM-Solver-1, or -2 with r_1 = 1/3). With

    E = rms[ (x_high - x_low) / max(atol, rtol max(|x_low|, |x_low before|)) ]

    over the sample (its edited part, when inpainting), the step is accepted if E <= 1, and h <- theta h E^(-1/k). ``pid``
    is k-diffusion's controller instead (ComfyUI's dpm_adaptive). Every picture of a batch has its own steps, so it comes
    out as it would alone; the batch takes as many calls as its slowest picture.

    A step takes k calls, a rejected one k - 1 besides the first. The run goes to the last positive sigma, hit exactly, and
    then to 0 by one more call. Errors are read back from the device once per trial step. Once a picture has used
    ``max_calls``, the rest is done without control, by one step per sigma that is left. A step and preview of the sampler
    ends when all pictures have passed its sigma, so some steps take no call and others many.

    Weaknesses: the tolerance is for pixels in [-1, 1] and latents of about unit size; the number of calls is not known in
    advance; at the usual 10 to 30 calls a good fixed schedule is more accurate. Constant predictions are solved exactly.

    Source: Lu et al. (2022), arXiv:2206.00927, appendix on adaptive step sizes; PID controller: Crowson, k-diffusion.
    """

    id: ClassVar[str] = "DPMSolverAdaptive"
    title: ClassVar[str] = "DPM-Solver adaptive"
    paper: ClassVar[str] = "Lu et al. (2022), arXiv:2206.00927"

    order: int = param(3, "2 is DPM-Solver-12, 3 is DPM-Solver-23.", min=2, max=3)
    rtol: float = param(
        0.05,
        "Error allowed relative to the latent. Lower it for more accuracy and more calls.",
        min=1e-6,
        max=1.0,
        step=1e-4,
    )
    atol: float = param(
        0.0078, "Error allowed where the latent is near 0. Lower it together with rtol.", min=1e-8, max=1.0, step=1e-4
    )
    algorithm: str = param(
        "data",
        "data is DPM-Solver++, steady under guidance. noise is DPM-Solver, as in the paper and in ComfyUI.",
        options=("data", "noise"),
    )
    max_calls: int = param(200, "Network calls after which the rest is done in plain steps.", min=1, max=100_000)
    controller_type: str = param(
        "dpm-solver",
        "How step sizes follow the error: the paper's rule, or k-diffusion's pid.",
        options=("dpm-solver", "pid"),
    )
    h_init: float = param(
        0.05,
        "First trial step in lambda. It corrects itself within a few steps.",
        min=1e-4,
        max=10.0,
        step=0.01,
        advanced=True,
    )
    theta: float = param(
        0.9,
        "Safety factor of the paper's rule: lower it if many steps are rejected.",
        min=0.1,
        max=1.0,
        step=0.01,
        advanced=True,
    )
    pcoeff: float = param(0.0, "Proportional coefficient of pid.", min=-1.0, max=1.0, step=0.01, advanced=True)
    icoeff: float = param(1.0, "Integral coefficient of pid.", min=0.0, max=2.0, step=0.01, advanced=True)
    dcoeff: float = param(0.0, "Derivative coefficient of pid.", min=-1.0, max=1.0, step=0.01, advanced=True)
    frame: str = param(**FRAME)

    @property
    def convergence_order(self) -> int:
        return self.order

    @property
    def kernel(self) -> Kernel:
        return Data() if self.algorithm == "data" else Noise("lambda")

    @property
    def in_frame(self) -> str:
        return {"data": "snr", "noise": "vef"}[self.algorithm] if self.frame == "auto" else self.frame

    @property
    def pair(self) -> Pair:
        *inner, result = exponential(self.order, "midpoint", (0.5,) if self.order == 2 else THIRDS)
        lower = Stage(1.0) if self.order == 2 else Stage(1.0, (0, 1), midpoint=True)
        return Pair(tuple(inner), result, (lower,))

    @property
    def controller(self) -> Controller:
        if self.controller_type == "pid":
            return PID(self.order, self.pcoeff, self.icoeff, self.dcoeff)
        return Proportional(self.order, self.theta)

    def first(self, length: float) -> float:
        return self.h_init

    def allowed(self, row: Row, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        return torch.maximum(low.abs(), row.low.abs()).mul_(self.rtol).clamp_min_(self.atol)
