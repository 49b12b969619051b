"""Kernels: which prediction a solver integrates, against which weight, in which variable.

Every linear solver takes x from time s to t by

    x_t = A x_s + B int K(u) m(u) du + sigma_t sqrt(1 - kappa^2) z,      u = (place - place_s) / (place_t - place_s),

where m is what the network predicted, seen as clean sample or as noise, and K, A, B are known. m(u) is replaced by a
polynomial through values at places u_j, so all a method needs of its kernel is the moments M_k = int K u^k du.

| kernel | m | place | A | B | M_k |
|---|---|---|---|---|---|
| ``Data`` | D | lambda | kappa sigma_t / sigma_s | alpha_t | H k! phi_{k+1}(-H), H = h - log kappa |
| ``Noise("lambda")`` | eps | lambda | alpha_t / alpha_s | alpha_t | -rho_t h k! phi_{k+1}(h) |
| ``Noise("rho")`` | eps | rho | alpha_t / alpha_s | alpha_t | (rho_t - rho_s) / (k + 1) |
| ``Noise("t")``, ``Noise("vp")`` | eps | time | alpha_t / alpha_s | alpha_t | int u(rho)^k drho, by quadrature |

with eps = (x - alpha D) / sigma, rho = sigma / alpha, h = lambda_t - lambda_s. kappa < 1 keeps only that share of the old
noise (stochastic solvers) and belongs to ``Data``.

``framed(process, "vef")`` sees any model as variance exploding: since dx/dsigma = (x - D) / sigma holds for rectified flow
too, deterministic methods stay valid there and keep their order; only the variable in which history is interpolated
changes, and sigma = 1 is no longer a singular point.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch

from .process import ForwardProcess, VarianceExploding
from .weights import data_moments, phi


def framed(process: ForwardProcess, frame: str) -> ForwardProcess:
    """``process`` itself ("snr"), or seen as variance exploding with the same sigmas ("vef"; for ODE solvers only)."""
    if frame == "snr":
        return process
    return _exploding(process)


@lru_cache(maxsize=8)
def _exploding(process: ForwardProcess) -> ForwardProcess:
    return VarianceExploding(process.t_min, process.t_max, process.noise_scale, process.training_sigmas)


class Kernel(ABC):
    """What is integrated, and how. ``key`` names the quantity m, under which histories keep its values."""

    key: ClassVar[str]

    @abstractmethod
    def place(self, process: ForwardProcess, t: float) -> float:
        """The variable of the polynomial at time t; infinite at pure noise (alpha = 0)."""

    @abstractmethod
    def time(self, process: ForwardProcess, place: float) -> float:
        """Inverse of ``place``."""

    @abstractmethod
    def read(self, process: ForwardProcess, x: torch.Tensor, x0: torch.Tensor, t: float) -> torch.Tensor:
        """m at time t, where the network saw x and predicted x0."""

    @abstractmethod
    def line(self, process: ForwardProcess, s: float, t: float, kappa: float) -> tuple[Any, Any]:
        """A and B."""

    @abstractmethod
    def moments(self, process: ForwardProcess, s: float, t: float, k: int, kappa: float) -> list[Any]:
        """M_0 .. M_{k-1}."""

    def anchor(
        self, process: ForwardProcess, s: float, t: float, times: Sequence[float], w: list[Any]
    ) -> tuple[list[Any], Any]:
        """Where m depends on the start s of the step: weights of the values kept from ``times``, and what is added to
        their sum, so that it is sum_j w_j m_j plus the integral of what is known beforehand. Here: w and nothing."""
        return w, 0.0


@dataclass(frozen=True)
class Data(Kernel):
    """Data prediction in lambda: DPM-Solver++, UniPC, SA-Solver, SEEDS."""

    key: ClassVar[str] = "x0"

    def place(self, process, t):
        return process.lam(t)

    def time(self, process, place):
        return process.t_of_lam(place)

    def read(self, process, x, x0, t):
        return x0

    def line(self, process, s, t, kappa):
        return process.sigma(t) / process.sigma(s) * kappa, process.alpha(t)

    def moments(self, process, s, t, k, kappa):
        h = process.lam(t) - process.lam(s)
        return data_moments(k, h - math.log(kappa))


@dataclass(frozen=True)
class Noise(Kernel):
    """Noise prediction: DPM-Solver ("lambda"), DEIS and Adams-Bashforth methods ("rho", "t", "vp").

    variable: what the polynomial is in. "t" is the model's training time (``process.u_of_t``), "vp" the time of the
    variance-preserving process with linear beta from 0.1 to 20.
    """

    key: ClassVar[str] = "eps"
    variable: str = "rho"

    def place(self, process, t):
        if self.variable == "lambda":
            return process.lam(t)
        if self.variable == "t":
            return training_time(process, t)
        rho = process.sigma(t) / process.alpha(t) if process.alpha(t) > 0.0 else math.inf
        return rho if self.variable == "rho" else vp_time(rho)

    def time(self, process, place):
        if self.variable == "lambda":
            return process.t_of_lam(place)
        if self.variable == "t":
            return float(process.t_of_u(place))
        return float(process.t_of_rho(place if self.variable == "rho" else vp_rho(place)))

    def read(self, process, x, x0, t):
        return torch.sub(x, x0, alpha=process.alpha(t)).div_(process.sigma(t))

    def line(self, process, s, t, kappa):
        if kappa != 1.0:
            raise ValueError("noise-prediction kernels are for deterministic steps; kappa must be 1.")
        return process.alpha(t) / process.alpha(s), process.alpha(t)

    def moments(self, process, s, t, k, kappa):
        rho_s, rho_t = process.sigma(s) / process.alpha(s), process.sigma(t) / process.alpha(t)
        if self.variable == "rho":
            return [(rho_t - rho_s) / (m + 1) for m in range(k)]
        if self.variable == "lambda":
            h = process.lam(t) - process.lam(s)
            return [-rho_t * h * math.factorial(m) * phi(m + 1, h) for m in range(k)]
        log_s, log_t = math.log(rho_s), math.log(rho_t)
        start, end = self.place(process, s), self.place(process, t)
        moments = [0.0] * k
        for node, weight in quadrature():
            rho = math.exp(log_s + node * (log_t - log_s))
            u = (self.place(process, float(process.t_of_rho(rho))) - start) / (end - start)
            for m in range(k):
                moments[m] += weight * (log_t - log_s) * rho * u**m
        return moments


RHO = Noise("rho")
"""The DDIM map's: Adams-Bashforth methods and their like."""


def below_noise(process: ForwardProcess, s: float, t: float) -> float:
    """Where a step to t starts: at s, or just below it if s is a flow model's pure noise, where lambda is infinite."""
    return s if process.alpha(s) > 0.0 else max(float(process.t_of_u(1.0 - 1e-4)), (s + t) / 2.0)


def begin(process: ForwardProcess, x: torch.Tensor, s: float, t: float, x0: torch.Tensor) -> tuple[torch.Tensor, float]:
    """x and s where a step to t starts (``below_noise``), x0 being the prediction at s.

    Pure noise is left by a first-order step too short to matter, with the prediction that is there already; constant
    predictions stay solved exactly, and no variance is lost.
    """
    below = below_noise(process, s, t)
    if below == s:
        return x, s
    A, B = Data().line(process, s, below, 1.0)
    return axpy(x * A, x0, B - A * process.alpha(s)), below


def training_time(process: ForwardProcess, t: float) -> float:
    """``process.u_of_t``, and beyond the trained range, where that stands still, on along its end in log t."""
    edge = min(max(t, process.t_min), process.t_max)
    u = float(process.u_of_t(edge))
    if t == edge:
        return u
    near = edge * 1.05 if t < edge else edge / 1.05
    return u + (float(process.u_of_t(near)) - u) / math.log(near / edge) * math.log(t / edge)


@lru_cache(maxsize=1)
def quadrature() -> tuple[tuple[float, float], ...]:
    """32 Gauss-Legendre nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(32)
    return tuple(zip(((nodes + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))


_BETA_0, _BETA_1 = 0.1, 20.0


def vp_time(rho: float) -> float:
    """Time of the linear variance-preserving process at noise-to-signal ratio rho: log(1 + rho^2) = int beta."""
    growth = 2.0 * (_BETA_1 - _BETA_0) * math.log1p(rho * rho) if math.isfinite(rho) else math.inf
    return (math.sqrt(_BETA_0**2 + growth) - _BETA_0) / (_BETA_1 - _BETA_0)


def vp_rho(time: float) -> float:
    """Inverse of ``vp_time``."""
    return math.sqrt(math.expm1(_BETA_0 * time + 0.5 * (_BETA_1 - _BETA_0) * time * time))


def fit(c: Any, x: torch.Tensor) -> Any:
    """c, a number or a float64 tensor on the CPU that broadcasts against x, as it can be combined with x."""
    return c.to(x, non_blocking=True) if isinstance(c, torch.Tensor) else c


def axpy(x: torch.Tensor, m: torch.Tensor, c: Any) -> torch.Tensor:
    """``x + c m`` into x, a tensor of ours; c is a number or a tensor that broadcasts against x."""
    return x.add_(m, alpha=c) if isinstance(c, float) else x.add_(m * fit(c, x))
