"""SA-Solver: stochastic Adams methods, a predictor and a corrector that share one draw of noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .declared import LOWER_ORDER_FINAL, NOISE, S_NOISE
from .kernel import Data
from .method import param
from .multistep import Multistep, Place, Rule
from .process import ForwardProcess
from .unipc import shortcut


@dataclass(frozen=True)
class SASolver(Multistep):
    """Stochastic predictor-corrector: adds noise in the middle of the run only, one network call per step.

    Take it from 15 steps on, for the texture of a stochastic sampler with fewer steps; ``eta`` 0 is a deterministic
    predictor-corrector. Without noise in the window it is UniPC.

    predict   x_t = (sigma_t / sigma_s) e^{-tau^2 h} x_s + alpha_t sum_j w_j D_j + sigma_t sqrt(1 - e^{-2 tau^2 h}) z,
              sum_j w_j u_j^m = M_m,   M_m = H m! phi_{m+1}(-H),   H = (1 + tau^2) h,   u_j = (lambda_j - lambda_s) / h
    correct   the same x_s and z with one more point, D at the predicted x_t (u = 1)

    over the newest ``predictor_order`` predictions, and over ``corrector_order`` for the corrector, the new one included.
    tau(t) is eta while the end t of a step lies in the window, else 0. PEC keeps the prediction made at the predicted point,
    PECE asks the network once more at the corrected one. tau = 0 with orders p and p + 1, p >= 3, is UniPC of order p.

    ``simple_order_2`` (the published few-steps mode) takes M_1 = H / 2 wherever two points are used. It keeps the order, but
    on problems with known answers it was further off at 6 to 12 steps than the integral, so it is not the default.

    Deterministic order min(predictor_order + 1, corrector_order); weak order 1 for a predictor of order 1 alone, else 2:
    noise limits it.

    Source: Xue et al. (2023), arXiv:2309.05019, eq. 15 and 18 and appendix D.
    """

    id: ClassVar[str] = "SASolver"
    title: ClassVar[str] = "SA-Solver"
    paper: ClassVar[str] = "Xue et al. (2023), arXiv:2309.05019"

    predictor_order: int = param(2, "Predictions used by the predictor: 2 with guidance, 3 without.", min=1, max=4)
    corrector_order: int = param(
        2,
        "Predictions used by the corrector, the newest included: 2 with guidance, 4 without, 0 for none.",
        min=0,
        max=4,
    )
    eta: float = param(
        1.0, "Noise added inside the window (tau): 0 none, 1 the reverse SDE. More needs more steps.", min=0.0, max=2.0,
        step=0.01,
    )  # fmt: skip
    start_percent: float = param(
        0.2, "Where in the run noise starts to be added, as part of the model's time.", min=0.0, max=1.0, step=0.001
    )
    end_percent: float = param(
        0.8, "Where in the run noise stops to be added; 1 goes on to the end.", min=0.0, max=1.0, step=0.001
    )
    simple_order_2: bool = param(
        False,
        "The published few-steps weights wherever two predictions are used; off, the exact integral.",
        advanced=True,
    )
    mode: str = param(
        "PEC",
        "PEC: one network call per step. PECE: a second one at the corrected point; only with many calls to spend.",
        options=("PEC", "PECE"),
        advanced=True,
    )
    s_noise: float = param(**S_NOISE)
    lower_order_final: str = param(**LOWER_ORDER_FINAL)
    noise: str = param(**NOISE)

    in_frame: ClassVar[str] = "snr"

    def __post_init__(self):
        super().__post_init__()
        if self.start_percent > self.end_percent:
            raise ValueError(
                f"{self.title}: start_percent = {self.start_percent} must not lie after end_percent = {self.end_percent}."
            )
        if self.mode == "PECE" and self.corrector_order > 0:
            object.__setattr__(self, "calls", 2)

    @property
    def convergence_order(self) -> int:
        corrected = (
            min(self.predictor_order + 1, self.corrector_order) if self.corrector_order else self.predictor_order
        )
        return min(corrected, 2) if self.stochastic else corrected

    @property
    def draws(self) -> str | None:
        return self.noise if self.eta > 0.0 else None

    @property
    def span(self) -> int:
        return max(self.predictor_order, self.corrector_order - 1)

    def tau(self, process: ForwardProcess, t: float) -> float:
        """Noise level of a step that ends at t."""
        first = math.inf if self.start_percent == 0.0 else process.t_of_u(1.0 - self.start_percent)
        last = 0.0 if self.end_percent == 1.0 else process.t_of_u(1.0 - self.end_percent)
        return self.eta if first >= t >= last else 0.0

    def rule(self, place: Place) -> Rule:
        tau = self.tau(place.process, place.t)
        return Rule(
            Data(),
            place.points(self.predictor_order, self.lower_order_final),
            place.points(self.corrector_order - 1, self.lower_order_final) + 1,
            again=self.mode == "PECE",
            kappa=math.exp(-(tau**2) * place.h),
            bend=(lambda M, H: shortcut(M, -H)) if self.simple_order_2 else None,
            gain=self.s_noise,
        )
