"""The maximum-likelihood SDE solver: the first-order stochastic step with the best Gaussian for x_t given x_s."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from . import region
from .declared import NOISE, S_NOISE
from .method import param
from .solver import Problem, Solver, Step


@dataclass(frozen=True)
class MLSDE(Solver):
    """Maximum-likelihood SDE solver, also known as Analytic-DPM: DDIM with eta whose noise also makes up for what a single
    predicted picture leaves open. Take it for stochastic sampling in few steps at low CFG.

    With q = (sigma_t alpha_s) / (sigma_s alpha_t) and kappa^2 = 1 - eta^2 (1 - q^2),

        x_t = kappa (sigma_t / sigma_s) x_s + alpha_t (1 - kappa q) D + sqrt(sigma_t^2 (1 - kappa^2) + b^2 V) z,
        b = alpha_t (1 - kappa q),     V = mean over the elements of Var(x_0 | x_s).

    For eta = 1 the mean is what Popov et al. derive (their kappa, omega and beta h come to these factors), and the whole step
    the Gaussian of highest likelihood under the true process. Their released code has no V, as if the data were constant,
    which makes it DDIM with eta 1. V follows from the prediction itself, as Bao et al. found:

    - measured: V = rho_s^2 (1 - mean of eps^2), eps = (x_s - alpha_s D) / sigma_s, taken from each sample's edited part and
      kept within [0, data_std^2]. Bao et al. average over many samples beforehand; the estimate from the sample at hand is
      an option of their Stable Diffusion code. At high noise it is coarse. CFG lengthens eps, which makes V small or 0.
    - gaussian: V = data_std^2 rho_s^2 / (data_std^2 + rho_s^2), exact for Gaussian data of that spread, which is then
      sampled exactly in any number of steps. data_std = 0 is DDIM.

    Otherwise the variance converges at weak order 1. Only the mean of V over the elements is used, so the noise added is
    white, while what is open in a picture is mostly its details. One call per step.

    Source: Popov et al. (2021), arXiv:2109.13821 (the mean); Bao et al. (2022), arXiv:2201.06503 (V); both checked with
    their authors' code.
    """

    id: ClassVar[str] = "MLSDE"
    title: ClassVar[str] = "Maximum-likelihood SDE"
    paper: ClassVar[str] = "Popov et al. (2021), arXiv:2109.13821; Bao et al. (2022), arXiv:2201.06503"

    eta: float = param(
        1.0,
        "Noise added as by DDIM: 1 as much as DDPM, 0 only what makes up for the open part.",
        min=0.0,
        max=1.0,
        step=0.01,
    )
    variance: str = param(
        "measured",
        "What the prediction leaves open: measured from each sample, or that of Gaussian data of spread data_std.",
        options=("measured", "gaussian"),
    )
    data_std: float = param(
        1.0,
        "Standard deviation of clean latents: with measured the upper limit, 1 for nearly all models; lower it if results "
        "are grainy. 0 is DDIM.",
        min=0.0,
        max=10.0,
        step=0.01,
    )
    s_noise: float = param(**S_NOISE)
    noise: str = param(**NOISE)

    @property
    def draws(self) -> str | None:
        return self.noise if self.eta > 0.0 or self.data_std > 0.0 else None

    @property
    def convergence_order(self) -> int:
        return 1

    def start(self, times: Sequence[float]) -> None:
        return None

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: None) -> Step:
        process = problem.process
        x0 = problem.denoise(x, s)
        if t == 0.0:
            return Step(x0, x0, None)
        ratio = process.sigma(t) / process.sigma(s)
        q = ratio * process.alpha(s) / process.alpha(t)
        kappa = math.sqrt(1.0 - self.eta**2 * (1.0 - q * q))
        b = process.alpha(t) * (1.0 - kappa * q)
        new = (x * (kappa * ratio)).add_(x0, alpha=b)
        if self.draws is not None:
            drawn = (process.noise_scale * process.sigma(t)) ** 2 * (1.0 - kappa * kappa)
            std = (b * b * self._open(problem, x, x0, s)).add_(drawn).sqrt_().mul_(self.s_noise)
            new = new.addcmul_(problem.noise(s, t), std)
        return Step(new, x0, None)

    def _open(self, problem: Problem, x: torch.Tensor, x0: torch.Tensor, s: float) -> torch.Tensor:
        """V of each sample, of shape (batch, 1, 1, ...)."""
        process, prior = problem.process, self.data_std**2
        alpha, noise = process.alpha(s), process.noise_scale * process.sigma(s)
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        if self.variance == "gaussian" or alpha == 0.0:  # pure noise: what is open is all there is
            return x.new_full(shape, prior * noise**2 / (alpha**2 * prior + noise**2))
        eps = torch.sub(x, x0, alpha=alpha).div_(noise)
        return (1.0 - region.dot(eps, eps, problem.mask)).mul_((noise / alpha) ** 2).clamp_(0.0, prior)
