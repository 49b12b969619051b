"""How empirical model statistics are measured: by finite differences of the network at noisy samples of the data."""

# ruff: noqa: E741 - l is the paper's letter

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from .ems import ModelStatistics
from .noise import gaussian
from .process import ForwardProcess
from .solver import Denoise

REDUCTIONS = ("channel", "scalar", "full")


class Progress(NamedTuple):
    """Values of lambda done, of how many, and the statistics once all are done."""

    done: int
    total: int
    statistics: ModelStatistics | None


def estimate(
    denoise: Denoise,
    process: ForwardProcess,
    x0: torch.Tensor,
    lam: Sequence[float],
    reduce: str = "channel",
    batch: int = 8,
    seed: int = 0,
    delta: float = 0.05,
    smooth: int = 1,
) -> Iterator[Progress]:
    """Measures the statistics of a network, guidance included, on clean latents x0 of shape (K, *element).

    Five network calls for each batch and lambda: derivatives are central differences, so the network needs no gradients.

    lam: the values of lambda, increasing, at least three; 60 to 250 over the range that will be sampled.
    reduce: "scalar", "channel" (dimension 1 of x0) or "full". A mean over more elements needs fewer samples: tens of latents
        per channel, a thousand in full.
    delta: step of the differences, in lambda and in units of the size of x. Smaller ones drown in half precision and in the
        rounding of times to one of 1000, as Stable Diffusion does it.
    smooth: l' and b are averaged over so many neighbours on each side.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce = {reduce!r} is not one of {', '.join(REDUCTIONS)}.")
    if len(lam) < 3 or any(b <= a for a, b in pairwise(lam)):
        raise ValueError("Model statistics are measured at three or more increasing values of lambda.")
    keep = {"scalar": (), "channel": (1,), "full": tuple(range(1, x0.ndim))}[reduce]
    dims = [d for d in range(x0.ndim) if d not in keep]

    def mean(value: torch.Tensor) -> torch.Tensor:
        reduced = value.mean(dims, keepdim=bool(keep))
        return reduced[0] if keep else reduced

    # The same noise at every lambda, so that the statistics are smooth in it.
    n = gaussian(x0, seed)(1.0, 0.0) * process.noise_scale
    v = gaussian(x0, seed + 1)(1.0, 0.0).sign()
    found = []
    for done, at in enumerate(lam, 1):
        sums: list[Any] = [0.0, 0.0, 0.0]
        for rows in torch.arange(len(x0)).split(batch):
            J, *z = (p.cpu().double() for p in _probe(denoise, process, at, x0[rows], n[rows], v[rows], delta))
            products = torch.stack([torch.stack([mean(p * q) for p in z]) for q in z])
            means = (mean(J), torch.stack([mean(p) for p in z]), products)
            sums = [total + len(rows) / len(x0) * m for total, m in zip(sums, means, strict=True)]
        found.append(sums)
        yield Progress(done, len(lam), None)
    J, first, second = (torch.stack(parts).numpy() for parts in zip(*found, strict=True))
    l, s, b = (torch.from_numpy(p) for p in _fit(np.array(lam), 1.0 - J, first, second, smooth))
    statistics = ModelStatistics(torch.tensor(lam, dtype=torch.float64), l, s, b, mean(x0.cpu().double()))
    yield Progress(len(lam), len(lam), statistics)


def _probe(denoise, process, lam: float, x0, n, v, delta: float):
    """alpha v (dD / dx) v, and y = x / alpha, D, dD / dlambda along the ODE, at noisy samples x."""
    t = process.t_of_lam(lam)
    alpha, sigma = process.alpha(t), process.sigma(t)
    x = alpha * x0 + sigma * n
    D = denoise(x, t)

    def along(h: float) -> torch.Tensor:
        """D after h more of lambda."""
        u = process.t_of_lam(lam + h)
        q = process.sigma(u) / sigma
        return denoise(q * x + (process.alpha(u) - q * alpha) * D, u)

    size = delta * math.hypot(alpha, sigma)
    J = alpha * v * (denoise(x + size * v, t) - denoise(x - size * v, t)) / (2.0 * size)
    return J, x / alpha, D, (along(delta) - along(-delta)) / (2.0 * delta)


def _fit(lam: np.ndarray, l: np.ndarray, first: np.ndarray, second: np.ndarray, smooth: int):
    """l, s, b from the means of z = (y, D, D'), (n, 3, *element), and of its products, (n, 3, 3, *element).

    With dy/dlambda = D - y, f = (1 - l) y - D has the derivative f' = (1 - l) (D - y) - l' y - D'.
    """
    l = np.clip(l, -2.0, 2.0)
    slope, one = _average(np.gradient(l, lam, axis=0), smooth), np.ones_like(l)
    f = np.stack([1.0 - l, -one, 0.0 * one], axis=1)
    df = np.stack([l - 1.0 - slope, 1.0 - l, -one], axis=1)
    covariance = second - first[:, :, None] * first[:, None]

    def product(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return np.einsum("ni...,nij...,nj...->n...", p, covariance, q)

    s = np.clip(product(f, df) / np.maximum(product(f, f), 1e-12), -3.0, 3.0)
    return l, s, _average((df * first).sum(1) - s * (f * first).sum(1), smooth)


def _average(values: np.ndarray, reach: int) -> np.ndarray:
    """Moving average over the first axis, over ``reach`` neighbours on each side where there are as many."""
    return np.stack([values[max(0, i - reach) : i + reach + 1].mean(0) for i in range(len(values))])
