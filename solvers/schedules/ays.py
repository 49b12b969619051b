"""The schedules published with Align Your Steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..method import param
from ..process import ForwardProcess
from .schedule import SHIFT, Schedule

TABLES: dict[str, tuple[float, ...]] = {
    "SD1.5": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "SDXL": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "SVD": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
    "DeepFloyd-IF": (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
}
"""Noise levels of 10 steps, from t_max to t_min (Sabour et al. 2024, arXiv:2404.14507, table 3)."""


@dataclass(frozen=True)
class AlignYourSteps(Schedule):
    """The published schedules for SD 1.5, SDXL, SVD and DeepFloyd-IF, optimized on the models themselves for 10 steps.

    ln k at any n interpolates the table's ln k linearly in i / n; the last of the n + 1 levels is replaced by 0, as the
    authors do, so that 10 steps are the table without its last entry. Below 10 steps the interpolation is not
    optimal any more; above 30 the gain over other schedules is gone.

    The first sigma is the model's own t_max, the others are the table's; t_min is not used. On flow models, for which
    nothing was published, k is read as sigma / alpha. Raises ValueError if the model's t_max does not reach the second
    node, as with the SVD table on SD 1.5.

    Source: Sabour, Fidler, Kreis (2024), arXiv:2404.14507, table 3.
    """

    id: ClassVar[str] = "AlignYourSteps"
    title: ClassVar[str] = "Align Your Steps (published tables)"
    paper: ClassVar[str] = "Sabour et al. (2024), arXiv:2404.14507"

    table: str = param("SD1.5", "The model the schedule was optimized on.", options=tuple(TABLES))
    shift: float = param(**SHIFT)

    def nodes(self, process: ForwardProcess, t_max: float, t_min: float, n: int) -> np.ndarray:
        levels = np.log(TABLES[self.table])
        k = np.exp(np.interp(np.arange(n) / n, np.linspace(0.0, 1.0, len(levels)), levels))
        if k[1] >= process.rho(t_max)[0]:
            raise ValueError(
                f"{self.title}: the second sigma of the {self.table} table is {k[1]:.4g}, but this model's largest "
                f"sigma is {t_max:g}; choose the table of the model in use."
            )
        return np.append(t_max, process.t_of_rho(k[1:]))
