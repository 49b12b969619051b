"""Asking the network at other noise levels than the solver computes with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from .. import region
from ..solver import Denoise, Problem
from ..time_shift import moved_back, size

MOST = 0.5
"""Offsets, in log noise-to-signal, are smaller than this."""

NEAR = 1e-4
"""How far, relatively, the sigmas of a run may be from those of its file: they pass through float32."""


def check_sigmas(times: Sequence[float], sigmas: Sequence[float], taker: str, made: str) -> None:
    """Raise ``ValueError`` unless a run is over the ``sigmas`` of a file; ``made``: "it was fitted", or the like."""
    if len(times) != len(sigmas):
        raise ValueError(f"{taker}: {made} for {len(sigmas) - 1} steps, and this run has {len(times) - 1}.")
    for given, meant in zip(times, sigmas, strict=True):
        if not math.isclose(given, meant, rel_tol=NEAR, abs_tol=1e-9):
            raise ValueError(
                f"{taker}: sigma {given:g} was given where {made} for {meant:g}; connect the sigmas of the same file (Found "
                "Schedule)."
            )


def asked(problem: Problem, times: Sequence[float], offsets: Sequence[float]) -> Denoise:
    """A denoiser that asks at noise levels moved by ``offsets``, of ``times`` but the last; not beyond the model's range."""
    process = problem.process
    levels = np.log(process.rho(times[1:-1]))[::-1]
    known = np.asarray(offsets[1:], dtype=np.float64)[::-1]

    def denoise(x: torch.Tensor, t: float | Sequence[float]) -> torch.Tensor:
        if not isinstance(t, Sequence):
            return one(x, t)
        return torch.cat([one(row, at) for row, at in zip(x.split(1), t, strict=True)])

    def one(x: torch.Tensor, t: float) -> torch.Tensor:
        if not len(levels) or t >= times[0] * (1.0 - NEAR) or not np.any(known):
            return problem.denoise(x, t)
        k = float(process.rho(t)[0])
        c = float(process.t_of_rho(k * math.exp(float(np.interp(math.log(k), levels, known)))))
        c = min(max(c, min(t, process.t_min)), process.t_max)
        seen = x * (size(process, c) / size(process, t))
        x0 = problem.denoise(seen, c)
        return region.edited(moved_back(process, x, seen, x0, t, c), x0, problem.mask)

    return denoise
