"""Epsilon scaling: the predicted noise, a little too large during sampling, is made smaller."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from . import region
from .method import param
from .process import ForwardProcess
from .solver import Denoise, Problem
from .transform import Transform

RHO_MAX = 50.0
"""Noise-to-signal ratio beyond which predictions are left alone. D takes (1 - 1 / lambda) rho eps, so that towards pure noise
the smallest scaling would outweigh it. Latent diffusion models start at 15, EDM at 80, flow models at infinity."""


@dataclass(frozen=True)
class Scaling(Transform):
    """Abstract: the predicted noise divided by a number for each time."""

    @abstractmethod
    def divisor(self, process: ForwardProcess, t: float) -> float:
        """lambda_t."""

    def around(self, problem: Problem, times: Sequence[float]) -> Denoise:
        process = problem.process

        def denoise(x: torch.Tensor, t: float | Sequence[float]) -> torch.Tensor:
            x0 = problem.denoise(x, t)
            if isinstance(t, Sequence):
                rows = zip(x.split(1), x0.split(1), t, strict=True)
                scaled = torch.cat([self.scaled(process, row, clean, float(at)) for row, clean, at in rows])
            else:
                scaled = self.scaled(process, x, x0, t)
            return region.edited(scaled, x0, problem.mask)

        return denoise

    def scaled(self, process: ForwardProcess, x: torch.Tensor, x0: torch.Tensor, t: float) -> torch.Tensor:
        """D at time t with the noise scaled."""
        lam, alpha = self.divisor(process, t), process.alpha(t)
        if lam == 1.0 or process.sigma(t) > RHO_MAX * alpha:
            return x0
        return torch.add(x0 / lam, x, alpha=(1.0 - 1.0 / lam) / alpha)


@dataclass(frozen=True)
class EpsilonScaling(Scaling):
    """Divides the predicted noise by a number just above 1, against exposure bias: during sampling a network sees its own
    errors and predicts more noise than in training. For any sampler, on flow models too; try a few values of b.

    eps <- eps / lambda_t,  lambda_t = k t + b,  that is  D <- D / lambda_t + (1 - 1 / lambda_t) x / alpha_t,

    with eps = (x - alpha_t D) / sigma_t and t the training time, 0 clean and 1 pure noise. The paper counts t in steps, 0
    the last one: its k times the number of steps less one is the k here. lambda = 1 changes nothing.

    Published, all on models of pixels:

        ADM, ancestral, 50 and 100 steps   b 1.004 to 1.007, CIFAR-10 1.017
        ADM, ancestral, 20 steps           b 1.005 to 1.011, CIFAR-10 1.017
                                           or b 1.003 to 1.004 and k 0.004 to 0.015, CIFAR-10 1 and 0.048
        EDM, CIFAR-10, Euler               b 1.003 at 35 steps, 1.004 at 21, 1.005 at 13
        EDM, CIFAR-10, Heun                b 1.0005 at 35 calls, 0.9985 at 21, 1.006 at 13

    For latents and flow models there are no such numbers. With an exact network it would only do harm.

    Where sigma / alpha is above 50, the start of flow models, of EDM and of zero-terminal-SNR models, the prediction is
    left alone: there the change of D would have no bound. ComfyUI's "Epsilon Scaling" does the same without that bound,
    but on flow models it divides the velocity, noise less image, instead of the noise.

    In inpainting the kept part is left alone. No network call of its own.

    Source: Ning et al. (2023), arXiv:2308.15321; the numbers are those of the authors' ADM-ES and EDM-ES repositories.
    """

    id: ClassVar[str] = "EpsilonScaling"
    title: ClassVar[str] = "Epsilon scaling"
    paper: ClassVar[str] = "Ning et al. (2023), arXiv:2308.15321"

    b: float = param(
        1.005,
        "Divisor of the predicted noise: 1 changes nothing. Try 1.002 to 1.01, higher with fewer steps.",
        min=0.5,
        max=1.5,
        step=0.0005,
    )
    k: float = param(
        0.0,
        "Added to b at pure noise, and less in proportion on the way to the clean sample; 0 divides by b everywhere.",
        min=-0.4,
        max=0.4,
        step=0.001,
        advanced=True,
    )

    def divisor(self, process: ForwardProcess, t: float) -> float:
        return self.b + self.k * float(process.u_of_t(min(max(t, process.t_min), process.t_max)))
