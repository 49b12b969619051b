"""UniPC: the exponential multistep method with a corrector that costs no further network call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .declared import FRAME, LOWER_ORDER_FINAL
from .kernel import Data, Kernel, Noise
from .method import param
from .multistep import Bend, Multistep, Place, Rule
from .weights import phi


def shortcut(M: list[Any], z: float) -> list[Any]:
    """With two points, M_1 = M_0 / (2 phi_1(z)) instead of the integral; more points are left as they are.

    The moments of a kernel H e^{z (1 - u)} begin with M_0 = H phi_1(z), M_1 = H phi_2(z). At z = 0 the shortcut is M_0 / 2,
    at the kernel's own z it is H / 2. All three agree up to H^2, so the order stays.
    """
    return [M[0], M[0] / (2.0 * phi(1, z))] if len(M) == 2 else M


@dataclass(frozen=True)
class UniPC(Multistep):
    """Predictor-corrector with one network call per step: as DPM-Solver++, and each step is corrected once its end is known.

    One order more than DPM-Solver++ at the same cost, good from 6 to 15 steps. With much guidance (CFG above 5) the
    correction can amplify errors in the first steps: ``from_step`` 1 or 2 leaves these alone.

    predict   x_t = (sigma_t / sigma_s) x_s + alpha_t sum_j w_j D_j,  sum_j w_j u_j^m = M_m,  M_m = h m! phi_{m+1}(-h),
    correct   the same with one more point, D at the predicted x_t (u = 1), which is the call the next step needs anyway,

    over the newest ``order`` predictions D_j at u_j = (lambda_j - lambda_s) / h. The history keeps the prediction made at the
    predicted point. "noise" integrates eps instead: x_t = (alpha_t / alpha_s) x_s - sigma_t sum_j w_j eps_j with h for -h.
    The last step is never corrected, as there is no call after it.

    The paper's B(h) cancels out of every weight that is solved for; it is left only where a weight is set to 1/2 by hand,
    which is wherever two points are used (predictor of order 2, corrector of order 1). There bh1 takes M_1 = h / 2 and bh2
    M_1 = M_0 / 2. "exact" takes the integral; this is the paper's "vary" in full, whose published code has a slip (its
    corrector drops terms and is first order). From order 3 on the three differ only in the steps that have fewer points.

    Order p without and p + 1 with corrector; asymptotically 2 where the last steps are of lower order, and at most 3 where
    the first steps are (one first-order step, corrected).

    Source: Zhao et al. (2023), arXiv:2302.04867, section 3; the halves and which prediction is kept as in the authors' code
    (wl-zhao/UniPC).
    """

    id: ClassVar[str] = "UniPC"
    title: ClassVar[str] = "UniPC"
    paper: ClassVar[str] = "Zhao et al. (2023), arXiv:2302.04867"

    order: int = param(
        2,
        "Predictions used per step: 2 with guidance, 3 without. More only for many steps and no guidance.",
        min=1,
        max=5,
    )
    variant: str = param(
        "bh2",
        "How steps with two points are weighted: bh2 (usual), bh1 (for unguided runs below 10 steps) or exact. At order 3 and "
        "more it matters in the first and last steps only.",
        options=("bh1", "bh2", "exact"),
    )
    corrector: bool = param(True, "Correct each step once its end has been evaluated. Off: the predictor alone, UniP.")
    from_step: int = param(
        0, "Leave this many first steps uncorrected: try 1 or 2 at high guidance.", min=0, max=1000, advanced=True
    )
    algorithm: str = param(
        "data",
        "What is integrated: data (usual) or noise, which can be more exact with little guidance and breaks down with much.",
        options=("data", "noise"),
        advanced=True,
    )
    lower_order_final: str = param(**LOWER_ORDER_FINAL)
    frame: str = param(**FRAME)

    draws: ClassVar[None] = None

    @property
    def convergence_order(self) -> int:
        return self.order + 1 if self.corrector else self.order

    @property
    def span(self) -> int:
        return self.order

    @property
    def in_frame(self) -> str:
        auto = "vef" if self.algorithm == "noise" else "snr"  # towards pure noise eps / alpha has no bound
        return auto if self.frame == "auto" else self.frame

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return (Data() if self.algorithm == "data" else Noise("lambda"),)

    def rule(self, place: Place) -> Rule:
        points = place.points(self.order, self.lower_order_final)
        corrected = self.corrector and place.i >= self.from_step
        return Rule(self.kernels[0], points, corrector=points + 1 if corrected else 0, bend=self._bend())

    def _bend(self) -> Bend | None:
        if self.variant == "exact":
            return None
        own = 0.0 if self.variant == "bh2" else -1.0 if self.algorithm == "data" else 1.0
        return lambda M, h: shortcut(M, own * h)
