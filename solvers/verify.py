"""How solvers are measured: order of convergence and exact moments on problems with known answers.

Used by the tests, by ``benchmarks/orders.py``, and by whoever adds a solver. Everything is float64 and takes seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

from .exact import GaussianMixture
from .process import ForwardProcess, RectifiedFlow, VarianceExploding
from .solver import Problem, Solver, sample

VE = VarianceExploding(t_min=0.03, t_max=14.6)
FLOW = RectifiedFlow()


def measuring_range(process: ForwardProcess) -> tuple[float, float]:
    """First and last time of the measurements: well inside the range, where the mixture is neither trivial nor stiff."""
    return (0.95, 0.05) if process.alpha(0.5) < 1.0 else (10.0, 0.1)


def start(process: ForwardProcess, t: float, n: int = 4, seed: int = 0) -> torch.Tensor:
    """n noisy samples at time t, shape (n, 1, 2, 2)."""
    g = torch.Generator().manual_seed(seed)
    x0 = 0.7 * torch.randn(n, 1, 2, 2, generator=g, dtype=torch.float64)
    return process.alpha(t) * x0 + t * torch.randn(n, 1, 2, 2, generator=g, dtype=torch.float64)


def _times(process: ForwardProcess, t_max: float, t_min: float, lams: Sequence[float]) -> list[float]:
    return [t_max, *(process.t_of_lam(lam) for lam in lams[1:-1]), t_min]


def uniform_lambda(process: ForwardProcess, t_max: float, t_min: float, n: int) -> list[float]:
    """n steps, uniform in lambda."""
    return _times(process, t_max, t_min, np.linspace(process.lam(t_max), process.lam(t_min), n + 1).tolist())


def graded(process: ForwardProcess, t_max: float, t_min: float, n: int, levels: int = 12) -> list[float]:
    """``uniform_lambda`` with the first interval halved ``levels`` times towards the start.

    A multistep method starts with a first-order step; on this grid that step is so short that it costs nothing, and the
    order of the method itself shows.
    """
    l0, l1 = process.lam(t_max), process.lam(t_min)
    h = (l1 - l0) / n
    return _times(
        process,
        t_max,
        t_min,
        [l0, *(l0 + h * 2.0**-j for j in range(levels, 0, -1)), *(l0 + h * i for i in range(1, n + 1))],
    )


@lru_cache(maxsize=8)
def _solved(process: ForwardProcess, t_max: float, t_min: float) -> tuple[GaussianMixture, torch.Tensor, torch.Tensor]:
    data, x = GaussianMixture.random(), start(process, t_max)
    return data, x, data.solve_ode(process, x, t_max, t_min)


Grid = Callable[[ForwardProcess, float, float, int], list[float]]


def ode_errors(solver: Solver, process: ForwardProcess, grid: Grid, steps: Sequence[int]) -> list[float]:
    """Largest error on the Gaussian mixture after each number of steps."""
    t_max, t_min = measuring_range(process)
    data, x, exact = _solved(process, t_max, t_min)
    problem = Problem(data.denoiser(process), process)
    return [(sample(problem, solver, x, grid(process, t_max, t_min, n)) - exact).abs().max().item() for n in steps]


def measured_order(
    solver: Solver, process: ForwardProcess, grid: Grid = graded, steps: Sequence[int] = (20, 40, 80, 160)
) -> float:
    """log2 of the error ratio at the finest pair of step counts above round-off (1e-9)."""
    errors = ode_errors(solver, process, grid, steps)
    coarse, fine = [(a, b) for a, b in pairwise(errors) if b > 1e-9][-1]
    return math.log2(coarse / fine)


def moments_of_run(solver: Solver, process: ForwardProcess, times: Sequence[float], variance: float, mean: float = 0.5):
    """Exact mean and variance of a stochastic run on scalar Gaussian data N(mean, variance), without Monte Carlo.

    The ideal denoiser of a Gaussian is affine, so the result is ``a + g_T x_T + sum_k g_k z_k``. All coefficients are read off
    one run of a batch: its first row has x_T = 0 and no noise, the second x_T = 1, each further one a single z_k = 1.
    """
    denoise = GaussianMixture.gaussian(mean, variance, d=1).denoiser(process)

    def run(rows: int) -> tuple[torch.Tensor, int]:
        drawn = iter(range(100_000))

        def noise(s: float, t: float) -> torch.Tensor:
            z = torch.zeros(rows, 1, dtype=torch.float64)
            z[2 + next(drawn) :][:1] = 1.0
            return z

        x = torch.zeros(rows, 1, dtype=torch.float64)
        x[1] = 1.0
        return sample(Problem(denoise, process, noise), solver, x, times), next(drawn)

    draws = run(2)[1]
    outcome = run(2 + draws)[0].flatten()
    offset, gain, spread = (
        outcome[0].item(),
        (outcome[1] - outcome[0]).item(),
        (outcome[2:] - outcome[0]).square().sum().item(),
    )
    marginal = process.alpha(times[0]) ** 2 * variance + times[0] ** 2
    return offset + gain * process.alpha(times[0]) * mean, gain**2 * marginal + spread


def measured_weak_order(solver: Solver, process: ForwardProcess, variance: float = 0.4) -> float:
    """Order at which the variance of the result converges on Gaussian data."""
    t_max, t_min = measuring_range(process)
    exact = process.alpha(t_min) ** 2 * variance + t_min**2
    coarse, fine = (
        abs(moments_of_run(solver, process, graded(process, t_max, t_min, n), variance)[1] - exact) for n in (40, 80)
    )
    return math.log2(coarse / fine)
