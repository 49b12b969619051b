"""DPM-Solver-v3: the linear part of the ODE, its scale and its drift are taken from measured model statistics.

With y = x / alpha and f = (sigma eps - l x) / alpha the ODE is dy/dlambda = -(f + l y). The statistics (``ems.py``)
predict how f goes on, df/dlambda = s f + b, so only what they miss is interpolated. Measured from the start s of a step,

    L = int l,   S = int s,   q' = s q + b with q = 0 at the start,   f = e^S g + q

    x_t = (alpha_t / alpha_s) e^{-L_t} x_s - alpha_t e^{-L_t} [ int e^{L + S} g dlambda + int e^L q dlambda ]

and g is the polynomial through g_j = e^{-S_j} (f_j - q_j): a kernel of ``multistep.py`` whose values depend on the start.
This is eq. 8 of the paper, where the integrals run from the first lambda; from the start of the step nothing cancels.
"""

# ruff: noqa: E741 - l is the paper's letter

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from .declared import LOWER_ORDER_FINAL
from .ems import DATA_PREDICTION, KIND, Integrals, ModelStatistics, coefficient, integrals
from .kernel import Kernel, fit
from .method import param, part
from .multistep import Multistep, Place, Rule, nearest
from .solver import Problem, Step


@dataclass(frozen=True)
class Statistical(Kernel):
    """f = (sigma eps - l x) / alpha in lambda, under the kernel e^{L + S} of model statistics."""

    key: ClassVar[str] = "f"
    statistics: ModelStatistics

    def place(self, process, t):
        return process.lam(t)

    def time(self, process, place):
        return process.t_of_lam(place)

    def read(self, process, x, x0, t):
        l = coefficient((1.0 - self.statistics.at(np.array([process.lam(t)]))[0][0]) / process.alpha(t))
        return (x * fit(l, x)).sub_(x0)

    def line(self, process, s, t, kappa):
        if kappa != 1.0:
            raise ValueError("model statistics are for deterministic steps; kappa must be 1.")
        decay = self._over(process, s, t).decay
        return decay * (process.alpha(t) / process.alpha(s)), decay * -process.alpha(t)

    def moments(self, process, s, t, k, kappa):
        return list(self._over(process, s, t).M[:k])

    def anchor(self, process, s, t, times, w):
        known = self._over(process, s, t).known
        kept = []
        for weight, time in zip(w, times, strict=True):
            if time < s:
                past = self._over(process, s, time)
                weight, q = weight * past.shrink, past.q
            elif time > s:  # seen from s, S and q of an earlier time are those of the way from there, undone
                past = self._over(process, time, s)
                weight, q = weight / past.shrink, past.q * -past.shrink
            else:
                q = 0.0
            known = known - weight * q
            kept.append(weight)
        return kept, known

    def _over(self, process, s: float, t: float) -> Integrals:
        return integrals(self.statistics, process.lam(s), process.lam(t))


_EARLY = {"always": (True, True), "early": (True, False), "late": (False, True), "never": (False, False)}
"""Whether the corrector is used in the earlier and in the later half of the training time."""


@dataclass(frozen=True)
class DPMSolverV3(Multistep):
    """DPM-Solver-v3: DPM-Solver with a parameterization measured on the network itself; for 5 to 10 steps.

    With statistics l, s, b of the network at every lambda, f = (sigma eps - l x) / alpha is expected to follow
    df/dlambda = s f + b, and only what differs from that is interpolated, through ``order`` points:

    x_t = (alpha_t / alpha_s) e^{-L} x_s - alpha_t e^{-L} [ sum_j w_j g_j + K ],   sum_j w_j u_j^m = int e^{L + S} u^m dlambda,

    L, S, K and g_j as in ``dpm_solver_v3.py``. l = 1, s = b = 0 is data prediction (DPM-Solver++, with its corrector
    UniPC), l = b = 0, s = -1 noise prediction (DPM-Solver). Statistics belong to one network, one guidance scale and the
    range of sigmas they were measured over; outside it they are taken as constant. Without a file: data prediction.

    The corrector repeats the step with the prediction at its end as one more point, at no cost. c_pseudo takes its k-th
    derivative as the k-th divided difference of the nearest points, steadier at few steps but of order 2; p_pseudo does so
    in the predictor. Otherwise the order is ``order`` where the statistics are smooth, and near 2 where they are noisy.

    Statistics are interpolated in lambda and integrated to round-off, where the published code rounds sigmas to their grid
    and uses the trapezoidal rule.

    Source: Zheng et al. (2023), arXiv:2310.13268, eq. 8 and section 3; the pseudo order and the corrector's half from the
    authors' code.
    """

    id: ClassVar[str] = "DPMSolverV3"
    title: ClassVar[str] = "DPM-Solver-v3"
    paper: ClassVar[str] = "Zheng et al. (2023), arXiv:2310.13268"

    order: int = param(2, "Predictions used per step: 2 with guidance, 3 without.", min=1, max=3)
    use_corrector: str = param(
        "always",
        "When to correct each step by the next prediction. With high CFG try early (only the noisier half of the steps) or "
        "late.",
        options=("always", "early", "late", "never"),
    )
    p_pseudo: bool = param(
        False, "Pseudo-order in the predictor: steadier, of order 2. For runs of 5 steps.", advanced=True
    )
    c_pseudo: bool = param(
        True,
        "Pseudo-order in the corrector, with one point more: steadier, of order 2. Off for the full order.",
        advanced=True,
    )
    lower_order_final: str = param(**LOWER_ORDER_FINAL)
    statistics: ModelStatistics = part(  # noqa: RUF009
        KIND,
        "Model statistics from ComfyUI's models/quickstep folder. none: data prediction, which makes this DPM-Solver++ with "
        "a corrector.",
        default=DATA_PREDICTION,
    )

    draws: ClassVar[None] = None
    in_frame: ClassVar[str] = "snr"

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return (Statistical(self.statistics),)

    @property
    def span(self) -> int:
        return self.order

    @property
    def convergence_order(self) -> int:
        predicted = min(self.order, 2) if self.p_pseudo else self.order
        corrected = 2 if self.c_pseudo else self.order
        return {"always": corrected, "never": predicted}.get(self.use_corrector, min(predicted, corrected))

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: Any) -> Step:
        self.statistics.check(x)
        return super().step(problem, x, s, t, state)

    def rule(self, place: Place) -> Rule:
        kernel = self.kernels[0]
        points = min(place.points(self.order, self.lower_order_final), place.known)
        rule = Rule(kernel, points, reach=nearest(1, range(1, points + 1)) if self.p_pseudo else None)
        corrected = points + self.c_pseudo
        if corrected == 1 or not self._corrects(place):
            return rule
        reach = nearest(2, range(1, corrected + 1)) if self.c_pseudo else None
        return replace(rule, corrector=corrected, correct=Rule(kernel, corrected, reach=reach))

    def _corrects(self, place: Place) -> bool:
        early, late = _EARLY[self.use_corrector]
        return early if place.process.u_of_t(place.t) > 0.5 else late
