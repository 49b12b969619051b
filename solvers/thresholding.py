"""Dynamic thresholding of the predicted clean sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from . import region
from .method import param
from .solver import Denoise, Problem
from .transform import Transform


@dataclass(frozen=True)
class DynamicThresholding(Transform):
    """Keeps the predicted image in range at every call: values beyond a quantile are cut, then all are scaled down. Against
    burnt colours at high CFG, with any sampler.

    s = max(M, quantile_p(|D|)),  D <- (M / s) clip(D, -s, s),

    s of each sample by itself. A sample that stays within M is not changed.

    Made for models of pixels, whose values lie in [-1, 1]: there M = 1. Latents have no such limit, and their authors
    advise against it for them. M = 4, the default, is about four standard deviations of common latents and acts on
    runaway predictions only; lower values take contrast away, and as all channels share s, colours may shift.

    In inpainting the quantile is that of the edited part, and the kept part is left alone. One sort of the prediction per
    call; no network call of its own.

    Source: Saharia et al. (2022), arXiv:2205.11487, section 2.3, with M = 1; M / s for other M is ours. In fast samplers: Lu
    et al. (2022), arXiv:2211.01095.
    """

    id: ClassVar[str] = "DynamicThresholding"
    title: ClassVar[str] = "Dynamic thresholding"
    paper: ClassVar[str] = "Saharia et al. (2022), arXiv:2205.11487"

    M: float = param(
        4.0,
        "Largest value that may stay: 1 for models of pixels, about 4 for latents; raise it to do less.",
        min=0.1,
        max=100.0,
        step=0.1,
    )
    p: float = param(
        0.995,
        "Share of the values that is not cut, once some exceed M; lower it to cut more.",
        min=0.5,
        max=1.0,
        step=0.001,
    )

    def around(self, problem: Problem, times: Sequence[float]) -> Denoise:
        def denoise(x: torch.Tensor, t: float | Sequence[float]) -> torch.Tensor:
            x0 = problem.denoise(x, t)
            s = region.quantile(x0.abs(), self.p, problem.mask).clamp_min(self.M).to(x0.dtype)
            return region.edited(x0.clamp(-s, s) * (self.M / s), x0, problem.mask)

        return denoise
