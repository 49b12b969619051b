"""The Runge-Kutta engine: single-step methods that evaluate the network at intermediate points of the step.

A method is a tableau: for every stage where it lies (c, as a fraction of the step in the kernel's variable), which
evaluations it uses, and with which weights. Stage i is

    x_i = A x_s + B sum_j w_ij m_j + sigma_i N_i,      A, B and the moments of the kernel taken from s to the stage's time

The weights are either those of the exact integral of the polynomial through the used evaluations (exponential methods:
DPM-Solver, DPM-Solver++, SEEDS), or fixed shares of it (classical tableaus). The last stage is the result, c = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .kernel import Kernel, axpy, begin
from .process import ForwardProcess
from .solver import Problem
from .weights import weights


@dataclass(frozen=True)
class Stage:
    """One stage.

    c: where it lies, 0 the start of the step, 1 its end.
    use: the evaluations it uses; 0 is the one at s, i the one at stage i.
    shares: weights relative to M_0, summing to 1; None: the exact integral of the interpolating polynomial.
    midpoint: with two evaluations, replace the moment M_1 by M_0 / 2 (what DPM-Solver's own form does).
    """

    c: float
    use: tuple[int, ...] = (0,)
    shares: tuple[float, ...] | None = None
    midpoint: bool = False


Tableau = tuple[Stage, ...]


def classical(c: Sequence[float], a: Sequence[Sequence[float]], b: Sequence[float]) -> Tableau:
    """The tableau of an explicit Runge-Kutta method from its Butcher array; c and a without their first, empty row."""

    def stage(c: float, row: Sequence[float]) -> Stage:
        used = tuple(j for j, value in enumerate(row) if value != 0.0)
        return Stage(c, used, tuple(row[j] / c for j in used))

    return (*(stage(*row) for row in zip(c, a, strict=True)), stage(1.0, b))


def time_of(process: ForwardProcess, kernel: Kernel, stage: Stage, s: float, t: float) -> float:
    """When a stage of the step from s to t is."""
    if stage.c == 1.0:
        return t
    first, last = kernel.place(process, s), kernel.place(process, t)
    return kernel.time(process, first + stage.c * (last - first))


def reach(
    process: ForwardProcess,
    kernel: Kernel,
    tableau: Tableau,
    stage: Stage,
    x: torch.Tensor,
    s: float,
    u: float,
    values: Sequence[torch.Tensor],
    kappa: float = 1.0,
) -> torch.Tensor:
    """A x_s + B sum_j w_j m_j at the stage's time u; ``values`` are m at s and at the stages of ``tableau`` so far."""
    A, B = kernel.line(process, s, u, kappa)
    at = x * A
    for j, weight in zip(stage.use, _weights(process, kernel, tableau, stage, s, u, kappa), strict=True):
        at = axpy(at, values[j], B * weight)
    return at


@dataclass(frozen=True)
class Stages:
    """The outcome: x at the end, the predictions x0 of every evaluation, the first at s."""

    x: torch.Tensor
    x0: tuple[torch.Tensor, ...]


def run_stages(
    problem: Problem,
    process: ForwardProcess,
    kernel: Kernel,
    tableau: Tableau,
    x: torch.Tensor,
    s: float,
    t: float,
    x0: torch.Tensor,
    keep: Callable[[float], float] | None = None,
    gain: float = 1.0,
) -> Stages:
    """One step from s to t > 0. ``x0`` is the prediction at s, so ``len(tableau) - 1`` network calls are made here.

    process: ``problem.process``, or the frame the method works in.
    keep: for stochastic methods, the share kappa of the old noise kept over a length h of lambda, ``keep(a + b) = keep(a)
        keep(b)``. The noises of the stages are those of one Ornstein-Uhlenbeck path: N_b = keep N_a + sqrt(1 - keep^2) z.
        Independent ones would cost an order.
    gain: factor on that noise.
    """
    x, s = begin(process, x, s, t, x0)
    values, predictions, times = [kernel.read(process, x, x0, s)], [x0], [s]
    noise = None
    for i, stage in enumerate(tableau):
        u = time_of(process, kernel, stage, s, t)
        kappa = 1.0 if keep is None else keep(process.lam(u) - process.lam(s))
        at = reach(process, kernel, tableau, stage, x, s, u, values, kappa)
        if keep is not None and kappa < 1.0:
            noise = _advance(problem, process, noise, times[-1], u, keep)
            at = at.add_(noise, alpha=process.sigma(u) * gain * process.noise_scale)
        if i + 1 < len(tableau):
            predictions.append(problem.denoise(at, u))
            values.append(kernel.read(process, at, predictions[-1], u))
            times.append(u)
        else:
            x = at
    return Stages(x, tuple(predictions))


def _weights(process, kernel: Kernel, tableau: Tableau, stage: Stage, s: float, u: float, kappa: float) -> list:
    M = kernel.moments(process, s, u, len(stage.use), kappa)
    if stage.shares is not None:
        return [M[0] * share for share in stage.shares]
    if stage.midpoint and len(M) == 2:
        M = [M[0], M[0] / 2]
    return weights([(tableau[j - 1].c if j else 0.0) / stage.c for j in stage.use], M)


def _advance(problem: Problem, process: ForwardProcess, noise, a: float, b: float, keep) -> torch.Tensor:
    """The path's unit noise at time b, from its value at a (None: none yet)."""
    share = keep(process.lam(b) - process.lam(a))
    z = problem.noise(a, b) * math.sqrt(1.0 - share * share)
    return z if noise is None else axpy(z, noise, share)
