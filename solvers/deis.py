"""DEIS: the noise prediction as a polynomial in a time of choice, integrated exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .declared import FRAME
from .kernel import Kernel, Noise
from .method import param
from .multistep import Multistep, Place, Rule


@dataclass(frozen=True)
class DEIS(Multistep):
    """Integrates the noise prediction exactly, one network call per step: accurate from 10 steps on at low CFG.

    x_t = (alpha_t / alpha_s) x_s + alpha_t sum_j w_j eps_j,   w_j = int_{rho_s}^{rho_t} L_j(u(rho)) d rho,

    L_j being the Lagrange polynomials through the newest ``points`` noise predictions eps_j in the variable u, and
    rho = sigma / alpha. One point is DDIM. u = "t" or "vp" is the package's tAB, u = "rho" its rhoAB (also known as
    LMS and as variable-step iPNDM), u = "lambda" the multistep DPM-Solver. All converge at order ``points``, on any
    grid; they differ at few steps. The integrals over "t" and "vp" are taken by Gauss-Legendre quadrature. Where a model's
    training time is linear in sigma, as on flow models without shift, "t" is "rho".

    Naming: the authors' ab_order = r is a polynomial's degree, that is points = r + 1; ComfyUI's deis counts points. Its
    time is "vp" for a sigma from 0.002 to 80 whatever the model.

    With ``frame`` auto, flow models are seen in their own sigma, as dx / dsigma = (x - D) / sigma. Noise prediction is
    less stable than data prediction: at high CFG and few steps take 2 points, or DPM-Solver++.

    Source: Zhang, Chen (2022), arXiv:2204.13902, tAB-DEIS and rhoAB-DEIS, and the authors' code.
    """

    id: ClassVar[str] = "DEIS"
    title: ClassVar[str] = "DEIS"
    paper: ClassVar[str] = "Zhang and Chen (2022), arXiv:2204.13902"

    points: int = param(
        3,
        "Noise predictions used per step, also the order: 1 is DDIM, 2 is steadiest, 4 needs small steps.",
        min=1,
        max=4,
    )
    variable: str = param(
        "t",
        "What the predictions are a polynomial in. t: the model's training time (tAB); rho: noise-to-signal ratio (rhoAB, "
        "LMS); lambda: log SNR (DPM-Solver); vp: time of the linear VP process (tAB of the paper's own models).",
        options=("t", "rho", "lambda", "vp"),
    )
    frame: str = param(**FRAME)

    kernels: ClassVar[tuple[Kernel, ...]] = (Noise(),)
    draws: ClassVar[None] = None

    @property
    def convergence_order(self) -> int:
        return self.points

    @property
    def span(self) -> int:
        return self.points

    @property
    def in_frame(self) -> str:
        return "snr" if self.frame == "snr" else "vef"

    def rule(self, place: Place) -> Rule:
        return Rule(Noise(self.variable), self.points)
