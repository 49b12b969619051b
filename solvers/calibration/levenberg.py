"""Levenberg-Marquardt on the end of runs: few parameters, expensive runs, no gradients of the network."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .cohort import Cohort
from .families import Family, Plan
from .losses import Loss
from .tangents import jacobian

_TRIES, _STALE = 6, 3
_ENOUGH, _FIRST, _FAR = 2e-3, 0.3, 1.5
_HELD = 0.1

STAGES = ((0.5, 0.1), (1.0, 0.03))
"""Derivatives, coarse and fine: of which share of the samples, and what of the tangents may be lost (see ``tangents``)."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A run and its loss on the samples of the fit; ``best`` candidates come in ever lower ones."""

    plan: Plan
    loss: float
    theta: np.ndarray
    rms: torch.Tensor


def refine(cohort: Cohort, family: Family, theta: np.ndarray, loss: Loss) -> Generator[Candidate | None, None, Any]:
    """From theta to a minimum of the loss; yields each better candidate, the start first, and None after other visits.

        (J^T W J + mu diag(J^T W J)) step = -J^T W r,        W: ``Loss.weights``, r: residuals of the ends

    mu keeps the step within a radius, which grows with success and shrinks without.

    All samples keep their noise, so that differences are those of the parameters. J comes from finite differences once, and is
    then kept up to date by what each accepted step shows (Broyden), until there is no more gain; then once more. It is of half of
    the samples first, and coarse: all of them decide about a step. When that gives no gain even when fresh, J is of all samples,
    and finer. Ends when that gives none either.
    """
    eta = family.natural(theta)
    r, rms = yield from cohort.residuals(family.plan(eta))
    yield Candidate(family.plan(eta), loss(rms), theta, rms)
    if not len(eta) or not math.isfinite(loss(rms)):
        return
    radius, stages = _FIRST, list(STAGES)
    while stages:
        J = yield from jacobian(cohort, family, eta, *stages[0])
        begun, failed, most = loss(rms), 0, _TRIES
        while failed < most:
            new = theta + _step(J, family.slope(theta), r[: len(J)], loss.weights(rms)[: len(J)], radius)
            move = family.natural(new) - eta
            plan = family.plan(eta + move)
            r2, rms2 = yield from cohort.residuals(plan)
            before, after = loss(rms), loss(rms2)
            if not after < before:
                radius, failed = radius / 4.0, failed + 1
                continue
            by = torch.from_numpy(move).to(J)
            J = J + torch.einsum("bm,p->bmp", (r2 - r)[: len(J)] - J @ by, by / by.square().sum().clamp(min=1e-20))
            theta, eta, r, rms, radius, most = new, eta + move, r2, rms2, min(radius * 2.0, _FAR), _STALE
            yield Candidate(plan, after, theta, rms)
            failed = failed + 1 if loss.error(after) > (1.0 - _ENOUGH) * loss.error(before) else 0
        if loss.error(loss(rms)) > (1.0 - 5.0 * _ENOUGH) * loss.error(begun):
            stages.pop(0)
        radius = min(radius * 16.0, _FIRST)


def _step(J: torch.Tensor, slope: np.ndarray, r: torch.Tensor, w: torch.Tensor, radius: float) -> np.ndarray:
    """Of theta, no longer than ``radius`` in any number: mu is as large as that takes."""
    along = J.double() @ torch.from_numpy(slope)
    A = torch.einsum("bmp,b,bmq->pq", along, w.double(), along).numpy()
    g = torch.einsum("bmp,b,bm->p", along, w.double(), r.double()).numpy()
    # Numbers that hardly matter where we are would run away if only their own diagonal held them.
    scale = np.diag(A) + _HELD * np.diag(A).mean() + 1e-30
    mu = 1e-4
    while True:
        step = -np.linalg.lstsq(A + mu * np.diag(scale), g, rcond=None)[0]
        if np.abs(step).max() <= radius:
            return step
        mu *= 3.0
