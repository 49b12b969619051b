"""LinearAG: the unconditional prediction as a linear combination of past ones, with coefficients fitted once."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from ..artifact import Artifact
from ..method import part
from .accelerator import Accelerator, Plan, Run
from .declared import END, START
from .guiding import Guiding, column, direction
from .linear_ag_fit import Coefficients
from .store import BranchStore
from .tracker import Position

KIND = "linear_ag"
"""Of artifacts: their table has ``times``, the schedule they are for (empty: any with as many steps), and ``steps``, for
each step None where both sides are computed, or ``{"c": [...], "u": [...]}``, the coefficients, newest last."""


@dataclass(frozen=True)
class LinearAG(Accelerator):
    """Leaves the negative side out in most steps and computes it from the past by coefficients fitted for one model.

    Calibrate it first with Calibrate LinearAG, on the model, sampler, sigmas and guidance scale it is for: a few runs
    with full guidance. With d = (x - D) / t, the fit finds for every step n that is left out

        d_u(n) = sum_i beta_i d_c(i) + sum_j alpha_j d_u(j),

    i over step n itself and the ones before, j over the steps whose d_u was computed; one number each, the same for all
    pictures. The fit is by least squares, pulled a little towards reuse of the last difference. The paper fits on all
    past steps and also on its own predictions; here only on the last few and on what the network said, which is what a
    run knows for sure.

    Measured on our small DiT, 24 steps, 0.75 of the work, calibrated on 8 pictures, the distance to full guidance
    (median of 4) is 0.017 to 0.057, where Guidance Cache, which needs no calibration, has 0.008 to 0.034. The fit is
    better than reuse on runs kept aside (by a tenth to a fifth, with one step in four computed by half), but a line in
    log-SNR is better still.

    Without a calibration, on another schedule, or with a sampler that calls the network several times per step, it
    does nothing and says so. A calibration for another model or guidance scale is used, with a warning.

    Source: Castillo et al. (2023), arXiv:2312.12487; the regressors and the ridge are ours.
    """

    id: ClassVar[str] = "LinearAG"
    title: ClassVar[str] = "LinearAG"
    paper: ClassVar[str] = "Castillo et al. (2023), arXiv:2312.12487"
    site: ClassVar[str] = "guidance"

    calibration: Artifact | None = part(  # noqa: RUF009
        KIND, "A file of Calibrate LinearAG, in models/quickstep, for this model and schedule; none: off.", None
    )
    start_percent: float = START()
    end_percent: float = END()

    def __post_init__(self):
        super().__post_init__()
        if self.calibration is not None:
            if self.calibration.kind != KIND:
                raise ValueError(f"LinearAG: the file holds {self.calibration.kind}, but {KIND} is needed here.")
            _checked(self.calibration.table)

    @property
    def percents(self) -> tuple[float, float]:
        return self.start_percent, self.end_percent

    def off(self, run: Run) -> str | None:
        if self.calibration is None:
            return "it has no calibration; make one with Calibrate LinearAG"
        times, steps = self.calibration.table["times"], self.calibration.table["steps"]
        if run.steps != len(steps):
            return f"it was calibrated for {len(steps)} steps, and this run has {run.steps}"
        if times and not np.allclose(times, run.times, rtol=1e-2, atol=1e-4):
            return "it was calibrated for other sigmas"
        return super().off(run)

    def note(self, run: Run) -> str | None:
        assert self.calibration is not None
        then = self.calibration.found_for
        other = [
            f"{what} {was:g}" if isinstance(was, float) else f"{what} {was}"
            for what, was, now in (("CFG", then.cfg, run.cfg), ("the sampler", then.solver, run.sampler))
            if None not in (was, now) and was != now
        ]
        return f"LinearAG was calibrated for {' and '.join(other)}" if other else None

    def start(self, run: Run) -> LinearAGSession:
        assert self.calibration is not None
        return LinearAGSession(self.calibration.table["steps"], run)


class LinearAGSession(Guiding):
    """Keeps d_c of every step and d_u of the computed ones, as many as the coefficients ask for."""

    def __init__(self, steps: Coefficients, run: Run):
        super().__init__(run, LinearAG.title)
        self.steps = steps
        longest = max((len(made[side]) for made in steps if made for side in ("c", "u")), default=1)
        self.store = BranchStore(anchors=longest)
        self.n = 0

    def decide(self, t: float, position: Position) -> Plan:
        self.n = position.step
        if not self.active(t) or not position.on_grid or position.call != position.step:
            self.flush()
            return Plan.PLAIN
        return Plan.FULL if self.steps[self.n] is None else Plan.PARTIAL

    def ready(self, key: Hashable) -> bool:
        made = self.steps[self.n]
        if made is None:
            return False
        # The newest d_c is that of this call. A gap in what is kept would shift the coefficients.
        c, u = self.store.coordinates((key, "c")), self.store.coordinates((key, "u"))
        wanted = [float(m) for m in range(self.n) if self.steps[m] is None][-len(made["u"]) :]
        return c[len(c) + 1 - len(made["c"]) :] == [float(m) for m in range(self.n + 1 - len(made["c"]), self.n)] and (
            u[-len(made["u"]) :] == wanted
        )

    def learn(self, key: Hashable, x: torch.Tensor, t: torch.Tensor, D_c: torch.Tensor, D_u: torch.Tensor) -> None:
        self.store.put([(key, "c")], direction(x, t, D_c), float(self.n))
        self.store.put([(key, "u")], direction(x, t, D_u), float(self.n))

    def answer(self, key: Hashable, x: torch.Tensor, t: torch.Tensor, D_c: torch.Tensor) -> torch.Tensor:
        made = self.steps[self.n]
        assert made is not None, "ready() comes first"
        self.store.put([(key, "c")], direction(x, t, D_c), float(self.n))
        d_u = sum(self._combined((key, side), made[side]) for side in ("c", "u"))
        t = column(t, D_c)
        return (x.to(t.dtype) - t * d_u).to(D_c.dtype)

    def _combined(self, key: Hashable, newest: list[float]) -> Any:
        return self.store.forecast([key], self.n, lambda at, nodes: [0.0] * (len(nodes) - len(newest)) + newest)


def _checked(table: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless the table is one of ``KIND``."""
    steps, times = table.get("steps"), table.get("times")

    def numbers(values: Any) -> bool:
        return isinstance(values, list) and all(isinstance(v, int | float) and math.isfinite(v) for v in values)

    good = isinstance(steps, list) and numbers(times) and len(times) in (0, len(steps) + 1)
    for n, made in enumerate(steps if good else []):
        good = good and (made is None or (isinstance(made, dict) and all(numbers(made.get(k)) for k in ("c", "u"))))
        good = good and (made is None or (0 < len(made["c"]) <= n + 1 and len(made["u"]) > 0))
    if not good:
        raise ValueError(
            "LinearAG: the calibration's table is damaged: its times or coefficients are no lists of numbers."
        )
