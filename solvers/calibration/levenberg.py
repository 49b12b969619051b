"""Levenberg-Marquardt on the end of runs: few parameters, expensive runs, no gradients of the network."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .cohort import Cohort
from .families import Family, Plan
from .losses import Loss

_TRIES, _ENOUGH, _FAR = 5, 2e-3, 1.0


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

    All samples keep their noise, so that differences are those of the parameters. J comes from finite differences once, and is
    then kept up to date by what the trials show (Broyden), until they show no more gain; then once more. Ends when a fresh J
    gives no gain either.
    """
    eta = family.natural(theta)
    r, rms = yield from cohort.residuals(family.plan(eta))
    yield Candidate(family.plan(eta), loss(rms), theta, rms)
    if not len(eta):
        return
    mu = 1e-2
    while True:
        J = yield from cohort.jacobian(family, eta)
        begun, failed = loss(rms), 0
        while failed < _TRIES:
            new = theta + _step(J, family.slope(theta), r, loss.weights(rms), mu)
            move = family.natural(new) - eta
            plan = family.plan(eta + move)
            r2, rms2 = yield from cohort.residuals(plan)
            before, after = loss(rms), loss(rms2)
            if bool(torch.isfinite(r2).all()):
                by = torch.from_numpy(move).to(J)
                J = J + torch.einsum("bm,p->bmp", r2 - r - J @ by, by / by.square().sum().clamp(min=1e-20))
            if after < before:
                small = before - after < _ENOUGH * abs(before)
                theta, eta, r, rms, mu = new, eta + move, r2, rms2, max(mu / 5.0, 1e-6)
                yield Candidate(plan, after, theta, rms)
                failed = failed + 2 if small else 0
            else:
                mu, failed = min(mu * 6.0, 1e6), failed + 1
        if begun - loss(rms) < 5.0 * _ENOUGH * abs(begun):
            return
        mu = max(mu / 36.0, 1e-3)


def _step(J: torch.Tensor, slope: np.ndarray, r: torch.Tensor, w: torch.Tensor, mu: float) -> np.ndarray:
    """Of theta, no longer than ``_FAR`` in any number."""
    along = J.double() @ torch.from_numpy(slope)
    A = torch.einsum("bmp,b,bmq->pq", along, w.double(), along)
    g = torch.einsum("bmp,b,bm->p", along, w.double(), r.double())
    scale = A.diagonal().clamp(min=1e-12 * float(A.diagonal().max()) + 1e-30)
    step = -torch.linalg.lstsq(A + mu * torch.diag(scale), g[:, None], driver="gelsd").solution[:, 0].numpy()
    return step * min(1.0, _FAR / max(np.abs(step).max(), 1e-12))
