"""DeepCache: the deep part of a UNet changes slowly, so compute it only now and then.

Ma, Fang, Wang (2023), arXiv:2312.00858. A UNet with n input and n output blocks joins input block i to output block
n - 1 - i. With branch depth d, write

    h_first = what enters output block ``first = n - 1 - d`` along the main path.

A full call computes everything and keeps h_first. A partial call computes input blocks 0 ... d, takes the kept h_first
and computes output blocks first ... n - 1: the outer ring, where the fine detail is, is always fresh.

The paper takes h_first as it was. Here the last full calls may be carried on: with g = 1/2, or g = 1 for ``forecast_order`` 1,

    h_first(lambda) = h_k + g (lambda - lambda_k) / (lambda_k - lambda_{k-1}) (h_k - h_{k-1}),   lambda half the log-SNR.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch

from ..method import param
from .accelerator import Accelerator, Plan, Run, Session
from .declared import CACHE_DEVICE, CACHE_MB, place, room
from .forecast import Weights, damped, lagrange, reuse
from .store import BranchStore
from .tracker import Position


def uniform(steps: int, interval: int) -> list[int]:
    """Full steps 0, N, 2N, ..."""
    return list(range(0, steps, interval))


def nonuniform(steps: int, interval: int, center: float, power: float) -> list[int]:
    """As many full steps as ``uniform``, denser around ``center``.

    Equally spaced in u = sign(i - c) |i - c|^{1/p} between u(0) and u(steps), the end excluded, and rounded down. Where
    two fall together, the widest gaps are halved instead.
    """
    wanted = math.ceil(steps / interval)
    ends = np.array([0.0, steps]) - center
    low, high = np.sign(ends) * np.abs(ends) ** (1 / power)
    u = np.linspace(low, high, wanted + 1)[:-1]
    places = np.floor(center + np.sign(u) * np.abs(u) ** power + 1e-9).astype(int).tolist()
    full = sorted({0, *(i for i in places if 0 <= i < steps)})
    while len(full) < wanted:
        left, right = max(pairwise([*full, steps]), key=lambda gap: gap[1] - gap[0])
        full = sorted({*full, (left + right) // 2})
    return full


def paper(steps: int, interval: int, center: int, power: float) -> list[int]:
    """The full steps that the authors' program uses; with ``warmup`` 0, to reproduce published numbers.

    It takes the same spacing, but the p-th root of the negative end is the principal complex one, and of the complex
    positions only the real part is kept. Where that gives too few steps, p is lowered by 0.02 until it fits.

    Raises ``ValueError`` where no p >= 1 fits.
    """
    wanted = math.ceil(steps / interval)
    p = power
    while p >= 1.0:
        low, high = np.array([-center, steps - center], dtype=complex) ** (1 / p)
        offsets = np.unique(np.trunc((np.linspace(low, high, wanted + 1) ** p).real).astype(int))
        full = sorted({0, *(int(i) + center for i in offsets[1:-1])})
        if len(full) == wanted:
            return full
        p -= 0.02
    raise ValueError(
        f"DeepCache: the paper's schedule has no solution for {steps} steps with interval {interval} around step "
        f"{center}; choose schedule 'nonuniform', which always has one."
    )


@dataclass(frozen=True)
class DeepCache(Accelerator):
    """Computes the deep part of a UNet only every few calls and reuses it in between.

    For SD 1.x, SD 2.x, SDXL and other UNets. The outer blocks are computed in every call, with fresh time embedding,
    prompt, ControlNet residuals and patches; the inner ones only in full calls. Works with every sampler and guider;
    the sampler is not told. A call of cost f instead of 1 in all but every N-th gives a speedup of N / (1 + (N - 1) f);
    at 512 x 512 SD 1.5 has f = 0.08, 0.22, 0.38 at depth 0, 1, 2, SDXL at 1024 x 1024 0.015, 0.04, 0.07.

    ``interval`` 1 gives exactly the unaccelerated result. A solver that calls the network several times per step (Heun,
    DPM-Solver-2) has its calls counted, not its steps: one call in ``interval`` is full. With few steps
    there is little to reuse: of eight, the defaults leave four partial. When noise is added in the middle of a run (restarts,
    churn), the next call is full.

    ``depth`` counts the input blocks that stay fresh, besides the first. 0 is what diffusers calls
    ``cache_branch_id=0``; the paper's Stable Diffusion tables use 1.

    ``forecast_order`` 0 is the paper's reuse. On this pack's demo UNet (25 steps, Karras, interval 3) the median relative
    error against the uncached picture was, for reuse / auto / 1: at depth 0 0.051 / 0.016 / 0.063 with Euler and 0.053 /
    0.029 / 0.063 with dpmpp_2m, at depth 2 0.018 / 0.009 / 0.010 and 0.018 / 0.006 / 0.010: the whole line overshoots.
    A forecast keeps twice the memory.

    Fewer steps are the other way to the same work. There, 12 plain steps had 0.033 with Euler and 0.019 with dpmpp_2m
    (depth 0 is worth 12.6), 18 had 0.009 and 0.006 (depth 2 is worth 18.3): better only for Euler at depth 0. The
    demo network's f is 0.17, 0.43, 0.55; the smaller it is, the better DeepCache compares.
    """

    id: ClassVar[str] = "DeepCache"
    title: ClassVar[str] = "DeepCache"
    paper: ClassVar[str] = "Ma, Fang, Wang (2023), arXiv:2312.00858"
    site: ClassVar[str] = "unet"

    interval: int = param(3, "One call of the network in this many is full; 1 switches the cache off.", min=1, max=20)
    depth: int = param(
        -1,
        "Input blocks that stay fresh, besides the first: more is slower and closer to the full result. "
        "-1 chooses: 1 where the outermost blocks have attention (SD 1.x, 2.x), else 2 (SDXL).",
        min=-1,
        max=30,
    )
    schedule: str = param(
        "uniform",
        "How full calls are spread: evenly; denser around the center; or as in the authors' program (with warmup 0).",
        options=("uniform", "nonuniform", "paper"),
    )
    center: float = param(
        0.3,
        "Where full calls are densest, as a fraction of the steps. Not for uniform.",
        min=0.0,
        max=1.0,
        step=0.01,
        advanced=True,
    )
    power: float = param(
        1.4,
        "How much denser they are there; 1 is even. Not for uniform.",
        min=1.0,
        max=5.0,
        step=0.05,
        advanced=True,
    )
    start_percent: float = param(
        0.0, "Before this fraction of sampling every call is full.", min=0.0, max=1.0, step=0.01, advanced=True
    )
    end_percent: float = param(
        1.0, "After this fraction of sampling every call is full.", min=0.0, max=1.0, step=0.01, advanced=True
    )
    warmup: int = param(
        3,
        "The first calls of a run that are full in any case; the schedule goes on from the last of them.",
        min=0,
        max=100,
        advanced=True,
    )
    max_cache_mb: int = CACHE_MB()
    cache_device: str = CACHE_DEVICE()
    forecast_order: str = param(
        "auto",
        "How the deep part is carried on between full calls: 0 as it was, 1 along the line through the last two, 2 along "
        "a parabola. auto: half way along the line, or as it was where the sampler adds noise.",
        options=("auto", "0", "1", "2"),
        advanced=True,
    )

    @property
    def percents(self) -> tuple[float, float]:
        return self.start_percent, self.end_percent

    def full_steps(self, steps: int) -> list[int]:
        """Which of the steps are full for a solver of one call per step, warm-up aside."""
        if steps == 0 or self.interval == 1 or self.schedule == "uniform":
            return uniform(steps, self.interval)
        if self.schedule == "nonuniform":
            return nonuniform(steps, self.interval, self.center * steps, self.power)
        return paper(steps, self.interval, round(self.center * steps), self.power)

    def branch_depth(self, blocks: int, attentive: bool) -> int:
        """The depth for a UNet with this many output blocks, whose outermost resolution has attention or not."""
        if self.depth < 0:
            return min(1 if attentive else 2, blocks - 2)
        if self.depth > blocks - 2:
            raise ValueError(
                f"DeepCache: depth = {self.depth}, but this UNet has {blocks} output blocks: depth must lie between 0 "
                f"and {blocks - 2}, or be -1 to choose by itself."
            )
        return self.depth

    def forecast(self, run: Run) -> tuple[int, Weights]:
        """How many full calls before the last one a forecast looks back, and what it makes of them."""
        if self.forecast_order != "auto":
            return int(self.forecast_order), lagrange(int(self.forecast_order))
        return (0, reuse) if run.stochastic else (1, damped(lagrange(1), 0.5))

    def start(self, run: Run) -> DeepCacheSession:
        return DeepCacheSession(self, run)


class DeepCacheSession(Session):
    """Counts the calls since the last full one.

    A schedule of full steps p_0 < p_1 < ... is read as its gaps: after a full call in step i, p_k <= i < p_{k+1}, the
    next ``p_{k+1} - p_k - 1`` calls are partial. With one call per step and no warm-up these are the scheduled steps
    exactly; with several, one call in as many is full, and nothing that is reused is older than in the schedule.
    """

    def __init__(self, settings: DeepCache, run: Run):
        super().__init__(run)
        self.settings = settings
        self.order, self.weights = settings.forecast(run)
        self.store = BranchStore(self.order + 1, room(settings.max_cache_mb), place(settings.cache_device))
        steps = self.tracker.steps
        self.gaps = [b - a for a, b in pairwise([*settings.full_steps(steps), steps]) for _ in range(b - a)]
        self.idle = max(self.gaps, default=1) == 1
        self.left = 0
        self.since = -math.inf
        """The coordinate of the last full call: what is older belongs to a branch that had no part in it."""

    def decide(self, t: float, position: Position) -> Plan:
        if self.idle or not self.active(t):
            self.flush()
            return Plan.PLAIN
        warming = position.call < self.settings.warmup
        if self.left > 0 and not warming:
            self.left -= 1
            return Plan.PARTIAL
        self.left = 0
        if position.call < self.settings.warmup - self.store.anchors:
            return Plan.PLAIN
        # A value of the full call before is still of use to a forecast, but only if this call has one to add to it.
        self.store.forget(self.since if self.order else math.inf)
        self.since = self.run.coordinate(t)
        self.left = self.gaps[position.step] - 1
        return Plan.FULL if self.left > 0 or self.order else Plan.PLAIN

    def keep(self, branches: Sequence[Hashable], h: torch.Tensor) -> None:
        """Keep ``h_first`` of this call."""
        self.store.put(branches, h, self.run.coordinate(self.t))

    def kept(self, branches: Sequence[Hashable], device: torch.device | None = None) -> torch.Tensor | None:
        """``h_first`` as it should be in this call; None unless the last full call, or one since, had every branch."""
        if not self.store.has(branches, since=self.since):
            return None
        return self.store.forecast(branches, self.run.coordinate(self.t), self.weights, device)

    def flush(self) -> None:
        self.left, self.since = 0, -math.inf
        super().flush()
