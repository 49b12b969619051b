"""SEEDS: the reverse SDE by exponential Runge-Kutta methods with correlated noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .declared import NOISE, S_NOISE
from .kernel import Data
from .method import param
from .runge_kutta import run_stages
from .singlestep import THIRDS, exponential
from .solver import Problem, Solver, Step


@dataclass(frozen=True)
class SEEDS(Solver):
    """SEEDS-1, 2, 3: stochastic sampler that makes one to three network calls per step, more accurate per step than
    SDE-DPM-Solver++. Take it for textures of a stochastic sampler at 30 calls and more.

    With h = lambda_t - lambda_s and H = (1 + eta) h, every inner point and the end are of the form

    x_u = (sigma_u / sigma_s) e^{-eta r h} x_s + alpha_u sum_j w_j D_j + sigma_u N_r,      lambda_u = lambda_s + r h,

    with the weights of DPM-Solver++ singlestep for H instead of h. The noises N of one step are points of one
    Ornstein-Uhlenbeck path: N_r' = e^{-eta (r' - r) h} N_r + sqrt(1 - e^{-2 eta (r' - r) h}) z, starting from N_0 = 0. With
    independent noises instead the method is of weak order 1.

    eta = 0 is DPM-Solver++ singlestep (2S, 3S), eta = 1 the reverse SDE, SEEDS of the paper. Order 1 is SDE-DPM-Solver++ of
    order 1. Order 2 with c2 = 1 and taylor is ComfyUI's exp_heun_2_x0_sde. The variance converges at weak order 1 for
    order 1 and 2 for orders 2 and 3. The last step to 0 is the prediction, one call.

    Source: Gonzalez et al. (2023), arXiv:2305.14267, in data prediction. The released code's third stage
    for data prediction does not follow its own derivation; here the derivation counts.
    """

    id: ClassVar[str] = "SEEDS"
    title: ClassVar[str] = "SEEDS"
    paper: ClassVar[str] = "Gonzalez et al. (2023), arXiv:2305.14267"

    order: int = param(2, "Network calls per step: SEEDS-1, 2 or 3.", min=1, max=3)
    eta: float = param(
        1.0, "Noise added per step: 0 none (DPM-Solver++ 2S, 3S), 1 the reverse SDE.", min=0.0, max=2.0, step=0.01
    )
    correction: str = param(
        "midpoint",
        "Form of order 2: midpoint is the paper's 2a, taylor its 2b (the exact integral). Order 3 has one form only.",
        options=("midpoint", "taylor"),
        advanced=True,
    )
    c2: float = param(
        0.5,
        "Where order 2 evaluates inside the step: 0.5 in the middle (in lambda), 1 at its end.",
        min=0.05,
        max=1.0,
        step=0.05,
        advanced=True,
    )
    s_noise: float = param(**S_NOISE)
    noise: str = param(**NOISE)

    @property
    def calls(self) -> int:
        return self.order

    @property
    def draws(self) -> str | None:
        return self.noise if self.eta > 0.0 else None

    @property
    def convergence_order(self) -> int:
        return min(self.order, 2) if self.stochastic else self.order

    def start(self, times: Sequence[float]) -> None:
        return None

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: Any) -> Step:
        x0 = problem.denoise(x, s)
        if t == 0.0:
            return Step(x0, x0, None)
        tableau = exponential(
            *((2, self.correction, (self.c2,)) if self.order == 2 else (self.order, "midpoint", THIRDS))
        )
        keep = (lambda h: math.exp(-self.eta * h)) if self.stochastic else None
        stages = run_stages(problem, problem.process, Data(), tableau, x, s, t, x0, keep, self.s_noise)
        return Step(stages.x, x0, None)
