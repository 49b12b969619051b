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
    in full calls only, so that small steps cannot add up unseen.
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

    With r = h_Fn - h_0 and r* of the last full call, a call hits if  mean |r - r*| / mean |r*| < threshold.
    """

    id: ClassVar[str] = "DBCache"
    title: ClassVar[str] = "DBCache"
    paper: ClassVar[str] = "DefTruth et al. (2025), github.com/vipshop/cache-dit"

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

    @property
    def most(self) -> int:
        return self.settings.max_consecutive if self.settings.threshold > 0 else 0

    def judge(self, keys: Sequence[Hashable], watched: torch.Tensor | None) -> bool:
        last = self.store.get(_front(keys), watched.device)
        # A comparison with NaN is false.
        return last is not None and bool(change(watched, last) < self.settings.threshold)

    def keep(self, keys: Sequence[Hashable], residual: torch.Tensor, watched: torch.Tensor | None) -> None:
        super().keep(keys, residual, watched)
        self.store.put(_front(keys), watched)


def _front(keys: Sequence[Hashable]) -> list[Hashable]:
    return [("front", key) for key in keys]
