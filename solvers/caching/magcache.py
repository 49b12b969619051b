"""MagCache: skip by how fast the size of what the blocks add changes, known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..artifact import Artifact
from ..method import param, part
from .accelerator import Plan, Run
from .block_cache import BlockCache, BlockSession
from .declared import CACHE_DEVICE, CACHE_MB, END, START, TAIL, WARMUP
from .profile import KIND, BlockProfile
from .tracker import Position


@dataclass(frozen=True)
class MagCache(BlockCache):
    """Skips all transformer blocks where a calibration says that they change little.

    For DiTs, with a file of Calibrate Block Caches for this model. Decides before the network is called and never looks at it.

    The size of the residual R = h_n - h_0 shrinks along sampling, much the same for every prompt. Calibration keeps
    G(lambda), the logarithm of that size in half log-SNR, so that steps, schedule and sampler may be others than in the
    calibration. With lambda* of the last full call, a call at lambda would use R with

        g = exp(G(lambda) - G(lambda*)),    E <- E + |1 - g|;

    it hits while E < threshold and no more than ``K`` calls in a row did, with h_n = h_0 + g R (the paper has g = 1 here);
    else everything is computed and E = 0. The paper takes the mean of the ratios of the tokens' sizes, this the ratio of R's.

    Size says nothing about direction. On the demo DiT (30 steps, CFG 4) at 0.5 of the work it is 0.025 off the full run,
    where 15 plain steps are 0.057 (Euler) and 0.037 (DPM-Solver++ 2M) off; at 0.4 it is 0.055 off with DPM-Solver++ 2M, which
    12 plain steps are as well. TaylorSeer and TeaCache are closer at the same work.

    Works with every sampler but adaptive ones, ControlNet, LoRA, areas and context windows. Not with torch.compile, nor with
    other caches of blocks or layers.

    Raises ValueError for another model's file. Other steps or another guidance scale than calibrated are said in the report.

    Source: Ma et al. (2025), arXiv:2506.09045.
    """

    id: ClassVar[str] = "MagCache"
    title: ClassVar[str] = "MagCache"
    paper: ClassVar[str] = "Ma et al. (2025), arXiv:2506.09045"

    calibration: Artifact | None = part(  # noqa: RUF009
        KIND,
        "A file of Calibrate Block Caches for this model, in models/quickstep; without one nothing is skipped.",
        None,
    )
    threshold: float = param(
        0.06, "How much change of size may add up before the blocks are computed again: more is faster. 0 switches it off.",
        min=0.0, max=5.0, step=0.01,
    )  # fmt: skip
    K: int = param(2, "The most calls in a row that may be skipped.", min=1, max=100)
    start_percent: float = START(0.2)
    end_percent: float = END()
    warmup: int = WARMUP(1)
    tail: int = TAIL()
    max_cache_mb: int = CACHE_MB()
    cache_device: str = CACHE_DEVICE()

    def __post_init__(self):
        super().__post_init__()
        _ = self.profile  # refuses a damaged file now

    @property
    def profile(self) -> BlockProfile | None:
        return None if self.calibration is None else BlockProfile.of(self.calibration)

    @property
    def most(self) -> int:
        return self.K if self.threshold > 0 else 0

    @property
    def degree(self) -> int:
        return 0

    def growth(self) -> Callable[[float, float], float]:
        """|R(end)| / |R(start)| between two half log-SNRs, start and end."""
        return (lambda start, end: 1.0) if self.profile is None else self.profile.growth

    def off(self, run: Run) -> str | None:
        return super().off(run) or ("it has no calibration" if self.profile is None else None)

    def start(self, run: Run) -> MagCacheSession:
        return MagCacheSession(self, run)


class MagCacheSession(BlockSession):
    """Knows all that it needs before the call. No device sync."""

    def __init__(self, settings: MagCache, run: Run):
        super().__init__(settings, run)
        self.weights, self.growth, self.threshold = self.scaled, settings.growth(), settings.threshold
        self.error = 0.0
        self.full: float | None = None
        """Half log-SNR of the last full call."""

    def decide(self, t: float, position: Position) -> Plan:
        plan = super().decide(t, position)
        if plan is not Plan.PARTIAL:
            self.error = 0.0
            self.full = self.run.coordinate(t) if plan is Plan.FULL else None
        return plan

    def wanted(self, t: float) -> bool:
        if self.full is None:
            return False
        self.error += abs(1.0 - self.growth(self.full, self.run.coordinate(t)))
        return self.error < self.threshold

    def scaled(self, at: float, nodes: Sequence[float]) -> list[float]:
        return [0.0] * (len(nodes) - 1) + [self.growth(nodes[-1], at)]

    def flush(self) -> None:
        self.full = None
        super().flush()
