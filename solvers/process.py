"""Forward processes: how data becomes noise.

    x_t = alpha_t x_0 + sigma_t eps,     lambda_t = log(alpha_t / sigma_t)

Time is ComfyUI's "sigma" for both kinds of model, so ``sigma(t) = t``; what differs is alpha.

- ``VarianceExploding``: alpha = 1. ComfyUI's EPS, V_PREDICTION, EDM and X0 models, all of which see ``x_0 + sigma eps``.
- ``RectifiedFlow``: alpha = 1 - t. ComfyUI's CONST models (SD3, Flux, Wan, ...), t in [0, 1].

Everything here is a Python float or a float64 array on the CPU: coefficients never touch the device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class ForwardProcess(ABC):
    """The marginals of the noising process.

    noise_scale: standard deviation of the noise the model was trained with (1 for nearly all models). Injected noise
        is multiplied by it.
    training_sigmas: sigmas at equally spaced training times ``u = i / (T - 1)``, increasing, shape ``(T,)``; what
        "uniform in t" means for this model. None: ``u`` is t itself.
    t_min, t_max: the range of t the model was trained on.
    """

    t_min: float
    t_max: float
    noise_scale: float = 1.0
    training_sigmas: np.ndarray | None = None

    @abstractmethod
    def alpha(self, t: float) -> float:
        """Signal coefficient."""

    def sigma(self, t: float) -> float:
        """Noise coefficient."""
        return t

    def lam(self, t: float) -> float:
        """Half log-SNR, ``log(alpha / sigma)``: ``+inf`` at t = 0, ``-inf`` where alpha = 0."""
        alpha = self.alpha(t)
        if t < 0.0 or math.isnan(t):
            raise ValueError(f"lambda is not defined at sigma {t!r}; a sigma cannot be negative.")
        if t == 0.0:
            return math.inf
        return math.log(alpha / t) if alpha > 0.0 else -math.inf

    def rho(self, t):
        """Noise-to-signal ratio ``sigma / alpha = exp(-lambda)``: this model's sigma seen as variance exploding."""
        return np.exp(-self.lams(t))

    def lams(self, t) -> np.ndarray:
        """``lam`` for an array of times."""
        return np.array([self.lam(float(v)) for v in np.atleast_1d(t)])

    @abstractmethod
    def t_of_rho(self, rho) -> Any:
        """Inverse of ``rho``; accepts arrays and infinity."""

    def t_of_lam(self, lam: float) -> float:
        """Inverse of ``lam``."""
        return float(self.t_of_rho(math.exp(-lam)))

    def t_of_u(self, u) -> np.ndarray:
        """Sigma at training time ``u`` in [0, 1], log-linear between the training sigmas."""
        u = np.asarray(u, dtype=np.float64)
        if self.training_sigmas is None:
            return self.t_min + u * (self.t_max - self.t_min)
        grid = np.linspace(0.0, 1.0, len(self.training_sigmas))
        return np.exp(np.interp(u, grid, np.log(self.training_sigmas)))

    def u_of_t(self, t) -> np.ndarray:
        """Inverse of ``t_of_u``."""
        t = np.asarray(t, dtype=np.float64)
        if self.training_sigmas is None:
            return (t - self.t_min) / (self.t_max - self.t_min)
        grid = np.linspace(0.0, 1.0, len(self.training_sigmas))
        return np.interp(np.log(t), np.log(self.training_sigmas), grid)


@dataclass(frozen=True, eq=False)
class VarianceExploding(ForwardProcess):
    """alpha = 1, sigma = t."""

    t_min: float = 0.03
    t_max: float = 14.6

    def alpha(self, t: float) -> float:
        return 1.0

    def t_of_rho(self, rho) -> Any:
        return rho


@dataclass(frozen=True, eq=False)
class RectifiedFlow(ForwardProcess):
    """alpha = 1 - t, sigma = t."""

    t_min: float = 0.001
    t_max: float = 1.0

    def alpha(self, t: float) -> float:
        return 1.0 - t

    def t_of_rho(self, rho) -> Any:
        rho = np.asarray(rho, dtype=np.float64)
        return np.where(np.isinf(rho), 1.0, rho / (1.0 + np.where(np.isinf(rho), 0.0, rho)))[()]
