"""The fit behind LinearAG: past predictions that add up to the next unconditional one, by least squares."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

RIDGE = 1e-4
"""Of the mean square of the predictions: enough for pictures that are nearly collinear from step to step."""

Trajectory = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""(d_c, d_u) of every step of a run with full guidance."""


Coefficients = list[dict[str, list[float]] | None]
"""Of every step: None where both sides are computed, else those of d_c and d_u, newest last."""


def full_steps(steps: int, interval: int, warmup: int) -> list[bool]:
    """Whether a step computes both sides: the first ``warmup`` and then one in ``interval``."""
    return [n < warmup or (n - warmup) % interval == interval - 1 for n in range(steps)]


def prior(n_c: int, n_u: int, age: int) -> np.ndarray:
    """The coefficients of reuse, d_u(n) = d_c(n) + (d_u - d_c)(n - age): what a fit without data falls back on."""
    w = np.zeros(n_c + n_u)
    w[n_c - 1] += 1.0
    w[-1] += 1.0
    if age < n_c:
        w[n_c - 1 - age] -= 1.0
    else:
        w[n_c - 1] -= 1.0
    return w


def fit(runs: Sequence[Trajectory], steps: int, interval: int, warmup: int, history: int) -> Coefficients:
    """The coefficients of every step: least squares over all numbers of all runs, one step at a time.

    A step that is left out is regressed on d_c of itself and of the ``history`` steps before, and on d_u of the newest
    ``history`` steps that were computed. Without runs they are those of reuse.
    """
    full = full_steps(steps, interval, warmup)
    found: Coefficients = []
    for n, computed in enumerate(full):
        known = [m for m in range(n) if full[m]][-history:]
        if computed or not known:
            found.append(None)
            continue
        past = list(range(max(n - history, 0), n + 1))
        w = prior(len(past), len(known), n - known[-1])
        gram, right = np.zeros((len(w), len(w))), np.zeros(len(w))
        for run in runs:
            columns = [run[m][0] for m in past] + [run[m][1] for m in known]
            F = torch.stack([c.double().flatten() for c in columns])
            gram, right = gram + (F @ F.T).numpy(), right + (F @ run[n][1].double().flatten()).numpy()
        if np.trace(gram) > 0.0:
            ridge = RIDGE * np.trace(gram) / len(w) * np.eye(len(w))
            w = w + np.linalg.solve(gram + ridge, right - gram @ w)
        found.append({"c": w[: len(past)].tolist(), "u": w[len(past) :].tolist()})
    return found


def predicted(run: Trajectory, steps: Coefficients, n: int) -> torch.Tensor:
    """d_u of step n as ``steps`` has it, from a run whose every prediction is known."""
    made = steps[n]
    assert made is not None
    known = [m for m in range(n) if steps[m] is None][-len(made["u"]) :]
    past = range(n + 1 - len(made["c"]), n + 1)
    c = sum(w * run[m][0] for w, m in zip(made["c"], past, strict=True))
    return c + sum(w * run[m][1] for w, m in zip(made["u"], known, strict=True))


def loss(run: Trajectory, steps: Coefficients) -> float:
    """How far the predicted d_u - d_c are off, relative to their size, over all steps that leave d_u out."""
    off, size = 0.0, 0.0
    for n, made in enumerate(steps):
        if made is not None:
            off += float((predicted(run, steps, n) - run[n][1]).square().sum())
            size += float((run[n][1] - run[n][0]).square().sum())
    return math.sqrt(off / size) if size > 0.0 else 0.0
