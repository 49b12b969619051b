"""How empirical model statistics are measured: by finite differences of the network at noisy samples of the data."""

# ruff: noqa: E741 - l is the paper's letter

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from .calibration.statistics import Part
from .ems import ModelStatistics
from .noise import gaussian
from .process import ForwardProcess
from .solver import Problem

REDUCTIONS = ("channel", "scalar", "full")

RIDGE = 1e-4
"""Added to the variance of f where s is a slope about it, as a share of the variance of D, or of the noise if that is less."""

CALLS = 5
"""Network calls of one batch at one lambda."""


class Progress(NamedTuple):
    """Visits of a batch done, of how many, the statistics once all are done, and what computes those of the levels done so far,
    from the third one on."""

    done: int
    total: int
    statistics: ModelStatistics | None
    so_far: Callable[[], ModelStatistics] | None = None


def estimate(
    parts: Sequence[Part],
    process: ForwardProcess,
    lam: Sequence[float],
    reduce: str = "channel",
    drift: str = "",
    seed: int = 0,
    delta: float = 0.05,
    smooth: float = 0.06,
) -> Iterator[Progress]:
    """Measures the statistics of a network, guidance included, at noisy versions of clean samples.

    Five network calls for each batch and lambda: derivatives are central differences, so the network needs no gradients.

    lam: the values of lambda, increasing, at least three; 20 to 250 over the range that will be sampled.
    reduce: what l and s are: "scalar", "channel" (dimension 1 of the samples) or "full". A mean over more elements needs fewer
        samples: tens per channel, a thousand in full.
    drift: the same for b, where l and s are scalars; otherwise b is as they are.
    delta: step of the differences, in lambda and in units of the size of x. Smaller ones drown in half precision and in the
        rounding of times to one of 1000, as Stable Diffusion does it.
    smooth: l' and b are averaged over so much of lambda on each side.
    """
    drift = drift or reduce
    for name, value in (("reduce", reduce), ("drift", drift)):
        if value not in REDUCTIONS:
            raise ValueError(f"{name} = {value!r} is not one of {', '.join(REDUCTIONS)}.")
    if reduce not in ("scalar", drift):
        raise ValueError(f"drift = {drift!r} must be {reduce!r} too; only with scalar l and s can b be finer.")
    if len(lam) < 3 or any(b <= a for a, b in pairwise(lam)):
        raise ValueError("Model statistics are measured at three or more increasing values of lambda.")
    few, fine = _means(reduce), _means(drift)
    samples, found, done = sum(len(part.x0) for part in parts), [], 0
    mean = torch.stack([fine(part.x0.double()) * (len(part.x0) / samples) for part in parts]).sum(0)

    def fitted() -> ModelStatistics:
        """Of the levels that were measured."""
        J, first, second = (torch.stack(rows) for rows in zip(*found, strict=True))
        squares = first[:, :, None] * first[:, None]
        if reduce != drift:
            squares = squares.flatten(3).mean(3)
        covariance, known = (second - squares).numpy(), np.array(lam[: len(found)])
        l, s, b = _fit(known, 1.0 - J.numpy(), first.numpy(), covariance, round(smooth / (lam[1] - lam[0])))
        return ModelStatistics(*map(torch.from_numpy, (known, l, s, b)), mean=mean)

    for at in lam:
        sums: list[Any] = [0.0, 0.0, 0.0]
        for i, part in enumerate(parts):
            J, *z = part.batch(_probe(part, process, at, seed + 2 * i, delta))
            # The mean of a product less the product of the means of b's elements: s is a slope about those.
            products = torch.stack([torch.stack([few(p * q) for p in z]) for q in z])
            means = (few(J), torch.stack([fine(p) for p in z]), products)
            sums = [total + len(J) / samples * m for total, m in zip(sums, means, strict=True)]
            done += 1
            yield Progress(done, len(lam) * len(parts), None, fitted if len(found) > 2 else None)
        found.append(sums)
    yield Progress(done, done, fitted())


def _means(reduce: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """From samples to the mean over them, and over elements, that is of the shape of an element."""

    def mean(value: torch.Tensor) -> torch.Tensor:
        if reduce == "scalar":
            return value.mean()
        keep = (1,) if reduce == "channel" else tuple(range(1, value.ndim))
        return value.mean([d for d in range(value.ndim) if d not in keep], keepdim=True)[0]

    return mean


def _probe(part: Part, process: ForwardProcess, lam: float, seed: int, delta: float):
    """Visits a batch for alpha v (dD / dx) v, and y = x / alpha, D, dD / dlambda along the ODE, at noisy samples x."""
    t = process.t_of_lam(lam)
    alpha, sigma = process.alpha(t), process.sigma(t)
    size = delta * math.hypot(alpha, sigma)

    def visit(problem: Problem, start: torch.Tensor) -> list[torch.Tensor]:
        denoise = problem.denoise
        x = part.noised(process, start, t, seed)
        v = gaussian(part.x0, seed + 1)(1.0, 0.0).sign().to(start)
        D = denoise(x, t)

        def along(h: float) -> torch.Tensor:
            """D after h more of lambda."""
            u = process.t_of_lam(lam + h)
            q = process.sigma(u) / sigma
            return denoise(q * x + (process.alpha(u) - q * alpha) * D, u)

        J = alpha * v * (denoise(x + size * v, t) - denoise(x - size * v, t)) / (2.0 * size)
        return [p.cpu().double() for p in (J, x / alpha, D, (along(delta) - along(-delta)) / (2.0 * delta))]

    return visit


def _fit(lam: np.ndarray, l: np.ndarray, first: np.ndarray, covariance: np.ndarray, smooth: int):
    """l, s, b from the means of z = (y, D, D'), (n, 3, *element), and its covariance, (n, 3, 3, *element).

    With dy/dlambda = D - y, f = (1 - l) y - D has the derivative f' = (1 - l) (D - y) - l' y - D'.
    """
    l = np.clip(l, -2.0, 2.0)
    slope, one = _average(np.gradient(l, lam, axis=0), smooth), np.ones_like(l)
    f = np.stack([1.0 - l, -one, 0.0 * one], axis=1)
    df = np.stack([l - 1.0 - slope, 1.0 - l, -one], axis=1)

    def product(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return np.einsum("ni...,nij...,nj...->n...", p, covariance, q)

    def with_b(v: np.ndarray) -> np.ndarray:
        return v.reshape(*v.shape, *[1] * (first.ndim - v.ndim))

    # Where f hardly varies, rounding would choose s: its variance is compared to those of D and of the noise in y.
    noise = np.exp(-2.0 * lam).reshape(-1, *[1] * (l.ndim - 1))
    tiny = 1e-12 + RIDGE * np.minimum(covariance[:, 1, 1], noise)
    s = np.clip(product(f, df) / (product(f, f) + tiny), -3.0, 3.0)
    mean_f, mean_df = ((with_b(p) * first).sum(1) for p in (f, df))
    return l, s, _average(mean_df - s.reshape(*s.shape, *[1] * (mean_f.ndim - s.ndim)) * mean_f, smooth)


def _average(values: np.ndarray, reach: int) -> np.ndarray:
    """Moving average over the first axis, over ``reach`` neighbours on each side where there are as many."""
    return np.stack([values[max(0, i - reach) : i + reach + 1].mean(0) for i in range(len(values))])
