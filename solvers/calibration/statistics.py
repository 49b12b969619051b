"""What statistics are measured on: clean samples beside the batches that know their prompts, and levels of noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..noise import gaussian
from ..process import ForwardProcess
from .cohort import Batch, Cohort, Running
from .families import Plan
from .teacher import lesson, teach

RHO_MAX = 50.0
"""Noise-to-signal ratio where levels begin at most: beyond, a network's prediction no longer depends on its input. Latent
diffusion models start at 15; EDM, zero-terminal-SNR and flow models above."""


TEACHER = 80
"""Steps of the runs that others are compared to."""


class Part(NamedTuple):
    """A batch, and clean samples of its prompts, on the CPU, one for each of its rows."""

    batch: Batch
    x0: torch.Tensor

    def noised(self, process: ForwardProcess, like: torch.Tensor, t: float, seed: int) -> torch.Tensor:
        """alpha x0 + sigma eps, on the device of ``like``; the same seed gives the same eps at every t."""
        eps = gaussian(self.x0, seed)(1.0, 0.0).to(like)
        return process.alpha(t) * self.x0.to(like) + (process.noise_scale * process.sigma(t)) * eps


def drawn(batches: Sequence[Batch], process: ForwardProcess, steps: int) -> Running:
    """Parts whose clean samples the model itself makes, guidance included, in so many steps."""
    x0 = yield from Cohort(batches).ends(lesson(process, steps))
    return [Part(batch, rows) for batch, rows in zip(batches, x0, strict=True)]


def compared(cohort: Cohort, process: ForwardProcess, plans: Sequence[Plan]) -> Running:
    """For each plan, the RMS of each sample to the teacher's, which has ``TEACHER`` steps."""
    yield from teach(cohort, process, TEACHER)
    found = []
    for plan in plans:
        found.append((yield from cohort.errors(plan)))
    return found


def levels(process: ForwardProcess, count: int, margin: float = 0.0) -> list[float]:
    """lambda of so many levels of noise, evenly over all the model knows, from ``RHO_MAX`` on, less a margin at the ends."""
    top = min(float(process.rho(process.t_max)[0]), RHO_MAX)
    low, high = -float(np.log(top)), process.lam(process.t_min)
    return np.linspace(low + margin, high - margin, count).tolist()


def over(lam: Sequence[float] | np.ndarray, values: np.ndarray, at: float) -> np.ndarray:
    """Values (n, *element) on increasing ``lam``, at another lambda: linear between them, constant beyond."""
    i = int(np.clip(np.searchsorted(lam, at) - 1, 0, len(lam) - 2))
    share = float(np.clip((at - lam[i]) / (lam[i + 1] - lam[i]), 0.0, 1.0))
    return (1.0 - share) * values[i] + share * values[i + 1]
