"""Align Your Steps, computed on the user's own model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ..method import param
from ..process import ForwardProcess
from ..schedules import KarrasSchedule
from .cohort import Cohort
from .curve import Curve
from .klub import chains, descend, table, triples
from .paths import cheapest, packed, unpacked
from .proposal import Measured, Measuring, Proposal, rounded
from .teacher import Trajectories

FIRST, LAST, REFINING = 10, 40, 2
"""Steps optimized from the start; steps up to which levels are doubled; sweeps of the new ones each time."""


@dataclass(frozen=True)
class AlignYourStepsOnModel(Proposal):
    """Align Your Steps on your own model: the sigmas with which a bound on the divergence between few steps and the true reverse
    process is least. On the demo networks it found nothing better than a usual schedule. One measurement gives every number of
    steps.

        KLUB(k_0 > ... > k_n) = sum_i int_{k_{i+1}}^{k_i} t^-3 E || D(x_t, t) - D(x_{k_i}, k_i) ||^2 dt,     k = sigma / alpha,

    the expectation being over noisings of clean samples, which are the model's own, of the prompts given. The last level is
    replaced by 0, as the authors do.

    ``table``: D is evaluated at ``levels`` noise levels of the same noisings, which gives the bound for all pairs of levels,
    and dynamic programming the best n of them for every n. ``levels`` x ``draws`` network calls per sample.

    ``sampled``: the paper's way. Coordinate descent with 11 places for each sigma, the bound estimated by importance sampling;
    above 10 steps first 10, and then twice as many with only the new ones moving, up to 40; other numbers are interpolated.
    Every sweep is tried, and three without gain end it. About 22 x ``steps`` x ``draws`` calls per sample and sweep: a
    hundred times the table's. It serves no fewer steps than it was measured with.

    The bound is not the error of the finished sample: carried to its minimum it crowds the sigmas. So its proposal is tried, and
    others on the way to it from the best usual schedule, and the finished samples decide. The paper stops early by looking at
    pictures. Mean error of 400 other samples of a mixture of Gaussians, best of Karras and exponential -> kept, at 5 and 10
    steps: Euler .212 -> .212, .087 -> .087; DPM-Solver++ 2M .187 -> .160, .020 -> .020. As proposed: 2M .372, .205. Demo networks
    at 8 steps of 2M, CFG 4, where 8 samples measured, twice each, 8 chose and 8 others reported, from the best usual schedule:
    DiT .077 -> .077 (nothing better), UNet .113 -> .113.

    Source: Sabour, Fidler, Kreis (2024), arXiv:2404.14507, section 3 and algorithms 1, 2, with the factor Z that is missing there.
    """

    id: ClassVar[str] = "AlignYourStepsOnModel"
    title: ClassVar[str] = "Align Your Steps, on your model"
    paper: ClassVar[str] = "Sabour et al. (2024), arXiv:2404.14507"

    mode: str = param(
        "table",
        "table: few calls, and all numbers of steps. sampled: the paper's descent, a hundred times as many calls.",
        options=("table", "sampled"),
    )
    draws: int = param(
        4, "Noisings of each sample. More make the measurement less noisy, at as many calls.", min=1, max=256
    )
    levels: int = param(40, "Mode table: noise levels to choose from, each a network call.", min=12, max=200)
    sweeps: int = param(4, "Mode sampled: how often all sigmas are moved. Too many crowd them.", min=1, max=50)
    c: float = param(
        0.0,
        "Mode sampled: spread of the clean latents, about which the estimator is best; 0 measures it.",
        min=0.0,
        max=100.0,
        step=0.01,
        advanced=True,
    )

    @property
    def most(self) -> int:
        return self.levels - 1 if self.mode == "table" else 1000

    def measure(self, cohort: Cohort, process: ForwardProcess, teacher: Trajectories | None, steps: int) -> Measuring:
        high, low = Curve(process, process.t_max, process.t_min, steps).ends
        if self.mode == "sampled":
            yield from self._descent(cohort, process, steps)
            return
        y = np.linspace(low, high, self.levels)
        squares = yield from chains(cohort, process, np.exp(y).tolist(), self.draws)
        falling = table(np.exp(y).tolist(), squares)[::-1, ::-1].T
        yield {"log_ratio": rounded(y[::-1]), "cost": packed(falling)}

    def _descent(self, cohort: Cohort, process: ForwardProcess, steps: int) -> Iterator[Measured | None]:
        c = self.c or max(float(torch.cat(cohort.targets).std()), 0.01)
        n = least = min(steps, FIRST)
        y = np.log(process.rho(KarrasSchedule()(process, process.t_max, process.t_min, n + 1)[:-1]))
        y[0] = Curve(process, process.t_max, process.t_min, n).ends[0]
        sweeps, only = self.sweeps, None
        while True:
            run = descend(y, lambda a, m, b: triples(cohort, process, a, m, b, c, self.draws), only)
            for moved in run:
                if moved is None:
                    yield None
                    continue
                y, sweeps = moved, sweeps - 1
                yield {"least": least, "log_ratio": y.tolist()}
                if sweeps == 0:
                    break
            if n >= min(steps, LAST):
                return
            y = np.interp(np.arange(2 * n + 1) / 2.0, np.arange(n + 1), y)
            n, sweeps, only = 2 * n, REFINING, range(1, 2 * n, 2)

    def times(self, measured: Measured, process: ForwardProcess, steps: int, order: int) -> list[float]:
        y = np.array(measured["log_ratio"])
        if "cost" in measured:
            levels = y[cheapest(unpacked(measured["cost"], len(y)), steps)]
        elif steps < measured["least"]:
            raise ValueError(f"{self.title}: it was measured for {measured['least']} steps or more, not for {steps}.")
        else:
            levels = np.interp(np.linspace(0.0, len(y) - 1.0, steps + 1), np.arange(len(y)), y)
        return Curve(process, process.t_max, process.t_min, steps).times(levels[1:-1])
