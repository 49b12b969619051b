"""Inner products of the teacher's states and predictions, sample by sample: all that costs of jumps and derivatives need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..process import ForwardProcess
from .cohort import Cohort
from .teacher import Trajectories

_CHUNK = 1 << 16


def gram(rows: torch.Tensor) -> np.ndarray:
    """Inner products of the rows of (m, d), over d, in float64: differences of rows that are nearly equal keep their digits."""
    made = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for part in rows.split(_CHUNK, 1):
        part = part.double()
        made += part @ part.T
    return (made / rows.shape[1]).numpy()


def spread(teacher: Trajectories, count: int) -> list[int]:
    """``count`` of the teacher's steps, the first and the last among them, evenly: that is uniform in log-SNR."""
    total = len(teacher.plan.times) - 1
    return sorted({round(i) for i in np.linspace(0, total - 1, min(count, total))})


def grid(teacher: Trajectories, count: int) -> tuple[list[int], list[float]]:
    """``spread``, and the times of those steps with the end, 0."""
    chosen = spread(teacher, count)
    return chosen, [*(teacher.plan.times[i] for i in chosen), 0.0]


def trajectories(cohort: Cohort, teacher: Trajectories, steps: Sequence[int]) -> Iterator[np.ndarray]:
    """For each sample ``gram`` of [x at these steps, the end, D at these steps], (2N + 1, 2N + 1)."""
    at = 0
    for targets in cohort.targets:
        for end in targets.float():
            x = [teacher.x.get(i, at, 1)[0].flatten() for i in steps]
            D = [x_i - teacher.slope.get(i, at, 1)[0].flatten() for i, x_i in zip(steps, x, strict=True)]
            yield gram(torch.stack([*x, end.flatten(), *D]))
            at += 1


def jumps(process: ForwardProcess, times: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """q, c (N, N + 1) of the Euler (DDIM) jump from each of N times to each later one, the last one being 0: q x + c D.

        q = sigma_t / sigma_s,      c = alpha_t - q alpha_s

    0 where the jump leads back. The same jump in every variable in which the equation is linear in x and D.
    """
    sigma = np.array([process.sigma(t) for t in times])
    alpha = np.array([process.alpha(t) for t in times])
    q = np.triu(sigma[None] / sigma[:-1, None], 1)
    return q, np.triu(alpha[None] - q * alpha[:-1, None], 1)
