"""Exactly solvable problems: Gaussian and Gaussian-mixture data, whose ideal denoiser has a closed form.

Data p_0 = sum_k w_k N(m_k, C_k), C_k = Q_k diag(v_k) Q_k^T, in d dimensions (all non-batch dimensions of x, flattened):

    r_k(x)   = softmax_k [ log w_k - 1/2 sum_i ( y_ki^2 / c_ki + log c_ki ) ],   y_k = Q_k^T (x - alpha m_k)
    D(x, t)  = sum_k r_k [ m_k + Q_k diag(alpha v_k / c_k) y_k ],                c_k = alpha^2 v_k + sigma^2

valid for any forward process. Solvers are measured on it to machine precision, without a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .process import ForwardProcess


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Mixture of K Gaussians: w (K,), m (K, d), v (K, d) variances along the columns of Q (K, d, d)."""

    w: torch.Tensor
    m: torch.Tensor
    v: torch.Tensor
    Q: torch.Tensor

    @classmethod
    def random(cls, d: int = 4, K: int = 3, seed: int = 0) -> GaussianMixture:
        """The standard test case: means 1.2 N(0, I), variances in [0.15, 0.6], random axes; float64."""
        g = torch.Generator().manual_seed(seed)
        w = torch.rand(K, generator=g, dtype=torch.float64) + 0.5
        m = 1.2 * torch.randn(K, d, generator=g, dtype=torch.float64)
        v = 0.15 + 0.45 * torch.rand(K, d, generator=g, dtype=torch.float64)
        Q = torch.linalg.qr(torch.randn(K, d, d, generator=g, dtype=torch.float64)).Q
        return cls(w / w.sum(), m, v, Q)

    @classmethod
    def gaussian(cls, mean: float, variance: float, d: int = 4) -> GaussianMixture:
        """A single isotropic Gaussian; variance 0 is a point mass."""
        one = torch.ones(1, d, dtype=torch.float64)
        return cls(
            torch.ones(1, dtype=torch.float64), mean * one, variance * one, torch.eye(d, dtype=torch.float64)[None]
        )

    def denoiser(self, process: ForwardProcess):
        """The ideal ``(x, t) -> x_0`` under ``process``."""

        def denoise(x: torch.Tensor, t: float | Sequence[float]) -> torch.Tensor:
            if isinstance(t, Sequence):
                return torch.cat([denoise(row[None], float(at)) for row, at in zip(x, t, strict=True)])
            alpha, sigma = process.alpha(t), process.sigma(t)
            flat = x.reshape(x.shape[0], -1)
            y = torch.einsum("kij,bki->bkj", self.Q, flat[:, None] - alpha * self.m)
            c = alpha**2 * self.v + sigma**2
            log_r = self.w.log() - 0.5 * (y.square() / c + c.log()).sum(-1)
            inner = self.m + torch.einsum("kij,bkj->bki", self.Q, alpha * self.v / c * y)
            return torch.einsum("bk,bki->bi", log_r.softmax(-1), inner).reshape(x.shape)

        return denoise

    def solve_ode(self, process: ForwardProcess, x: torch.Tensor, s: float, t: float) -> torch.Tensor:
        """x_t of the probability-flow ODE from x_s, t > 0, to about 1e-12.

        ``dx / d log sigma = x - D`` holds for variance exploding and rectified flow alike.
        """
        from scipy.integrate import solve_ivp

        denoise = self.denoiser(process)

        def slope(u: float, flat: np.ndarray) -> np.ndarray:
            now = torch.from_numpy(flat).reshape(x.shape)
            return (now - denoise(now, float(np.exp(u)))).reshape(-1).numpy()

        span = (float(np.log(s)), float(np.log(t)))
        run = solve_ivp(slope, span, x.reshape(-1).numpy(), method="DOP853", rtol=1e-12, atol=1e-13)
        return torch.from_numpy(run.y[:, -1]).reshape(x.shape)
