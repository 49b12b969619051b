"""The schedules of "Hyperparameters are all you need": where to stop at 4, 5, 6 or 8 steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..method import param
from ..process import ForwardProcess
from .schedule import SHIFT, SIGMA_CUT, Schedule, ratios

RECIPES: dict[int, tuple[int, float, int]] = {4: (8, 5.0, 5), 5: (8, 5.0, 6), 6: (8, 5.0, 6), 8: (12, 7.0, 9)}
"""Steps -> (m, R, k): a run ends at the sigma number k, counted from 0, of a Karras schedule of m sigmas with rho = R."""


@dataclass(frozen=True)
class RecipeSchedule(Schedule):
    """Sigmas tuned for 4, 5, 6 and 8 steps of Stable Diffusion 1.5 and SDXL, evenly spread between the start and a sigma at
    which they stop early. For DPM-Solver++ of order 1 at 4 to 6 steps, of order 2 at 7 and more.

    With N steps and u the training time from 0 to 1,

        u_i = (u_max^(1/1.2) + (i / N) (u_end^(1/1.2) - u_max^(1/1.2)))^1.2,    i = 0 .. N,

    where u_end belongs to the sigma number k of a Karras schedule of m sigmas between t_max and t_min with rho = R:
    (m, R, k) = (8, 5, 5) at N = 4, (8, 5, 6) at 5 and 6, (12, 7, 9) at 8. At any other N the run goes down to t_min.

    As published the sample is used as it is at u_end, with that little noise in it: sigma 0.42, 0.13, 0.13 and 0.15 on
    SD 1.5 at 4, 5, 6 and 8 steps, and N is the number of network calls (``end = noisy``). ``end = clean`` spends one call
    more there, so that N is the number of calls less one: 9 calls are the recipe of 8 steps and the clean sample.

    Reproduces the sigmas of the author's program on SD 1.5. On flow models, for which nothing was published, sigmas are
    read as sigma / alpha. FreeU and the trained noise network of the same program are not part of this.

    Source: Li (2025), "Hyperparameters are all you need", arXiv:2510.02390; numbers from the author's repository.
    """

    id: ClassVar[str] = "RecipeSchedule"
    title: ClassVar[str] = "Few-step recipes"
    paper: ClassVar[str] = "Li (2025), arXiv:2510.02390"

    end: str = param(
        "clean",
        "clean: the last call gives the clean sample, so 5, 6, 7 and 9 calls are the recipes. noisy: stop with a little "
        "noise left, as published, at 4, 5, 6 and 8 calls.",
        options=("clean", "noisy"),
    )
    shift: float = param(**SHIFT)
    sigma_cut: float = param(**SIGMA_CUT)

    @property
    def ends_clean(self) -> bool:
        return self.end == "clean"

    def nodes(self, process: ForwardProcess, t_max: float, t_min: float, n: int) -> np.ndarray:
        powers = process.u_of_t([t_max, self.last(process, t_max, t_min, n - 1)]).clip(0.0) ** (1 / 1.2)
        t = process.t_of_u((powers[0] + np.arange(n) / (n - 1) * (powers[1] - powers[0])) ** 1.2)
        return np.append(t_max, t[1:])

    def last(self, process: ForwardProcess, t_max: float, t_min: float, steps: int) -> float:
        """Where a run of so many steps stops."""
        if steps not in RECIPES:
            return t_min
        m, R, k = RECIPES[steps]
        high, low = (ratio ** (1 / R) for ratio in ratios(process, t_max, t_min, self.sigma_cut))
        return float(process.t_of_rho((high + k / (m - 1) * (low - high)) ** R))
