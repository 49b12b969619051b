"""Block caches that look at what the first blocks do and, if it is what they did, skip the others: FBCache and DBCache."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method import param
from .accelerator import Run
from .block_cache import BlockCache, BlockSession, change
from .declared import CACHE_DEVICE, CACHE_MB, END, START, TAIL, WARMUP


@dataclass(frozen=True)
class FirstBlockCache(BlockCache):
    """Computes the first transformer block, and skips all others while it does the same as before.

    For DiTs (Flux, SD 3, Wan, Qwen-Image, ...) with 20 steps or more.

    With r = h_1 - h_0, what block 0 adds, and r* of the last full call, a call hits if

        mean |r - r*| / mean |r*|  <  threshold,

    where the means are over the picture's tokens (256 of them at most), for the row of the batch where it is largest. r* changes
    in full calls only, so that small steps cannot add up unseen. Calls that hit give h_n = h_1 + R, R being what blocks
    1 ... n - 1 added in the last full calls, extrapolated in half log-SNR.

    On the demo DiT (30 steps, CFG 4) at 0.55 of the work it is 0.016 off the full run, where 16 plain steps are 0.05 (Euler)
    and 0.035 (DPM-Solver++ 2M) off. It loses to TaylorSeer and TeaCache at the same work there: block 0 is a fifth of that
    network, and its change is large at the start, so that nothing is skipped below a threshold of 0.1. With ancestral and SDE
    samplers fresh noise moves block 0 and little is skipped.

    Works with every sampler but adaptive ones, ControlNet, LoRA, areas and context windows. Not with torch.compile, nor with
    other caches of blocks or layers. One decision for the conditional and the unconditional prediction.

    Source: ParaAttention and Diffusers (``first_block_cache``); no paper. Both reuse R as it is (``forecast_order`` 0).
    """

    id: ClassVar[str] = "FirstBlockCache"
    title: ClassVar[str] = "First-Block Cache"
    paper: ClassVar[str] = "chengzeyi (2024), github.com/chengzeyi/ParaAttention"

    threshold: float = param(
        0.1, "How much the first block may differ from the last full call: more is faster. 0 switches it off.",
        min=0.0, max=2.0, step=0.01,
    )  # fmt: skip
    max_consecutive: int = param(
        4, "The most calls in a row that may be skipped; lower it where motion or detail freezes.", min=1, max=100
    )
    forecast_order: int = param(
        1, "How the skipped blocks are continued from past calls: 0 reuses, 1 extrapolates a line, 2 a parabola.",
        min=0, max=2, advanced=True,
    )  # fmt: skip
    start_percent: float = START()
    end_percent: float = END()
    warmup: int = WARMUP()
    tail: int = TAIL()
    max_cache_mb: int = CACHE_MB()
    cache_device: str = CACHE_DEVICE()

    @property
    def most(self) -> int:
        return self.max_consecutive if self.threshold > 0 else 0

    @property
    def degree(self) -> int:
        return self.forecast_order

    def spans(self, blocks: int) -> list[tuple[int, int]]:
        return inner(self, blocks, 1, 0)

    def start(self, run: Run) -> ChangeSession:
        return ChangeSession(self, run)


@dataclass(frozen=True)
class DBCache(BlockCache):
    """Computes the first Fn and the last Bn transformer blocks, and skips those between while the first do the same.

    First-Block Cache with more to look at and more that stays fresh: Fn = 1, Bn = 0 is the same. Take Fn = 8 where that one
    is too rough; each block that stays costs its share of the network.

    With r = h_Fn - h_0 and r* of the last full call, a call hits if  mean |r - r*| / mean |r*| < threshold. Then
    h_{n-Bn} = h_Fn + R, and the last Bn blocks run on that.

    What is fresh costs: on the demo DiT of 5 blocks, Fn = 1 and Bn = 1 with threshold 0.2 come to 0.66 of the work and 0.013
    off the full run, First-Block Cache to 0.58 and 0.016. Bn pays only where the network is long.

    Raises ValueError when put on a model with no more than Fn + Bn blocks. Otherwise as First-Block Cache.

    Source: cache-dit's DBCache; no paper. Its defaults are Fn = 8, Bn = 0, and R as it is.
    """

    id: ClassVar[str] = "DBCache"
    title: ClassVar[str] = "DBCache"
    paper: ClassVar[str] = "vipshop (2025), github.com/vipshop/cache-dit"

    threshold: float = param(
        0.08, "How much the first blocks may differ from the last full call: more is faster. 0 switches it off.",
        min=0.0, max=2.0, step=0.01,
    )  # fmt: skip
    Fn: int = param(4, "Blocks at the front that are always computed, and looked at.", min=1, max=100)
    Bn: int = param(
        0, "Blocks at the back that are always computed; they repair some of what is reused.", min=0, max=100
    )
    max_consecutive: int = param(
        4, "The most calls in a row that may be skipped; lower it where motion or detail freezes.", min=1, max=100
    )
    forecast_order: int = param(
        1, "How the skipped blocks are continued from past calls: 0 reuses, 1 extrapolates a line, 2 a parabola.",
        min=0, max=2, advanced=True,
    )  # fmt: skip
    start_percent: float = START()
    end_percent: float = END()
    warmup: int = WARMUP()
    tail: int = TAIL()
    max_cache_mb: int = CACHE_MB()
    cache_device: str = CACHE_DEVICE()

    @property
    def most(self) -> int:
        return self.max_consecutive if self.threshold > 0 else 0

    @property
    def degree(self) -> int:
        return self.forecast_order

    def spans(self, blocks: int) -> list[tuple[int, int]]:
        return inner(self, blocks, self.Fn, self.Bn)

    def start(self, run: Run) -> ChangeSession:
        return ChangeSession(self, run)


def inner(settings: BlockCache, blocks: int, front: int, back: int) -> list[tuple[int, int]]:
    """All blocks but ``front`` and ``back``; raises ``ValueError`` if none is left."""
    if front + back >= blocks:
        raise ValueError(
            f"{settings.title}: {front} blocks at the front and {back} at the back always computed leave none of this "
            f"model's {blocks} to skip."
        )
    return [(front, blocks - back)]


class ChangeSession(BlockSession):
    """Hits while the front blocks change little since the last full call. One device sync per call, for that comparison."""

    watches: ClassVar[str] = "change"

    def __init__(self, settings: FirstBlockCache | DBCache, run: Run):
        super().__init__(settings, run)
        self.threshold = settings.threshold

    def judge(self, keys: Sequence[Hashable], watched: torch.Tensor) -> bool:
        last = self.store.get(_front(keys), watched.device)
        # A comparison with NaN is false.
        return last is not None and bool(change(watched, last) < self.threshold)

    def keep(self, keys: Sequence[Hashable], residual: torch.Tensor, watched: torch.Tensor) -> None:
        super().keep(keys, residual, watched)
        self.store.put(_front(keys), watched)


def _front(keys: Sequence[Hashable]) -> list[Hashable]:
    return [("front", key) for key in keys]
