"""Exponential integrators in data prediction: DDIM, DPM-Solver++ and SDE-DPM-Solver++ from one update.

Between s and t (lambda increases by h), with a share kappa in [0, 1] of the old noise kept, the reverse process is

    x_t = (sigma_t / sigma_s) kappa x_s + alpha_t I + sigma_t sqrt(1 - kappa^2) z,
    I   = int_0^1 H e^{-H (1 - u)} D(u) du,          H = h - log kappa,   u = (lambda - lambda_s) / h,

D being the predicted clean sample along the way. kappa = 1 is the probability-flow ODE (Lu et al. 2022,
arXiv:2211.01095, eq. 8), kappa = e^{-eta h} the reverse SDE scaled by eta (ibid., eq. 18 at eta = 1), and
kappa^2 = 1 - eta^2 (1 - e^{-2h}) is DDIM with eta (Song et al. 2020, arXiv:2010.02502, eq. 16).

D(u) is replaced by the polynomial through the newest k predictions: ``multistep.py`` does the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from .declared import FRAME, LOWER_ORDER_FINAL, NOISE, S_NOISE
from .kernel import Data
from .method import param
from .multistep import Multistep, Place, Rule


@dataclass(frozen=True)
class DDIM(Multistep):
    """First-order sampler, from deterministic (eta 0) to the ancestral DDPM sampler (eta 1).

    x_t = alpha_t D + sigma_t [sqrt(1 - eta^2 (1 - q^2)) eps + eta sqrt(1 - q^2) z],
    with eps = (x_s - alpha_s D) / sigma_s and q = (sigma_t alpha_s) / (sigma_s alpha_t).

    eta = 0 is the Euler method for the probability-flow ODE, and DPM-Solver++ of order 1. One call per step.
    Raises ValueError for eta outside [0, 1].

    Source: Song, Meng, Ermon (2020), arXiv:2010.02502, eq. 12 and 16.
    """

    id: ClassVar[str] = "DDIM"
    title: ClassVar[str] = "DDIM"
    paper: ClassVar[str] = "Song et al. (2020), arXiv:2010.02502"

    eta: float = param(
        0.0, "Noise added per step: 0 none (deterministic), 1 as much as DDPM.", min=0.0, max=1.0, step=0.01
    )
    s_noise: float = param(**S_NOISE)
    noise: str = param(**NOISE)

    span: ClassVar[int] = 1
    in_frame: ClassVar[str] = "snr"

    @property
    def convergence_order(self) -> int:
        return 1

    @property
    def draws(self) -> str | None:
        return self.noise if self.eta > 0.0 else None

    def rule(self, place: Place) -> Rule:
        return Rule(Data(), kappa=math.sqrt(1.0 + self.eta**2 * math.expm1(-2.0 * place.h)), gain=self.s_noise)


class MultistepDPM(Multistep):
    """Abstract: what DPM-Solver++ and its SDE share. Members declare the four parameters, each where it reads best."""

    order: int
    correction: str
    third_order: str
    lower_order_final: str

    @property
    def span(self) -> int:
        return self.order

    @property
    def ode_order(self) -> int:
        return 2 if self.order == 3 and self.third_order == "reference" else self.order

    def rule_with(self, place: Place, kappa: float = 1.0, gain: float = 1.0) -> Rule:
        points = place.points(self.order, self.lower_order_final)
        return Rule(Data(), points, kappa=kappa, gain=gain, bend=self._bend)

    def _bend(self, M: list[float], H: float) -> list[float]:
        """The published members differ from the exact integral in one moment each."""
        if len(M) == 2 and self.correction == "midpoint":
            return [M[0], M[0] / 2]
        if len(M) == 3 and self.third_order == "reference":
            return [M[0], M[1], M[2] / 2]
        return M


_CORRECTION: dict[str, Any] = dict(
    default="midpoint",
    help="Second-order term: midpoint (DPM-Solver++'s own) or taylor (the exact integral, also called heun or RES 2M).",
    options=("midpoint", "taylor"),
)
_THIRD: dict[str, Any] = dict(
    default="exact",
    help="Third-order term: exact converges at order 3; reference is the published formula, which converges at order 2 but is "
    "steadier at few steps with high CFG.",
    options=("exact", "reference"),
    advanced=True,
)


@dataclass(frozen=True)
class DPMSolverPP(MultistepDPM):
    """DPM-Solver++ multistep (1S, 2M, 3M): the usual choice for 8 to 20 steps, one network call per step.

    x_t = (sigma_t / sigma_s) x_s + alpha_t sum_j w_j D_j,  sum_j w_j u_j^m = M_m,  M_m = h m! phi_{m+1}(-h),

    over the newest ``order`` predictions D_j at u_j = (lambda_j - lambda_s) / h. Order 1 is DDIM. "midpoint" takes
    M_1 = M_0 / 2 at order 2, which differs from the exact integral by O(h^3) and keeps the order.

    At order 3 the published formula (arXiv:2211.01095, algorithm 2's extension, and every copy of it) has half the
    exact M_2 and therefore converges at order 2; ``third_order = exact`` uses the integral itself and converges at
    order 3. The first steps have fewer predictions and lower order.

    Source: Lu et al. (2022), arXiv:2211.01095, eq. 8-12 and algorithm 2.
    """

    id: ClassVar[str] = "DPMSolverPP"
    title: ClassVar[str] = "DPM-Solver++"
    paper: ClassVar[str] = "Lu et al. (2022), arXiv:2211.01095"

    order: int = param(
        2, "1 is DDIM, 2 is 2M (robust), 3 is 3M (more accurate from about 12 steps and low CFG).", min=1, max=3
    )
    correction: str = param(**_CORRECTION)
    third_order: str = param(**_THIRD)
    lower_order_final: str = param(**LOWER_ORDER_FINAL)
    frame: str = param(**FRAME)

    draws: ClassVar[None] = None

    @property
    def convergence_order(self) -> int:
        return self.ode_order

    @property
    def in_frame(self) -> str:
        return "vef" if self.frame == "vef" else "snr"

    def rule(self, place: Place) -> Rule:
        return self.rule_with(place)


@dataclass(frozen=True)
class SDEDPMSolverPP(MultistepDPM):
    """SDE-DPM-Solver++ (1, 2M, 3M): adds fresh noise at every step, for texture at 15 steps and more.

    As DPM-Solver++, with kappa = e^{-eta h} of the old noise kept and H = (1 + eta) h in the weights:

    x_t = (sigma_t / sigma_s) e^{-eta h} x_s + alpha_t sum_j w_j D_j + sigma_t sqrt(1 - e^{-2 eta h}) z.

    eta = 0 is DPM-Solver++, eta = 1 the reverse SDE; order 1 with eta = 1 is DDIM with eta = 1. Variance converges at weak
    order 1 for order 1 and 2 for orders 2 and 3. One call per step.

    Source: Lu et al. (2022), arXiv:2211.01095, section 5 and eq. 18-19; the scaling by eta is k-diffusion's.
    """

    id: ClassVar[str] = "SDEDPMSolverPP"
    title: ClassVar[str] = "SDE-DPM-Solver++"
    paper: ClassVar[str] = "Lu et al. (2022), arXiv:2211.01095"

    order: int = param(2, "Predictions used per step: 1, 2 (2M) or 3 (3M).", min=1, max=3)
    eta: float = param(
        1.0, "Noise added per step: 0 none (DPM-Solver++), 1 the reverse SDE.", min=0.0, max=2.0, step=0.01
    )
    correction: str = param(**_CORRECTION)
    third_order: str = param(**_THIRD)
    s_noise: float = param(**S_NOISE)
    lower_order_final: str = param(**LOWER_ORDER_FINAL)
    noise: str = param(**NOISE)

    @property
    def draws(self) -> str | None:
        return self.noise if self.eta > 0.0 else None

    in_frame: ClassVar[str] = "snr"

    @property
    def convergence_order(self) -> int:
        return min(self.order, 2) if self.stochastic else self.ode_order

    def rule(self, place: Place) -> Rule:
        return self.rule_with(place, math.exp(-self.eta * place.h), self.s_noise)
