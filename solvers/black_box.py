"""Black-box sampling: the probability-flow ODE by general adaptive Runge-Kutta methods."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from .kernel import Kernel, Noise
from .method import param
from .runge_kutta import Stage, classical
from .step_size import Adaptive, Controller, Pair, Row, Verdict


@dataclass(frozen=True)
class LogSigma(Kernel):
    """dy / d log rho = y - D with y = x / alpha: neither part of the equation is integrated exactly. Any constant m, no
    exponential: A = alpha_t / alpha_s, B = alpha_t, M_k = log(rho_t / rho_s) / (k + 1)."""

    key: ClassVar[str] = "drift"

    def place(self, process, t):
        return -process.lam(t)

    def time(self, process, place):
        return process.t_of_lam(-place)

    def read(self, process, x, x0, t):
        return torch.sub(x / process.alpha(t), x0)

    def line(self, process, s, t, kappa):
        return process.alpha(t) / process.alpha(s), process.alpha(t)

    def moments(self, process, s, t, k, kappa):
        return [(self.place(process, t) - self.place(process, s)) / (m + 1) for m in range(k)]


@dataclass(frozen=True)
class Elementary(Controller):
    """Hairer's and scipy's: accept if E <= 1; h <- h times 0.9 E^(-exponent), within [0.2, 10], and not above 1 right after
    a rejection, which is the memory."""

    exponent: float

    def judge(self, E: float, h: float, memory: bool | None) -> Verdict:
        factor = 0.9 * max(E, 1e-30) ** -self.exponent
        if E > 1.0:
            return Verdict(False, h * max(0.2, factor), True)
        return Verdict(True, h * min(1.0 if memory else 10.0, factor), None)


@lru_cache(maxsize=3)
def _of_scipy(method: str) -> tuple[Pair, Controller]:
    """The embedded pair of one of scipy's steppers, whose error estimates are of order ``error_estimator_order``."""
    from scipy import integrate  # half a second, so only where it is used

    theirs = getattr(integrate, method)
    n = theirs.n_stages
    A, B, C = theirs.A[:n, :n].tolist(), theirs.B.tolist(), theirs.C[:n].tolist()
    weights = [theirs.E5, theirs.E3] if method == "DOP853" else [theirs.E]
    lower = [[b - e for b, e in zip([*B, 0.0], E.tolist(), strict=True)] for E in weights]
    pair = Pair(classical(C[1:], A[1:], B), None, tuple(Stage(1.0, tuple(range(n + 1)), tuple(b)) for b in lower))
    return pair, Elementary(1.0 / (theirs.error_estimator_order + 1))


@dataclass(frozen=True)
class AdaptiveRK(Adaptive):
    """General adaptive Runge-Kutta (RK45 and others): chooses its own step sizes to keep an error tolerance, with no knowledge
    of diffusion. Take it for reference pictures; the sigmas given to it only say where it starts and ends.

    The probability-flow ODE is solved as dx / d log sigma = x - D ("log sigma", score-SDE's form for variance exploding models)
    or as dx / dsigma = (x - D) / sigma ("sigma", the form of EDM and flow matching), on both kinds of model, by Dormand and
    Prince's pair 5(4), RK45 or "dopri5", Bogacki and Shampine's 3(2), RK23 or "bosh3", or the 8(5,3) of DOP853. With

    E = rms[ error / (atol + rtol max(|x|, |x_new|)) ]

    over the sample (its edited part, when inpainting), the step is accepted if E <= 1, and h <- 0.9 h E^(-1/p), within a
    factor of 0.2 to 10, p being 3, 5 and 8. The first trial is 1 % of the range. An accepted step takes 3, 6 or 12 calls.
    Every picture of a batch has its own steps, as in DPM-Solver adaptive, which see for ``max_calls`` and previews. Errors are
    read back from the device once per trial step.

    Weaknesses: the number of calls is not known in advance, and below about 30 calls a fixed schedule is more accurate. Tight
    tolerances meet the rounding of half-precision networks; then most steps are rejected.

    Source: Song et al. (2020), arXiv:2011.13456, section 4.3; tableaus and control are those of scipy.integrate.
    """

    id: ClassVar[str] = "AdaptiveRK"
    title: ClassVar[str] = "Adaptive Runge-Kutta"
    paper: ClassVar[str] = "Song et al. (2020), arXiv:2011.13456"

    method: str = param(
        "RK45",
        "RK45 for most tolerances, RK23 for rtol of 0.01 and more, DOP853 for 0.00001 and less.",
        options=("RK45", "RK23", "DOP853"),
    )
    rtol: float = param(
        1e-3,
        "Error allowed relative to the latent. Lower it for more accuracy and more calls.",
        min=1e-9,
        max=1.0,
        step=1e-6,
    )
    atol: float = param(
        1e-3, "Error allowed where the latent is near 0. Lower it together with rtol.", min=1e-9, max=1.0, step=1e-6
    )
    max_calls: int = param(500, "Network calls after which the rest is done in plain steps.", min=1, max=100_000)
    variable: str = param(
        "log sigma",
        "Variable of the equation: log sigma takes fewer steps; sigma is exact where the prediction is constant.",
        options=("log sigma", "sigma"),
        advanced=True,
    )

    in_frame: ClassVar[str] = "vef"

    @property
    def convergence_order(self) -> int:
        return {"RK23": 3, "RK45": 5, "DOP853": 8}[self.method]

    @property
    def kernel(self) -> Kernel:
        return Noise("rho") if self.variable == "sigma" else LogSigma()

    @property
    def pair(self) -> Pair:
        return _of_scipy(self.method)[0]

    @property
    def controller(self) -> Controller:
        return _of_scipy(self.method)[1]

    def first(self, length: float) -> float:
        return 0.01 * length

    def allowed(self, row: Row, high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        return torch.maximum(row.x.abs(), high.abs()).mul_(self.rtol).add_(self.atol)
