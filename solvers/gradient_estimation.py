"""The gradient-estimation sampler: Euler steps along an extrapolated slope."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .kernel import RHO, Kernel
from .method import param
from .multistep import Multistep, Place, Rule


@dataclass(frozen=True)
class GradientEstimation(Multistep):
    """Euler steps along an extrapolated noise prediction; one network call per step, meant for about 10 steps.

    x <- x + (sigma_{i+1} - sigma_i) [gamma d_i + (1 - gamma) d_{i-1}],     d = (x - D) / sigma

    on variance-exploding models, where d is the noise prediction, and on flow models, where it is the velocity. The first
    step is Euler's. The paper sees denoising as gradient descent on the distance to the data, and gamma as the correction
    of the network's error in direction; as an ODE method it has order 1, but gamma = 1.5 is Adams-Bashforth of order 2 on
    equal steps. gamma = 1 is DDIM. ``second_order`` takes gamma_i = 1 + h_i / (2 h_{i-1}), h being the steps in
    sigma: order 2 on any grid (an addition of this pack; IPNDM with 2 exact points).

    Source: Permenter, Yuan (2023), arXiv:2306.04848, and the authors' code.
    """

    id: ClassVar[str] = "GradientEstimation"
    title: ClassVar[str] = "Gradient estimation"
    paper: ClassVar[str] = "Permenter and Yuan (2023), arXiv:2306.04848"

    gamma: float = param(
        2.0,
        "Share of the newest slope; more than 1 extrapolates. 2 is the paper's, 1 is DDIM.",
        min=0.0,
        max=5.0,
        step=0.05,
    )
    second_order: bool = param(False, "Choose gamma from the step sizes, for second order; gamma is ignored.")

    kernels: ClassVar[tuple[Kernel, ...]] = (RHO,)
    span: ClassVar[int] = 2
    in_frame: ClassVar[str] = "vef"
    draws: ClassVar[None] = None

    @property
    def convergence_order(self) -> int:
        return 2 if self.second_order or self.gamma == 1.5 else 1

    def rule(self, place: Place) -> Rule:
        if self.second_order or place.known == 1:
            return Rule(RHO, 2)
        return Rule(RHO, 2, shares=(1.0 - self.gamma, self.gamma))
