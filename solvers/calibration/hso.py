"""Sigmas with the least value of a midpoint rule, which end where they keep apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.optimize import minimize

from ..method import param
from ..process import ForwardProcess
from .curve import Curve
from .dmn import errors
from .proposal import Computed, Measured

ENDS = np.linspace(0.01, 0.03, 21)
"""Training times at which the last level may be."""

PENALTY, LOOSE, TIGHT = 1e9, (4, 0.15), (20, 0.01)
"""Weight of the spacing; steps and least distance in training time, between which it is linear."""


@dataclass(frozen=True)
class HSO(Computed):
    """Hierarchical schedule optimization: computes sigmas for whatever sampler, and keeps them apart in training time. For about 5
    steps. The computation needs no network; trying what it proposes does. The same for all models with the same range of sigmas.

    Below, a descent on the midpoint rule

        MEP(lambda) = sum_i err((lambda_i + lambda_{i+1}) / 2) (e^{lambda_{i+1}} - e^{lambda_i}),        err = sigma^p / alpha,

    with alpha^2 + sigma^2 = 1. Above, a search for where it ends, at training time 0.01 to 0.03 of 1: where the MEP reached is
    least, plus 1e9 times the sum of squares of what distances in training time lack to ``spacing`` times 0.15 at 4 steps, falling
    to 0.01 at 20. Training time is the model's, or log sigma where its sigmas are not a table. The last level is replaced by 0.

    The authors search by differential evolution, the largest sigma and the rho of the Karras schedule that the descent begins
    with included. Here sigmas begin with the largest one, and rho is no parameter: the MEP has one minimum, reached from all.
    It is the midpoint rule of an integral that is the same for all schedules (of sigma, with p = 2), and counts no error of the
    sampler.

    On a mixture of Gaussians, as proposed, mean RMS of 200 samples to the solution (Karras before): Euler .190 .156 with 5 steps,
    .109 .109 with 8, .079 .099 with 10; 2M .179 .114, .053 .090, .025 .078, and .0035 .043 with 20. It leaves too few steps at low
    noise; 40% of the way from Karras gives 2M .038 with 8 steps. p = 1 is even in log sigma: 2M .101, .029, .014, .0024.

    On the demo networks, 8 steps of 2M, CFG 4, 12 samples: UNet .064 (best usual, Uniform: .048), and no gain on the way; flow DiT
    .103, and .038 at 20 % of the way from Beta (.046).

    Source: Zhu, Su, Zhao, Feng, Shen, He (2025), arXiv:2511.11688; bounds and penalty are those of the authors' code.
    """

    id: ClassVar[str] = "HSO"
    title: ClassVar[str] = "Hierarchical schedule optimization (HSO)"
    paper: ClassVar[str] = "Zhu et al. (2025), arXiv:2511.11688"

    p: int = param(
        2, "How fast predictions become exact: 2 for models of latents, 1 for models of pixels.", min=1, max=2
    )
    spacing: float = param(
        1.0,
        "Times the distance that neighbours keep in training time. Lower lets sigmas gather, at 0 wherever the descent takes them.",
        min=0.0,
        max=2.0,
        step=0.05,
    )

    def times(self, measured: Measured, process: ForwardProcess, steps: int, order: int) -> list[float]:
        curve = Curve(process, process.t_max, process.t_min, steps)
        tried = [descended(-curve.ends[0], process.lam(float(trained(process, u))), steps, self.p) for u in ENDS]
        best = min(tried, key=lambda lam: mep(lam, self.p)[0] + PENALTY * lack(process, lam, self.spacing))
        return curve.times(curve.levels(curve.logits(curve.times(-best[1:-1]))))  # never closer than the least gap


def lack(process: ForwardProcess, lam: np.ndarray, spacing: float) -> float:
    """Sum of squares of what the distances in training time lack."""
    least = spacing * float(np.interp(len(lam) - 1, *np.transpose([LOOSE, TIGHT])))
    return float((np.maximum(least + np.diff(training(process, lam)), 0.0) ** 2).sum())


def mep(lam: np.ndarray, p: float) -> tuple[float, np.ndarray]:
    """The midpoint rule, and its slope by all lambda but the ends."""
    middle, e = 0.5 * (lam[1:] + lam[:-1]), np.exp(lam)
    err, rise = errors(middle, p), np.diff(np.exp(lam))
    share = 1.0 / (1.0 + np.exp(-2.0 * middle))
    along = -0.5 * err * (p * share + 1.0 - share) * rise
    return float((err * rise).sum()), along[1:] - err[1:] * e[1:-1] + along[:-1] + err[:-1] * e[1:-1]


def descended(low: float, high: float, steps: int, p: float) -> np.ndarray:
    """lambda_0 .. lambda_n with the least MEP between two ends."""
    lam = np.linspace(low, high, steps + 1)
    if steps == 1:
        return lam

    def objective(y: np.ndarray) -> tuple[float, np.ndarray]:
        return mep(np.concatenate([lam[:1], y, lam[-1:]]), p)

    made = minimize(objective, lam[1:-1], jac=True, method="L-BFGS-B", bounds=[(low, high)] * (steps - 1))
    return np.concatenate([lam[:1], np.sort(made.x), lam[-1:]])


def training(process: ForwardProcess, lam: np.ndarray) -> np.ndarray:
    """Training times, 0 to 1, of lambdas."""
    if process.training_sigmas is None and process.alpha(process.t_max) == 1.0:
        y = np.log([process.t_min, process.t_max])
        return (-lam - y[0]) / (y[1] - y[0])
    return process.u_of_t(process.t_of_rho(np.exp(-lam)))


def trained(process: ForwardProcess, u: float) -> float:
    """t at a training time."""
    if process.training_sigmas is None and process.alpha(process.t_max) == 1.0:
        return float(process.t_min ** (1.0 - u) * process.t_max**u)
    return float(process.t_of_u(u))
