"""AdaptiveDiffusion: repeat the noise prediction while the state moves evenly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method import param
from .accelerator import Run
from .declared import END, START, TAIL, WARMUP
from .derivative import WholeCalls, mean_abs
from .gated import GatedSession, Newest


@dataclass(frozen=True)
class AdaptiveDiffusion(WholeCalls):
    """Repeats the last direction while the sampler's state moves evenly, judged by the state alone.

    For comparison with its paper; Step Forecast places calls better. With D_i = mean |x_i - x_{i-1}| of consecutive calls, a
    call is left out if the third difference of the state is small,

        |(D_i + D_{i-2}) / 2 - D_{i-1}| <= threshold D_{i-1},

    but never more than ``max_skip`` in a row. Where noise is added to the picture (SD, SDXL) the state shrinks with sigma whatever
    the picture does, so there this says more about the schedule than about the network: an uneven one (Karras) is never left.

    Reads one number back per call. The same limits as Step Forecast. ``threshold`` 0 is exactly the unaccelerated
    result, unless the state moves perfectly evenly.

    Source: Ye et al. (2024), arXiv:2410.09873; the rule as in the authors' program (threshold 0.01, 4 in a row; the first
    calls are full).
    """

    id: ClassVar[str] = "AdaptiveDiffusion"
    title: ClassVar[str] = "AdaptiveDiffusion"
    paper: ClassVar[str] = "Ye et al. (2024), arXiv:2410.09873"

    threshold: float = param(0.01, "How unevenly the state may move where calls are left out; more is faster.",
                             min=0.0, max=1.0, step=0.001)  # fmt: skip
    max_skip: int = param(4, "The most calls left out in a row.", min=1, max=20)
    start_percent: float = START()
    end_percent: float = END()
    warmup: int = WARMUP()
    tail: int = TAIL()

    @property
    def percents(self) -> tuple[float, float]:
        return self.start_percent, self.end_percent

    def start(self, run: Run) -> AdaptiveDiffusionSession:
        return AdaptiveDiffusionSession(self, run)


class AdaptiveDiffusionSession(GatedSession):
    def __init__(self, settings: AdaptiveDiffusion, run: Run):
        super().__init__(run, 1, settings.warmup, settings.tail, settings.max_skip)
        self.threshold = settings.threshold
        self.before = Newest(1)
        self.moves: list[float] = []

    def watch(self, x: torch.Tensor, t: float) -> bool:
        before = self.before.fit(x)
        if before:
            self.moves = [*self.moves, *mean_abs(x - before[0])][-3:]
        else:
            self.moves = []
        self.before.add(x)
        if len(self.moves) < 3:
            return False
        older, old, new = self.moves
        return abs((new + older) / 2 - old) <= old * self.threshold and self.threshold > 0.0

    def guess(self, x: torch.Tensor, t: float) -> torch.Tensor:
        return self.denoised(x, t, self.store.get(self.key(x), x.device))

    def flush(self) -> None:
        super().flush()
        self.before.clear()
        self.moves = []
