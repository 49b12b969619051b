"""SiT: the stochastic interpolant's SDE, a flow model sampled with noise of a freely chosen strength."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .declared import NOISE
from .method import param
from .process import ForwardProcess
from .solver import Problem, Solver, Step

FORMS: dict[str, Callable[[float, float], float]] = {
    "sigma": lambda u, c: c * u,
    "SBDM": lambda u, c: c * u / (1.0 - u) if u < 1.0 else math.inf,
    "constant": lambda u, c: c,
    "decreasing": lambda u, c: 0.25 * (1.0 - c * math.cos(math.pi * u)) ** 2,
    "increasing-decreasing": lambda u, c: c * math.sin(math.pi * u) ** 2,
}
"""The diffusion coefficient w at noise level u of the linear interpolant, by the name SiT gives it."""


@dataclass(frozen=True)
class SiTSDE(Solver):
    """Stochastic sampler of flow models: Euler-Maruyama or Heun on an SDE whose amount of noise you choose freely. Meant for
    50 steps and more (its paper takes 250).

    In the frame of the linear interpolant, y = x / (alpha + sigma) at level u = sigma / (alpha + sigma), which is the flow
    model itself and also makes any other model one, a step of length Delta = u_s - u_t is

        y <- y + [(D - y) / u + w(u) S] Delta + nu sqrt(2 w(u) Delta) z,      S = ((1 - u) D - y) / u^2,

    nu being the size of the model's noise (mostly 1). w with c = diffusion_norm: c u (sigma), c u / (1 - u) (SBDM, for c = 1
    the reverse SDE), c (constant), (1 - c cos(pi u))^2 / 4 (decreasing), c sin^2(pi u) (increasing-decreasing). heun adds
    the noise first, then averages the drift at both ends, with w of either end; two calls per step.

    w is kept below u^2 / (2 Delta), where the score step would go half way to the prediction: needed near u = 0, and for
    SBDM near u = 1, where the published w is infinite; it changes the path, not the marginals. Of the published last steps,
    tweedie and euler are the same at u = 0, the prediction itself; mean is the whole drift without noise.

    The variance converges at weak order 1 with either method. On Gaussian data it is nearer than DDIM's with eta 1 at equal
    steps; on a point mass DDIM's is exact and this one's is not. Without diffusion (c = 0) the methods are Euler's (DDIM)
    and Heun's on the ODE, of order 1 and 2.

    Source: Ma et al. (2024), arXiv:2401.08740; forms of w, heun and last steps as in the authors' code.
    """

    id: ClassVar[str] = "SiTSDE"
    title: ClassVar[str] = "SiT SDE"
    paper: ClassVar[str] = "Ma et al. (2024), arXiv:2401.08740"

    sampling_method: str = param(
        "euler", "euler: one call per step. heun: two, a better drift but the same order.", options=("euler", "heun")
    )
    diffusion_form: str = param(
        "sigma",
        "How the noise is distributed over the run: sigma fades with the noise level, SBDM is the reverse SDE, the others are "
        "as named.",
        options=tuple(FORMS),
    )
    diffusion_norm: float = param(
        1.0, "Amount of noise: 0 none (an ODE, except with decreasing), 1 as published.", min=0.0, max=4.0, step=0.01
    )
    last_step: str = param(
        "tweedie",
        "How the clean picture is made: tweedie is the prediction, mean goes beyond it along the score.",
        options=("tweedie", "mean"),
        advanced=True,
    )
    noise: str = param(**NOISE)

    @property
    def draws(self) -> str | None:
        return self.noise if self.diffusion_norm > 0.0 or self.diffusion_form == "decreasing" else None

    @property
    def convergence_order(self) -> int:
        return 2 if self.sampling_method == "heun" and not self.stochastic else 1

    @property
    def calls(self) -> int:
        return 2 if self.sampling_method == "heun" else 1

    def start(self, times: Sequence[float]) -> None:
        return None

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: None) -> Step:
        process = problem.process
        (scale, u), (scale_t, u_t) = _frame(process, s), _frame(process, t)
        length = u - u_t
        w = self._diffusion(u, length)
        heun = self.sampling_method == "heun" and t > 0.0
        gain = process.noise_scale * math.sqrt(2.0 * w * length) if t > 0.0 else 0.0
        if heun and gain > 0.0:
            x = x.add(problem.noise(s, t), alpha=gain * scale)
        x0 = problem.denoise(x, s)
        if t == 0.0:
            return Step(self._end(x, x0, u, w, scale, problem.mask), x0, None)
        y = x / scale
        new = _drift(y, x0, u, w, length).add_(y)
        if heun:
            end = _drift(new, problem.denoise(new * scale_t, t), u_t, self._diffusion(u_t, length), length)
            new = new.add_(y).add_(end).div_(2.0)
        elif gain > 0.0:
            new = new.add_(problem.noise(s, t), alpha=gain)
        return Step(new.mul_(scale_t), x0, None)

    def _diffusion(self, u: float, length: float) -> float:
        return min(FORMS[self.diffusion_form](u, self.diffusion_norm), 0.5 * u * u / length)

    def _end(self, x, x0: torch.Tensor, u: float, w: float, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
        """The clean sample; where the latent is kept, the prediction itself."""
        if self.last_step == "tweedie":
            return x0
        beyond = (x0 * (1.0 - u)).sub_(x, alpha=1.0 / scale).mul_(w / u)
        return x0 + (beyond if mask is None else beyond.mul_(mask.to(x)))


def _frame(process: ForwardProcess, t: float) -> tuple[float, float]:
    """``(alpha + sigma, u)``: x is ``alpha + sigma`` times the sample at level u of the linear interpolant."""
    scale = process.alpha(t) + process.sigma(t)
    return scale, process.sigma(t) / scale


def _drift(y: torch.Tensor, x0: torch.Tensor, u: float, w: float, length: float) -> torch.Tensor:
    """The drift at level u times the length of the step."""
    flow, score = length / u, length * w / (u * u)
    return (y * -(flow + score)).add_(x0, alpha=flow + score * (1.0 - u))
