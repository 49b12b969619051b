"""Time-Shift sampling: the network is asked at the time whose noise the sample really has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from . import region
from .exposure_bias import RHO_MAX
from .method import param
from .process import ForwardProcess
from .solver import Denoise, Problem
from .transform import Transform

STEPS = 1000.0
"""Training steps that window and cutoff are counted in."""


@dataclass(frozen=True)
class TimeShift(Transform):
    """Asks the network at a slightly other time than the schedule's, found from how much each sample varies: against the
    errors that pile up in runs of 5 to 20 steps. For models of pixels, with any sampler; for latents its page says what to mind.

    Scaled to x / sqrt(alpha^2 + sigma^2), a sample of time tau has the variance

        V(tau) = (data_variance alpha_tau^2 + sigma_tau^2) / (alpha_tau^2 + sigma_tau^2).

    With v the variance of the scaled sample that the sampler has at time t, over all its elements,

        t_s = argmin |V(tau) - v|  over  t - window / 2 <= tau <= t + window / 2,

    the same scaled sample is given to the network with time t_s, and its noise prediction is taken for that at t:

        D = (x - sigma_t eps_s) / alpha_t.

    Times are in training steps of 1000. Nothing is shifted from ``cutoff`` down, at the first time of the run, and where
    sigma / alpha is above 50, the start of flow models. window = 0 is the sampler itself.

    data_variance = 0 is the paper's: V = sigma^2 of the variance-preserving process. It holds where clean samples vary
    little next to noise of variance 1, such as pixels in [-1, 1] with variance 0.25. Latents of variance near 1 vary as
    much clean as noisy, so there is nothing to be told from: with 0 the shift is simply half the window upwards.

    The authors' programs differ in what t_s is used for: the network's time alone (DEIS), also the target of the step
    (ADM), or the target alone (PNDM). This is the first, as the abstract and figure 1 describe it; the paper's own
    listing could not be read. The variance comes from the edited part in inpainting. Rows of a batch get times of their own, so
    the variances are read back from the device: one wait per call.

    Source: Li et al. (2023), arXiv:2305.15583, and the authors' code.
    """

    id: ClassVar[str] = "TimeShift"
    title: ClassVar[str] = "Time-Shift sampler"
    paper: ClassVar[str] = "Li et al. (2023), arXiv:2305.15583"

    window: int = param(
        30,
        "Width of the search in training steps: 0 changes nothing. Published: 30 to 80 with DDIM and DPM-Solver, 5 with "
        "F-PNDM.",
        min=0,
        max=400,
        step=1,
    )
    cutoff: int = param(
        300,
        "No shift from this training step down, where the variance no longer tells the time. Published: 300; 550 with "
        "F-PNDM.",
        min=0,
        max=1000,
        step=1,
    )
    data_variance: float = param(
        0.0,
        "Variance of clean samples: 0 as published. For pixels in [-1, 1] about 0.25.",
        min=0.0,
        max=0.9,
        step=0.01,
        advanced=True,
    )

    def around(self, problem: Problem, times: Sequence[float]) -> Denoise:
        if self.window == 0:
            return problem.denoise
        process, first = problem.process, max(times, default=math.inf)

        def denoise(x: torch.Tensor, t: float | Sequence[float]) -> torch.Tensor:
            given = [float(at) for at in t] if isinstance(t, Sequence) else [t] * len(x)
            if not any(at < first and self.applies(process, at) for at in given):
                return problem.denoise(x, t)
            found = region.variance(x, problem.mask).flatten().tolist()
            asked = [
                self.coupled(process, at, v) if at < first and self.applies(process, at) else at
                for at, v in zip(given, found, strict=True)
            ]
            if asked == given:
                return problem.denoise(x, t)
            scale = [size(process, tau) / size(process, at) for at, tau in zip(given, asked, strict=True)]
            seen = torch.cat([row * factor for row, factor in zip(x.split(1), scale, strict=True)])
            x0 = problem.denoise(seen, asked[0] if len(set(asked)) == 1 else asked)
            rows = zip(x.split(1), seen.split(1), x0.split(1), given, asked, strict=True)
            moved = torch.cat([moved_back(process, *row) for row in rows])
            return region.edited(moved, x0, problem.mask)

        return denoise

    def applies(self, process: ForwardProcess, t: float) -> bool:
        """Whether a sample of time t may be shifted."""
        return float(process.u_of_t(t)) * STEPS > self.cutoff and process.sigma(t) <= RHO_MAX * process.alpha(t)

    def coupled(self, process: ForwardProcess, t: float, variance: float) -> float:
        """t_s for a sample of that variance at time t; t itself where nothing in the window fits better."""
        half = self.window // 2
        u = process.u_of_t(t) + np.arange(-half, half + 1) / STEPS
        near = [t, *(float(process.t_of_u(v)) for v in u if 0.0 <= v <= 1.0)]
        return min(near, key=lambda tau: abs(self.expected(process, tau) - variance / size(process, t) ** 2))

    def expected(self, process: ForwardProcess, t: float) -> float:
        """V."""
        noise = (process.noise_scale * process.sigma(t)) ** 2
        return (self.data_variance * process.alpha(t) ** 2 + noise) / size(process, t) ** 2


def size(process: ForwardProcess, t: float) -> float:
    """sqrt(alpha^2 + sigma^2)."""
    return math.hypot(process.alpha(t), process.sigma(t))


def moved_back(
    process: ForwardProcess, x: torch.Tensor, seen: torch.Tensor, x0: torch.Tensor, t: float, asked: float
) -> torch.Tensor:
    """D at x and t with the noise predicted where the network was ``asked``."""
    if asked == t:
        return x0
    eps = torch.sub(seen, x0, alpha=process.alpha(asked)).div_(process.sigma(asked))
    return torch.sub(x, eps, alpha=process.sigma(t)).div_(process.alpha(t))
