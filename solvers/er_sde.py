"""ER-SDE: a family of reverse-time SDEs with the same marginals, chosen by how noise is scaled along the way.

With rho = sigma / alpha and a noise-scale function phi, whose phi(rho) / rho must not fall, the solution from s to t is

    x_t = (alpha_t / alpha_s) r x_s + alpha_t int K(rho) D d rho + alpha_t sqrt(rho_t^2 - r^2 rho_s^2) z,
    r = phi(rho_t) / phi(rho_s),      K(rho) = phi(rho_t) phi'(rho) / phi(rho)^2   over [rho_t, rho_s].

With kappa = r rho_s / rho_t this is the update of ``multistep.py``, and with u = (rho - rho_s) / (rho_t - rho_s) the
moments of its kernel follow by parts:

    M_0 = 1 - r,      M_k = 1 - k int_0^1 u^{k-1} phi(rho_t) / phi(rho(u)) du.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from .declared import NOISE, S_NOISE
from .kernel import Kernel, quadrature
from .method import param
from .multistep import Multistep, Place, Rule, nearest
from .process import ForwardProcess

_PEAK = 1022.375
"""Where phi_6(rho) / rho is largest; beyond it stays constant, or the noise would get a negative variance."""


def _log_phi_6(rho: float) -> float:
    rho = min(rho, _PEAK)
    return math.log(math.log10(1.0 + 100.0 * rho**1.5)) - 0.1 * math.log(rho)


def _log_phi_7(rho: float) -> float:
    power = rho**0.3
    return power + math.log1p(10.0 * math.exp(-power))


SCALES: dict[str, Callable[[float], float]] = {
    "exp_root": _log_phi_7,
    "ode": lambda rho: 0.0,
    "reverse_sde": lambda rho: math.log(rho),
    "power_1.5": lambda rho: 0.5 * math.log(rho),
    "power_2.5": lambda rho: 1.5 * math.log(rho),
    "exp_inverse": lambda rho: math.log(math.exp(-1.0 / rho) + 10.0),
    "log": _log_phi_6,
}
"""log(phi(rho) / rho) by name, for rho in (0, inf]."""


def _rho(process: ForwardProcess, t: float) -> float:
    return math.exp(-process.lam(t))


@dataclass(frozen=True)
class NoiseScaled(Kernel):
    """Data prediction in rho under the kernel of a noise-scale function, given by ``scale`` = log(phi(rho) / rho)."""

    key: ClassVar[str] = "x0"
    scale: Callable[[float], float]

    def place(self, process, t):
        return _rho(process, t)

    def time(self, process, place):
        return float(process.t_of_rho(place))

    def read(self, process, x, x0, t):
        return x0

    def line(self, process, s, t, kappa):
        return process.sigma(t) / process.sigma(s) * kappa, process.alpha(t)

    def moments(self, process, s, t, k, kappa):
        rho_s, rho_t = _rho(process, s), _rho(process, t)
        log_s, width = math.log(rho_s), math.log(rho_t / rho_s)
        end = self.scale(rho_t)
        M = [1.0 - kappa * rho_t / rho_s] + [1.0] * (k - 1)
        for node, weight in quadrature():  # in log rho, where the integrand is flat
            rho = math.exp(log_s + node * width)
            u = (rho - rho_s) / (rho_t - rho_s)
            share = weight * width * rho_t / (rho_t - rho_s) * math.exp(end - self.scale(rho))
            for m in range(1, k):
                M[m] -= m * share * u ** (m - 1)
        return M


@dataclass(frozen=True)
class ERSDE(Multistep):
    """Extended reverse-time SDE solver (ER-SDE): stochastic and of up to third order, one network call per step. Its default
    adds most of its noise early in the run; 20 steps are usual.

    x_t = (alpha_t / alpha_s) r x_s + alpha_t sum_j w_j D_j + alpha_t sqrt(rho_t^2 - r^2 rho_s^2) z,
    r = phi(rho_t) / phi(rho_s),  sum_j w_j u_j^m = M_m,

    over the newest ``order`` predictions D_j at u_j = (rho_j - rho_s) / (rho_t - rho_s); M_m as in ``er_sde.py``. The
    noise-scale functions phi of the paper's code, by number:

    - exp_root (7): rho (exp(rho^0.3) + 10)
    - ode (1): rho. No noise: order 1 is DDIM.
    - reverse_sde (2): rho^2. Order 1 is DDIM with eta 1 and SDE-DPM-Solver++ of order 1.
    - exp_inverse (3): rho (exp(-1 / rho) + 10), power_1.5 (4): rho^1.5, power_2.5 (5): rho^2.5
    - log (6): rho^0.9 log10(1 + 100 rho^1.5). Beyond rho = 1022, near a flow model's sigma 1, it is held at a straight
      line: there the published one would need noise of negative variance.

    At order 3 the published formula takes the slope between the last two predictions for the slope at rho_s and
    therefore converges at order 2 (phi = ode); ``third_order = exact`` uses the parabola's own slope and converges at
    order 3. The integrals, Riemann sums over 100 points in the paper's code and 200 in ComfyUI's, are exact here in both.
    With noise the variance converges at weak order 1 for order 1 and 2 for orders 2 and 3.

    Source: Cui et al. (2023), arXiv:2309.06169; formulas and phi checked with the authors' code.
    """

    id: ClassVar[str] = "ERSDE"
    title: ClassVar[str] = "ER-SDE"
    paper: ClassVar[str] = "Cui et al. (2023), arXiv:2309.06169"

    order: int = param(3, "Predictions used per step. 3 is the usual one; 2 is steadier with high CFG.", min=1, max=3)
    phi: str = param(
        "exp_root",
        "How noise is scaled along the way: exp_root is the authors' choice, ode adds none, reverse_sde and power_2.5 add "
        "most, exp_inverse least.",
        options=tuple(SCALES),
    )
    third_order: str = param(
        "exact",
        "Third-order term: exact converges at order 3; reference is the published formula, as in ComfyUI's er_sde, which "
        "converges at order 2.",
        options=("exact", "reference"),
        advanced=True,
    )
    s_noise: float = param(**S_NOISE)
    noise: str = param(**NOISE)

    in_frame: ClassVar[str] = "snr"

    @property
    def span(self) -> int:
        return self.order

    @property
    def convergence_order(self) -> int:
        return min(self.order, 2) if self.stochastic or self.third_order == "reference" else self.order

    @property
    def draws(self) -> str | None:
        return None if self.phi == "ode" else self.noise

    def rule(self, place: Place) -> Rule:
        scale = SCALES[self.phi]
        kappa = math.exp(scale(_rho(place.process, place.t)) - scale(_rho(place.process, place.s)))
        # Published: the slope from two predictions, the curvature from three.
        reach = nearest(1, range(1, self.order + 1)) if self.third_order == "reference" else None
        return Rule(NoiseScaled(scale), self.order, kappa=kappa, gain=self.s_noise, reach=reach)
