"""The sampler of models distilled for few steps: jump to the clean sample, or near it, and add noise again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .declared import S_NOISE
from .method import param
from .process import ForwardProcess
from .renoise import renoise
from .solver import Problem, Solver, Step

GAMMA = {"LCM": 1.0, "DMD2": 1.0, "Lightning": 0.0}
"""Presets with a gamma of their own."""


@dataclass(frozen=True)
class ConsistencySampler(Solver):
    """For models and LoRAs distilled for 1 to 8 steps (LCM, TCD, Hyper-SD, DMD2, Lightning). Others become blurred by
    it. Take the Uniform schedule with spacing trailing, and the CFG the model was distilled for, mostly 1.

    A step from s to t jumps further down, to r <= t, by the prediction D, and adds the noise that is missing:

        x_r = alpha_r D + sigma_r eps,   eps = (x_s - alpha_s D) / sigma_s,
        x_t = (alpha_t / alpha_r) x_r + sqrt(sigma_t^2 - (alpha_t / alpha_r)^2 sigma_r^2) z.

    The presets differ in r alone, with rho = sigma / alpha and u the model's training time, from 0 to 1:

        LCM, DMD2    r = 0, all noise is new: gamma = 1. Multistep consistency sampling; ComfyUI's "lcm"
        TCD          u_r = (1 - gamma) u_t: gamma in time, "eta" of diffusers' TCDScheduler; Hyper-SD's unified LoRA
        CTM          rho_r = sqrt(1 - gamma^2) rho_t: gamma is the share of the noise that is new, as a deviation
        Lightning    r = t, nothing is new: gamma = 0. DDIM; also for Hyper-SD's LoRAs for one number of steps

    For any other method of this kind take CTM and its gamma. With gamma = 0 it is DDIM, of order 1. With more, a share
    of the noise is redrawn at every step, however short, so that more steps do not converge to the distribution of an
    ordinary model, but lose its variance. A model whose own last step stops at its lowest sigma (TCD) here goes to the
    clean sample. SDXL Turbo's own sampler is Euler ancestral, which redraws less: take DDIM with eta 1 for it. One
    call per step.

    Source: Song et al. (2023), arXiv:2303.01469, algorithm 1; Luo et al. (2023), arXiv:2310.04378 (LCM); Kim et al.
    (2023), arXiv:2310.02279 (CTM), with an ordinary prediction for its jump; Zheng et al. (2024),
    arXiv:2402.19159 (TCD).
    """

    id: ClassVar[str] = "Consistency"
    title: ClassVar[str] = "Consistency sampler (LCM, TCD, CTM)"
    paper: ClassVar[str] = "Song et al. (2023), arXiv:2303.01469"

    preset: str = param(
        "LCM",
        "What the model was distilled for. LCM, DMD2 and Lightning need no more; TCD and CTM use gamma. Use with the "
        "Uniform schedule, spacing trailing.",
        options=("LCM", "TCD", "DMD2", "Lightning", "CTM"),
    )
    gamma: float = param(
        0.3,
        "TCD and CTM only: 0 keeps the noise (deterministic), 1 renews all of it. Raise it for more detail, lower it "
        "for steadier pictures at more steps.",
        min=0.0,
        max=1.0,
        step=0.01,
    )
    s_noise: float = param(**S_NOISE)

    @property
    def redrawn(self) -> float:
        """The gamma in force."""
        return GAMMA.get(self.preset, self.gamma)

    @property
    def convergence_order(self) -> int:
        return 1

    @property
    def draws(self) -> str | None:
        return "gaussian" if self.redrawn > 0.0 else None

    def start(self, times: Sequence[float]) -> None:
        return None

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: None) -> Step:
        process = problem.process
        x0 = problem.denoise(x, s)
        if t == 0.0:
            return Step(x0, x0, None)
        r = self.landing(process, t)
        keep = process.sigma(r) / process.sigma(s)
        x = (x * keep).add_(x0, alpha=process.alpha(r) - process.alpha(s) * keep)
        if r < t:
            x = renoise(process, x, r, t, problem.noise(s, t), self.s_noise)
        return Step(x, x0, None)

    def landing(self, process: ForwardProcess, t: float) -> float:
        """r, the time jumped to before noise brings the sample up to t."""
        gamma = self.redrawn
        if gamma == 0.0:
            return t
        if gamma == 1.0 and self.preset != "TCD":
            return 0.0
        if self.preset == "TCD":
            r = process.t_of_u((1.0 - gamma) * process.u_of_t(t))
        else:
            r = process.t_of_lam(process.lam(t) - 0.5 * math.log1p(-(gamma**2)))
        return min(float(r), t)  # t may lie below all training times
