"""EasyCache as in its paper: repeat the last direction while the output should not have changed much."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method import param
from .accelerator import Run
from .declared import END, START, TAIL, WARMUP
from .derivative import WholeCalls, mean_abs
from .gated import GatedSession, Newest


@dataclass(frozen=True)
class EasyCachePaper(WholeCalls):
    """EasyCache by its paper's rule, without the faults of ComfyUI's node: the last direction is repeated while it holds.

    Take Step Forecast instead where you can choose: it places the calls better and forecasts. With v the guided output of the
    network and x the state, of full calls a, b and of consecutive calls t - 1, t,

        k = |v_b - v_a| / |x_b - x_a|,     E = sum of k |x_t - x_{t-1}| / |v_b| since the full call b,     |.| mean absolute,

    and calls are left out while E < tau. What is repeated is d = (x - D) / sigma (derivative), which with Euler is the same as
    longer steps, or as in the paper the difference between output and input of the network (difference), which is worse:
    it adds the drift of x to the direction.

    ComfyUI's EasyCache keeps x_{t-1} from the last full call, so its sum grows with the square of the distance and its thresholds
    (0.2) mean less than the paper's (0.05); it spoils float32 flow models (it writes into the sampler's x), mixes up the passes of
    PAG and SLG and areas, skips everything after a change of size, counts the stages of Heun as steps, and does nothing on
    networks without its hook (SD3 and others). Here the guided prediction as a whole is kept, so none of this can happen.

    Reads three numbers back from the device per call. The same limits as Step Forecast. ``tau`` 0 is exactly the
    unaccelerated result. The authors compute 10 of 50 steps first; ``warmup`` is that.

    Source: Zhou et al. (2025), arXiv:2507.02860; k and E as in the authors' program for Wan 2.1.
    """

    id: ClassVar[str] = "EasyCachePaper"
    title: ClassVar[str] = "EasyCache as Published"
    paper: ClassVar[str] = "Zhou et al. (2025), arXiv:2507.02860"

    tau: float = param(0.05, "How much the output may be expected to have changed before it is computed; more is faster.",
                       min=0.0, max=3.0, step=0.01)  # fmt: skip
    repeat: str = param(
        "derivative", "What is repeated: the direction, or the network's output minus its input as in the paper.",
        options=("derivative", "difference"), advanced=True,
    )  # fmt: skip
    start_percent: float = START()
    end_percent: float = END()
    warmup: int = WARMUP(5)
    tail: int = TAIL()

    @property
    def percents(self) -> tuple[float, float]:
        return self.start_percent, self.end_percent

    def start(self, run: Run) -> EasyCacheSession:
        return EasyCacheSession(self, run)


class EasyCacheSession(GatedSession):
    def __init__(self, settings: EasyCachePaper, run: Run):
        super().__init__(run, 1, settings.warmup, settings.tail, most=len(run.times))
        self.settings = settings
        self.before, self.computed = Newest(1), Newest(1)
        self.flush()

    def watch(self, x: torch.Tensor, t: float) -> bool:
        before = self.before.fit(x)
        if before and self.k is not None:
            newest = self.store.get(self.key(x), x.device)
            change, size = mean_abs(x - before[0], x if newest is None else newest)
            self.change += self.k * change / size if size > 0.0 else math.nan
        self.before.add(x)
        return self.k is not None and self.change < self.settings.tau

    def guess(self, x: torch.Tensor, t: float) -> torch.Tensor:
        d = self.store.get(self.key(x), x.device)
        if self.settings.repeat == "difference":
            d = d + self.scale(t) * x - self.scale(self.latest) * self.computed.kept[0]
        return self.denoised(x, t, d)

    def scale(self, t: float) -> float:
        """The network sees x / sqrt(1 + sigma^2) where noise is added to the picture, x itself where it replaces it."""
        added = self.run.process is None or self.run.process.alpha(1.0) > 0.0
        return 1.0 / math.hypot(1.0, t) if added else 1.0

    def learn(self, x: torch.Tensor, t: float, x0: torch.Tensor) -> None:
        d, then, start = self.value(x, t, x0), self.store.get(self.key(x), x.device), self.computed.fit(x)
        if then is not None and start:
            output, way = mean_abs(d - then, x - start[0])
            self.k = output / way if way > 0.0 else math.nan
        self.computed.add(x)
        self.change = 0.0
        super().learn(x, t, x0)

    def flush(self) -> None:
        super().flush()
        self.before.clear()
        self.computed.clear()
        self.k: float | None = None
        self.change = 0.0
