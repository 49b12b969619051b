"""Sigmas that keep the errors of all predictions small together: a bound on what multistep weights make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.optimize import minimize

from ..method import param
from ..process import ForwardProcess
from .curve import Curve
from .proposal import Computed, Measured


@dataclass(frozen=True)
class DMN(Computed):
    """Computes sigmas from the sampler's own weights: those with which errors of the predictions add up least. The computation
    needs no network; trying what it proposes does. The same for all models with the same range of sigmas.

    A multistep sampler of order k changes x / sigma by sum_j c_j D_j in all, with c_j = sum_s J_{s,j} and

        J_{s,j} = int_{lambda_s}^{lambda_{s+1}} e^u l_j(u) du,       l: Lagrange basis on the newest min(k, s + 1, n - s) levels.

    If predictions are off by err(lambda) at most, the end is off by no more than

        sum_j | c_j | err(lambda_j),        err = sigma^p / alpha,   alpha^2 + sigma^2 = 1,

    which is minimized over lambda_1 .. lambda_{n-1} with neighbours at least ``gap`` apart, from levels uniform in lambda and from
    levels uniform in training time, the lower end counting. Steps with one level add | J | err by themselves, and so do the
    first ``trunc`` steps, as the root of the sum of (J err)^2. lambda_n, the model's smallest sigma, is then replaced by 0.

    Only the spread of the predictions counts, not how they bend. The bound carried to its minimum is no good for order 2 and more
    with many steps, and a lower one is no better: order 1 is best for samplers of second order too. On a mixture of Gaussians,
    as proposed, mean RMS of 200 samples to the solution (Karras before):

        steps                         5               8               10              20
        Euler, order 1           .190  .142      .109  .087      .079  .066      .0347  .0344
        2M, order 1              .179  .102      .053  .032      .025  .020      .0035  .0028
        2M, order 2              .179  .096      .053  .041      .025  .038      .0035  .0356
        2M, order 3, trunc 3     .179  .131      .053  .052      .025  .035      .0035  .0047

    On the demo networks, 8 steps of 2M, CFG 4, 12 samples: UNet .056, and .042 at 40 % of the way from the best usual schedule
    (Uniform, .048); flow DiT .224, and .041 at 20 % of the way from Beta (.046).

    Source: Xue, Liu, Chen, Zhang, Hu, Xie, Li (2024), arXiv:2402.17376, and the authors' code, which has order 3, trunc 3 and no
    gap. Its trust-region method stops at the kinks of the bound; here it is SLSQP, which goes lower.
    """

    id: ClassVar[str] = "DMN"
    title: ClassVar[str] = "DMN"
    paper: ClassVar[str] = "Xue et al. (2024), arXiv:2402.17376"

    order: int = param(
        1, "Order of the sampler that is bounded; 1 was best for others too. 0 takes that of the sampler.", min=0, max=3
    )
    p: int = param(
        2, "How fast predictions become exact: 2 for models of latents, 1 for models of pixels.", min=1, max=2
    )
    trunc: int = param(
        0, "First steps whose errors are added apart. The paper takes 3 up to 7 steps, 0 above.", min=0, max=10
    )
    gap: float = param(
        0.02,
        "Least distance of neighbours, as a share of the whole range of log sigma; at most a quarter of the mean distance.",
        min=0.001,
        max=0.2,
        step=0.001,
        advanced=True,
    )

    def times(self, measured: Measured, process: ForwardProcess, steps: int, order: int) -> list[float]:
        curve = Curve(process, process.t_max, process.t_min, steps)
        lam = self.optimum(process, -curve.ends[0], -curve.ends[1], steps, self.order or min(order, 3))
        return curve.times(-lam[1:-1])

    def optimum(self, process: ForwardProcess, low: float, high: float, steps: int, order: int) -> np.ndarray:
        """lambda_0 .. lambda_n; with one step the two ends themselves."""
        if steps == 1:
            return np.array([low, high])
        gap = min(self.gap, 0.25 / steps) * (high - low)
        found = [
            descended(lambda lam: bound(lam, order, self.p, self.trunc), begin, gap)
            for begin in warm(process, low, high, steps, gap)
        ]
        return min(found, key=lambda lam: bound(lam, order, self.p, self.trunc))


def errors(lam: np.ndarray, p: float) -> np.ndarray:
    """sigma^p / alpha at half log-SNRs, alpha^2 + sigma^2 = 1."""
    return (1.0 + np.exp(2.0 * lam)) ** (-0.5 * p) * np.sqrt(1.0 + np.exp(-2.0 * lam))


def weights(lam: np.ndarray, order: int) -> np.ndarray:
    """J, (n, n): row s has the weights of step s, on the levels 0 .. n - 1. They add up to e^{lambda_{s+1}} - e^{lambda_s}."""
    n, h, J = len(lam) - 1, np.diff(lam), np.zeros((len(lam) - 1, len(lam) - 1))
    M0 = np.expm1(h)
    M1 = h * np.exp(h) - M0
    M2 = h * h * np.exp(h) - 2.0 * M1
    s = np.arange(n)
    k = np.minimum(order, np.minimum(s + 1, n - s))
    J[s, s] = M0
    i = s[k == 2]
    a = h[i - 1]
    J[i, i] += M1[i] / a
    J[i, i - 1] = -M1[i] / a
    i = s[k == 3]
    a, b = h[i - 1], h[i - 1] + h[i - 2]
    J[i, i] += (M2[i] + (a + b) * M1[i]) / (a * b)
    J[i, i - 1] = -(M2[i] + b * M1[i]) / (a * (b - a))
    J[i, i - 2] = (M2[i] + a * M1[i]) / (b * (b - a))
    return J * np.exp(lam[:-1])[:, None]


def bound(lam: np.ndarray, order: int, p: float, trunc: int = 0) -> float:
    """What is minimized."""
    off = weights(lam, order) * errors(lam[:-1], p)
    alone = np.arange(len(off)) < trunc
    alone |= (off != 0.0).sum(1) == 1
    return float(np.sqrt((off[alone] ** 2).sum(1)).sum() + np.abs(off[~alone].sum(0)).sum())


def warm(process: ForwardProcess, low: float, high: float, steps: int, gap: float) -> list[np.ndarray]:
    """Where to begin: uniform in lambda, and uniform in training time; neighbours at least ``gap`` apart."""
    u = process.u_of_t(process.t_of_rho(np.exp([-low, -high])))
    trained = process.lams(process.t_of_u(np.linspace(u[0], u[1], steps + 1)))
    rooms = np.maximum(np.diff(trained), 1.01 * gap) - 1.01 * gap
    room = high - low - 1.01 * gap * steps
    return [
        np.linspace(low, high, steps + 1),
        low + np.append(0.0, np.cumsum(1.01 * gap + rooms * (room / rooms.sum()))),
    ]


def descended(objective: Callable[[np.ndarray], float], lam: np.ndarray, gap: float) -> np.ndarray:
    """A local minimum over all but the ends, neighbours at least ``gap`` apart; never worse than where it begins."""
    n = len(lam) - 1
    A = np.eye(n, n - 1) - np.eye(n, n - 1, -1)
    ends = np.zeros(n)
    ends[0], ends[-1] = lam[0], -lam[-1]

    def whole(y: np.ndarray) -> np.ndarray:
        return np.concatenate([lam[:1], y, lam[-1:]])

    apart = {"type": "ineq", "fun": lambda y: A @ y - ends - gap, "jac": lambda y: A}
    inside = [(lam[0], lam[-1])] * (n - 1)
    with np.errstate(all="ignore"):  # on its way two levels may meet
        made = minimize(lambda y: objective(whole(y)), lam[1:-1], method="SLSQP", bounds=inside, constraints=[apart])
    end = whole(made.x)
    return end if (np.diff(end) > 0.99 * gap).all() and objective(end) < objective(lam) else lam
