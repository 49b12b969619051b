"""Fit Solver's first stage: weights by least squares, step by step along the teacher's trajectory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch

from ..kernel import axpy
from ..process import ForwardProcess
from .cohort import Cohort, Running
from .fitted import midpoint, mixed

RIDGE, ROUNDS = 1e-4, 5
_NOTHING = 1e-11

States = Callable[[float, int, int], torch.Tensor]
"""``(t, sample, count) -> x``: the teacher's."""


def sequential(
    cohort: Cohort, process: ForwardProcess, times: Sequence[float], memory: int, states: States, ridge: float = RIDGE
) -> Running:
    """Weights for each step, newest first, with which the student's state is nearest to the teacher's.

    In every step, with the student's own states and predictions of the steps before,

        min_w sum_b c_b |x_b(w) - y_b|^2 + ridge sum_m s_m^2 (w_m - w0_m)^2,     w_0 = 1 - sum_{m >= 1} w_m,

    w0 being DPM-Solver++ 2M's, s_m^2 the diagonal of the normal equations and c_b = 1 / (RMS error of sample b), found by
    repetition, so that the mean RMS is what is minimized. The last step is fitted to the targets.
    """
    rows: list[list[float]] = []
    x: list[torch.Tensor | None] = [None] * len(cohort.batches)
    made: list[tuple[torch.Tensor, ...]] = [()] * len(cohort.batches)
    for i, (s, t) in enumerate(pairwise(times)):
        q = process.sigma(t) / process.sigma(s)
        c, at, grams = process.alpha(t) - q * process.alpha(s), 0, []
        for b, batch in enumerate(cohort.batches):

            def visit(problem, start, at_b=x[b], s=s):
                here = start if at_b is None else at_b.to(start)
                return here.cpu(), problem.denoise(here, s).cpu()

            x[b], x0 = cohort.visit(batch, visit)
            made[b] = (*made[b], x0)[-memory:]
            y = cohort.targets[b] if i + 2 == len(times) else states(t, at, len(x0)).to(x0)
            grams.append(_normal(c, y - x[b] * q, made[b][::-1]))
            at += len(x0)
            yield
        w = _weights(grams, midpoint(process, times[max(0, i + 1 - memory) : i + 1], t), ridge)
        rows.append(w)
        x = [axpy(x_b * q, mixed(past[::-1], w), c) for x_b, past in zip(x, made, strict=True) if x_b is not None]
    return rows


def _normal(c: float, y: torch.Tensor, made: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """For each sample the Gram matrix of the features c (D_m - D_0), then of c D_0 and y - c D_0; and the size of c D_0."""
    newest = made[0].double()
    features = [c * (older.double() - newest) for older in made[1:]] + [y.double() - c * newest]
    flat = torch.stack([f.flatten(1) for f in features], 1)
    return torch.einsum("bmd,bnd->bmn", flat, flat) / flat.shape[2], (c * newest).flatten(1).square().mean(1)


def _weights(grams: list[tuple[torch.Tensor, torch.Tensor]], prior: list[float], ridge: float) -> list[float]:
    G, size = (torch.cat(parts).numpy() for parts in zip(*grams, strict=True))
    older = G.shape[1] - 1
    w0 = np.array([*prior, *[0.0] * older][1 : older + 1])
    w, c = w0, np.ones(len(G))
    for _ in range(ROUNDS if older else 0):
        A, g = (np.einsum("b,b...->...", c, part) for part in (G[:, :-1, :-1], G[:, :-1, -1]))
        # Where predictions do not change at all, their differences are rounding errors: the prior stays.
        keep = np.diag(ridge * np.diag(A) + _NOTHING * (c * size).sum())
        w = w0 + np.linalg.lstsq(A + keep, g - A @ w0, rcond=None)[0]
        v = np.append(-w, 1.0)
        rms = np.sqrt(np.maximum(np.einsum("m,bmn,n->b", v, G, v), 0.0))
        c = 1.0 / np.maximum(rms, max(1e-3 * np.median(rms), 1e-12))
        c /= c.mean()
    return [1.0 - float(w.sum()), *map(float, w)]
