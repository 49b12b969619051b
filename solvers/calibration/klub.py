"""The bound that Align Your Steps minimizes: its table on a grid, its estimator by importance sampling, its descent.

    KLUB(k_0 > ... > k_n) = sum_i K(k_{i+1}, k_i),      K(a, b) = int_a^b t^-3 E || D(x_t, t) - D(x_b, b) ||^2 dt

bounds the Kullback-Leibler divergence between the reverse process and its Euler steps (up to a factor), with the forward process
x_t = x_0 + t eps, x_b = x_t + sqrt(b^2 - t^2) eps' in x / alpha, whose time is k = sigma / alpha. Mean squares stand for the
norms: all values are per number of the latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from ..process import ForwardProcess
from ..solver import Problem
from .cohort import Cohort, Running
from .grams import gram

CANDIDATES, FINE = 5, 4096


def chains(cohort: Cohort, process: ForwardProcess, k: Sequence[float], draws: int) -> Running:
    """E || D_g - D_h ||^2 for all pairs of rising levels k, (G, G): from ``draws`` noisings of each of the teacher's samples.

    Noise is added level by level, independently, so that every pair has the right joint law: G calls give all pairs.
    """
    squares, count = np.zeros((len(k), len(k))), 0
    for b, (batch, x0) in enumerate(zip(cohort.batches, cohort.targets, strict=True)):
        for draw in range(draws):

            def visit(problem: Problem, x: torch.Tensor, b=b, draw=draw, x0=x0) -> torch.Tensor:
                g = torch.Generator().manual_seed(draw * len(cohort.batches) + b)
                state, before, made = x0.to(x), 0.0, []
                for level in k:
                    fresh = torch.randn(x0.shape, generator=g).to(x)
                    state = state + fresh * (process.noise_scale * math.sqrt(level**2 - before**2))
                    made.append(predicted(problem, state, level).flatten(1).cpu())
                    before = level
                return torch.stack(made, 1)

            for rows in cohort.visit(batch, visit):
                G = gram(rows)
                own = np.diag(G)
                squares += own[:, None] + own[None] - 2.0 * G
                count += 1
            yield
    return np.maximum(squares / count, 0.0)


def predicted(problem: Problem, x: torch.Tensor, k: float) -> torch.Tensor:
    """D at x / alpha and k."""
    t = float(problem.process.t_of_rho(k))
    return problem.denoise(x * problem.process.alpha(t), t)


def table(k: Sequence[float], squares: np.ndarray) -> np.ndarray:
    """K(k_g, k_h) for all pairs g < h of rising levels, (G, G), by the trapezoid rule in log t; 0 else."""
    y = np.log(k)
    inner = squares / np.square(k)[:, None]
    parts = 0.5 * np.diff(y)[:, None] * (inner[1:] + inner[:-1])
    sums = np.vstack([np.zeros(len(k)), np.cumsum(parts, axis=0)])
    return np.triu(np.diag(sums)[None] - sums, 1)


def normalizer(a: float, b: float, c: float) -> float:
    """Z(a, b) = int_a^b t^-3 (1 / (t^2 + c^2) - 1 / (b^2 + c^2)) dt; c^4 Z is K(a, b) for Gaussian data of variance c^2."""
    A, B, v = a * a, b * b, c * c
    straight = (1.0 / v - 1.0 / (B + v)) * (1.0 / A - 1.0 / B)
    return 0.5 * (straight + (math.log1p(v / B) - math.log1p(v / A)) / v**2)


def drawn(a: float, b: float, c: float, u: float) -> float:
    """t between a and b of the density t^-3 (1 / (t^2 + c^2) - 1 / (b^2 + c^2)) / Z, for u uniform between 0 and 1."""
    y = np.linspace(math.log(a), math.log(b), FINE)
    t = np.exp(y)
    density = (1.0 / (t * t + c * c) - 1.0 / (b * b + c * c)) / (t * t)
    below = np.append(0.0, np.cumsum(density[1:] + density[:-1]))
    return float(np.exp(np.interp(u * below[-1], below, y)))


def triples(
    cohort: Cohort, process: ForwardProcess, low: float, middles: np.ndarray, high: float, c: float, draws: int
) -> Running:
    """K(low, m) + K(m, high) for each m of ``middles``, by importance sampling; all see the same noise and uniform numbers.

        (Z_1 + Z_2) mean || D(x_t, t) - D(x_b, b) ||^2 / (1 / (t^2 + c^2) - 1 / (b^2 + c^2))

    t being drawn from one of the two intervals, with their shares of Z_1 + Z_2, and b that one's upper end. The paper's
    pseudo-code leaves out the factor Z_1 + Z_2, which depends on m: on Gaussian data all m would be equal.
    """
    sums, count = np.zeros(len(middles)), 0
    for n, (batch, x0) in enumerate(zip(cohort.batches, cohort.targets, strict=True)):
        for draw in range(draws):
            seed = draw * len(cohort.batches) + n
            uniform = np.random.default_rng(seed).random(2)

            def visit(problem: Problem, x: torch.Tensor, x0=x0, seed=seed, uniform=uniform) -> list[float]:
                g = torch.Generator().manual_seed(seed)
                clean = x0.to(x)
                eps, other = (torch.randn(x0.shape, generator=g).to(x) * process.noise_scale for _ in range(2))
                made = []
                for m in middles:
                    Z = normalizer(low, m, c), normalizer(m, high, c)
                    a, b = (low, m) if uniform[0] * sum(Z) < Z[0] else (m, high)
                    t = drawn(a, b, c, uniform[1])
                    x_t = clean + t * eps
                    off = predicted(problem, x_t, t) - predicted(problem, x_t + math.sqrt(b * b - t * t) * other, b)
                    weight = sum(Z) / (1.0 / (t * t + c * c) - 1.0 / (b * b + c * c))
                    made.append(off.flatten(1).square().mean(1).sum() * weight)
                return torch.stack(made).tolist()

            sums += cohort.visit(batch, visit)
            count += len(x0)
            yield
    return sums / count


def descend(
    y: np.ndarray, cost: Callable[[float, np.ndarray, float], Running], only: range | None = None
) -> Iterator[np.ndarray | None]:
    """Coordinate descent over falling log levels y, whose ends stay: yields them after every sweep, None after visits; endless.

    Each level may move up to half the way to its neighbours, in 5 steps to each side; when a sweep moves nothing, half as far.
    Odd ones first, then even ones. cost: that of a level's two intervals, for all its places. only: the levels that move.
    """
    y, reach = y.copy(), 1.0
    aside = np.array(sorted(range(-CANDIDATES, CANDIDATES + 1), key=abs)) / CANDIDATES  # where equal, it stays
    while True:
        before = y.copy()
        for i in [i for first in (1, 2) for i in range(first, len(y) - 1, 2) if only is None or i in only]:
            places = y[i] + 0.5 * reach * aside * np.where(aside > 0.0, y[i - 1] - y[i], y[i] - y[i + 1])
            costs = yield from cost(math.exp(y[i + 1]), np.exp(places), math.exp(y[i - 1]))
            y[i] = places[int(np.argmin(costs))]
        if (y == before).all():
            reach /= 2.0
        yield y.copy()
