"""Data as one Gaussian: its statistics, the probability-flow ODE they solve exactly, and samples of it.

In the coordinates c of an orthonormal DCT-II over all dimensions but the channels, with the lowest ``n`` frequencies of each
dimension in a block and the others in the tail,

    mean m,      covariance  diag(v) + U^T diag(Lambda - tau) U  in the block,      tail variance v_C of each channel

where U (r rows) is not empty, v is the same number tau everywhere. For such data the ODE of any forward process is solved by

    x_t = alpha_t m + F(v) (x_s - alpha_s m),      F(v) = sqrt( (alpha_t^2 v + sigma_t^2) / (alpha_s^2 v + sigma_s^2) )

applied to each variance along its own direction. A flow model's start is alpha_s = 0, sigma_s = 1.

On a mixture of 12 Gaussians (16 dimensions, means 0.9 N(0, 1), std 0.15), from sigma 14.6, the state's relative error is

    to sigma          8       4       2       1
    full rank         0.0008  0.0073  0.048   0.21
    one variance      0.0039  0.021   0.085   0.27
    x scaled alone    0.013   0.046   0.13    0.35

Source: Wang and Vastola (2024), arXiv:2412.09726 (low-rank covariance, variance exploding). The DCT, flow models and other sizes
are this pack's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.fft import dctn, idctn

from ..artifact import Artifact
from ..process import ForwardProcess

KIND = "gaussian"
"""Of the artifact whose tensors these are."""

_TENSORS = ("mean", "var", "U", "eig", "tail", "size")


@dataclass(frozen=True, eq=False)
class GaussianStatistics:
    """mean, var: (C, *block). U: (r, C * block), orthonormal rows; eig: (r,). tail: (C,). size: of the samples, without C."""

    mean: np.ndarray
    var: np.ndarray
    U: np.ndarray
    eig: np.ndarray
    tail: np.ndarray
    size: tuple[int, ...]
    found: Artifact | None = field(default=None, repr=False)

    @classmethod
    def measured(cls, x: torch.Tensor, frequencies: int = 16, rank: int = 0) -> GaussianStatistics:
        """Of samples (N, C, *size). frequencies: of the block in each dimension. rank: of the covariance in the block; 0: the
        variance of each coefficient alone, which fewer samples tell; no more than half of the samples are directions."""
        c = _dct(x)
        block = _lowest(tuple(min(frequencies, n) for n in c.shape[2:]))
        low = c[block]
        mean = low.mean(0)
        y = (low - mean).reshape(len(c), -1) / math.sqrt(max(len(c) - 1, 1))
        rank = min(rank, len(c) // 2, y.shape[1])
        total, eig, U = float((y**2).sum()), np.empty(0), np.empty((0, y.shape[1]))
        if rank:
            _, size, V = np.linalg.svd(y, full_matrices=False)
            eig, U = size[:rank] ** 2, V[:rank]
            left = y.shape[1] - rank
            var = np.full_like(mean, max(total - float(eig.sum()), 0.0) / left if left else 0.0)
        else:
            var = (y**2).sum(0).reshape(mean.shape)
        c[block] = 0.0
        outside = max(c[0, 0].size - low[0, 0].size, 1)
        tail = (c**2).sum(tuple(range(2, c.ndim))).mean(0) / outside
        return cls(mean, var, U, eig, tail, tuple(x.shape[2:]))

    def at(self, size: tuple[int, ...]) -> GaussianStatistics:
        """Of the same pictures at another size: low frequencies are those of the whole picture, the tail that of its pixels."""
        if size == self.size:
            return self
        if len(size) != len(self.size) or any(n < b for n, b in zip(size, self.mean.shape[1:], strict=True)):
            raise ValueError(
                f"The statistics are of {self.mean.shape[1:]} frequencies, too many for a latent of {size}; measure fewer, or for "
                "this size."
            )
        grown = math.prod(size) / math.prod(self.size)
        return GaussianStatistics(
            self.mean * math.sqrt(grown), self.var * grown, self.U, self.eig * grown, self.tail, size, self.found
        )

    def jump(self, process: ForwardProcess, x: torch.Tensor, s: float, t: float) -> torch.Tensor:
        """x_t of the ODE from x_s, exact for Gaussian data."""
        a, b = process.alpha(s), process.alpha(t)
        n, m = (process.noise_scale * process.sigma(at) for at in (s, t))

        def factor(v: np.ndarray) -> np.ndarray:
            return np.sqrt((b * b * v + m * m) / (a * a * v + n * n))

        return self._made(x, factor, a, b)

    def draw(self, z: torch.Tensor) -> torch.Tensor:
        """Samples of the Gaussian from standard normal z."""
        return self._made(z, np.sqrt, 0.0, 1.0)

    def _made(self, x: torch.Tensor, factor: Callable, a: float, b: float) -> torch.Tensor:
        """b mean + factor(covariance) (x - a mean)."""
        if x.shape[1] != len(self.mean):
            raise ValueError(f"The statistics are of {len(self.mean)} channels, and this latent has {x.shape[1]}.")
        mine = self.at(tuple(x.shape[2:]))
        c = _dct(x)
        block = _lowest(mine.mean.shape[1:])
        y = c[block] - a * mine.mean
        made = factor(mine.var) * y
        if len(mine.eig):
            along = (factor(mine.eig) - factor(mine.var.flat[0])) * (y.reshape(len(y), -1) @ mine.U.T)
            made = made + (along @ mine.U).reshape(y.shape)
        c *= factor(mine.tail).reshape(-1, *[1] * (c.ndim - 2))
        c[block] = b * mine.mean + made
        return torch.from_numpy(idctn(c, axes=range(2, c.ndim), norm="ortho")).to(x)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file of the kind ``KIND`` holds."""
        return {name: torch.tensor(np.asarray(getattr(self, name))) for name in _TENSORS}

    @classmethod
    def of(cls, found: Artifact) -> GaussianStatistics:
        """What such a file holds."""
        missing = [name for name in _TENSORS if name not in found.tensors]
        if missing:
            raise ValueError(f"This is no file of Gaussian statistics: it has no {', '.join(missing)}.")
        *values, size = (found.tensors[name].numpy() for name in _TENSORS)
        return cls(*(v.astype(np.float64) for v in values), tuple(size.tolist()), found)


def _dct(x: torch.Tensor) -> np.ndarray:
    return dctn(x.detach().cpu().double().numpy(), axes=range(2, x.ndim), norm="ortho")


def _lowest(counts: tuple[int, ...]) -> tuple:
    return (slice(None), slice(None), *(slice(0, n) for n in counts))
