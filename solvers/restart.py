"""Restart sampling: part of the way is gone several times, with fresh noise each time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from .anew import check_given_times, check_starts_anew, remembers
from .method import param
from .process import ForwardProcess
from .renoise import renoise
from .solver import Problem, Step, Wrapper, solve

KARRAS = 7.0
"""Exponent of the sub-grids."""

PRESETS = {
    "SD, CFG 2": "1, 9, 5, 2\n5, 10, 5, 2",
    "SD, CFG 3": "0.1, 3, 10, 2",
    "SD, CFG 5 to 8": "0.1, 2, 10, 2",
    "EDM CIFAR-10": "0.06, 0.30, 3, 2",
    "EDM ImageNet-64": "19.35, 40.79, 4, 1\n1.09, 1.92, 4, 1\n0.59, 1.09, 4, 5\n0.30, 0.59, 4, 5\n0.06, 0.30, 6, 6",
}


class Segment(NamedTuple):
    """K times from t_min back up to t_max and down again over n sigmas, the two ends included."""

    t_min: float
    t_max: float
    n: int
    K: int


def segments_of(text: str, owner: str) -> list[Segment]:
    """The segments in a text of lines ``t_min, t_max, n, K``; raises ``ValueError`` naming the bad line."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            t_min, t_max, n, K = line.split(",")
            segment = Segment(float(t_min), float(t_max), int(n), int(K))
        except ValueError:
            raise ValueError(
                f"{owner}: line {number} of segments is {line.strip()!r}; write t_min, t_max, n, K, like 0.1, 2, 10, 2."
            ) from None
        if not (0.0 < segment.t_min < segment.t_max < math.inf and segment.n >= 2 and 1 <= segment.K <= 100):
            raise ValueError(
                f"{owner}: line {number} of segments is {line.strip()!r}; it needs 0 < t_min < t_max, n at least 2, "
                "and K between 1 and 100."
            )
        found.append(segment)
    return found


@dataclass(frozen=True)
class Restart(Wrapper):
    """Goes back up with fresh noise and down again, several times over part of the run, which washes out errors made
    before. Spends many calls for quality: the default adds 18 steps to those of the schedule.

    After the step that ends at t, the sigma nearest to a segment's t_min, repeat K times:

        x <- (alpha_{t_max} / alpha_t) x + S_noise sqrt(sigma_{t_max}^2 - (alpha_{t_max} / alpha_t)^2 sigma_t^2) z,
        x <- the sampler over n sigmas from t_max down to t (Karras, exponent 7),

    with a restart adding exactly the noise that is missing, so an exact sampler would keep the distribution. Segments
    count in rho = sigma / alpha, which is sigma itself but on flow models sigma / (1 - sigma). Several segments at one
    sigma run in their order. A segment is left out where it reaches above the sigma the run starts from (image to
    image) or where the nearest sigma is not below its t_max; so none ever runs at the very first sigma, or at 0.

    The sampler starts anew at every restart and after the last one: multistep samplers take a first-order step each
    time. Noise is independent for each restart, even if the sampler asks for one path, which would bring the same
    noise again. A segment adds K (n - 1) steps, each at the calls of the sampler. The n sigmas of a segment stay the
    same with more steps, and so does the error they leave. Progress and previews count the steps of the schedule.
    EDM's presets were made with rhoRK 2heun; churn within segments, a part of its settings for ImageNet, is left out.

    Raises ValueError for samplers that choose their own steps, and for lines that are no segments.

    Source: Xu et al. (2023), arXiv:2306.14878, and the authors' code, which starts from the nearest sigma too.
    """

    id: ClassVar[str] = "Restart"
    title: ClassVar[str] = "Restart sampling"
    paper: ClassVar[str] = "Xu et al. (2023), arXiv:2306.14878"

    preset: str = param(
        "SD, CFG 5 to 8",
        "Published settings by model and CFG, for 20 to 50 steps; custom takes the lines below.",
        options=(*PRESETS, "custom"),
    )
    segments: str = param(
        PRESETS["SD, CFG 5 to 8"],
        "With preset custom: one segment per line, t_min, t_max, n, K. From t_min, noise is added up to t_max, then "
        "n - 1 steps lead down again, K times. On flow models in sigma / (1 - sigma).",
        multiline=True,
    )
    S_noise: float = param(
        1.0,
        "Factor on the added noise; EDM takes 1.003 on ImageNet against lost detail.",
        min=0.0,
        max=2.0,
        step=0.001,
        advanced=True,
    )

    def __post_init__(self):
        super().__post_init__()
        check_given_times(self.solver, self.title)
        segments_of(self.lines, self.title)

    @property
    def lines(self) -> str:
        return PRESETS.get(self.preset, self.segments)

    @property
    def calls(self) -> int:
        """Of a step without a restart."""
        return self.solver.calls

    @property
    def convergence_order(self) -> int:
        return min(self.solver.convergence_order, 2) if remembers(self.solver) else self.solver.convergence_order

    @property
    def draws(self) -> str | None:
        return "gaussian" if segments_of(self.lines, self.title) else self.solver.draws

    def nfe(self, steps: int) -> int | None:
        """None where there are segments: which of them are run depends on the sigmas."""
        return None if segments_of(self.lines, self.title) else self.solver.nfe(steps)

    def start(self, times: Sequence[float]) -> tuple[tuple[float, ...], int, Any]:
        check_starts_anew(self.solver, times, self.title)
        return tuple(times), 0, self.solver.start(times)

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: Any) -> Step:
        times, i, inner = state
        step = self.solver.step(problem, x, s, t, inner)
        x, x0, inner = step.x, step.x0, step.state
        segments = self.plan(problem.process, times).get(i + 1, [])
        for segment in segments:
            down = self.way_down(problem.process, segment, t)
            for _ in range(segment.K):
                x = renoise(problem.process, x, t, down[0], problem.noise(down[0], t), self.S_noise)
                for step in solve(problem, self.solver, x, down):
                    x, x0 = step.x, step.x0
        if segments:
            inner = self.solver.start(times[i + 1 :])
        return Step(x, x0, (times, i + 1, inner))

    def plan(self, process: ForwardProcess, times: Sequence[float]) -> dict[int, list[Segment]]:
        """By the index of the sigma they start from, the segments that a run over ``times`` makes."""
        rho = [math.exp(-process.lam(t)) for t in times]
        plan = defaultdict(list)
        for segment in segments_of(self.lines, self.title):
            nearest = min(range(len(rho)), key=lambda i: abs(rho[i] - segment.t_min))
            if nearest > 0 and 0.0 < rho[nearest] < segment.t_max <= rho[0]:
                plan[nearest].append(segment)
        return plan

    def way_down(self, process: ForwardProcess, segment: Segment, t: float) -> list[float]:
        """The n sigmas of a segment, from t_max down to t."""
        high, low = segment.t_max ** (1 / KARRAS), math.exp(-process.lam(t)) ** (1 / KARRAS)
        inner = [(high + (low - high) * j / (segment.n - 1)) ** KARRAS for j in range(segment.n - 1)]
        return [*(float(process.t_of_rho(rho)) for rho in inner), t]
