"""Measuring, in an ordinary run, what the blocks of a network do: how Calibrate Block Caches makes its file."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from .accelerator import Plan, Run
from .block_cache import BlockCache, BlockSession, change
from .profile import BlockProfile, fitted
from .tracker import Position


@dataclass(frozen=True)
class BlockProfiler(BlockCache):
    """Leaves a run as it is and writes down how the residual of its blocks changes from call to call.

    changes, sizes: as ``profile.fitted`` wants them; filled by the run.
    """

    id: ClassVar[str] = "BlockProfiler"
    title: ClassVar[str] = "Calibrate Block Caches"
    paper: ClassVar[str] = ""
    start_percent: ClassVar[float] = 0.0
    end_percent: ClassVar[float] = 1.0
    warmup: ClassVar[int] = 0
    tail: ClassVar[int] = 0
    max_cache_mb: ClassVar[int] = 0
    cache_device: ClassVar[str] = "main"

    changes: list[tuple[float, float]] = field(default_factory=list, compare=False)
    sizes: list[tuple[float, float]] = field(default_factory=list, compare=False)

    @property
    def most(self) -> int:
        return 0

    @property
    def degree(self) -> int:
        return 0

    def off(self, run: Run) -> str | None:
        return None

    def note(self, run: Run) -> str | None:
        return None

    def start(self, run: Run) -> ProfileSession:
        return ProfileSession(self, run)

    def profile_of(self, network: str, blocks: int) -> BlockProfile:
        """What was seen so far."""
        return fitted(network, blocks, self.changes, self.sizes)


class ProfileSession(BlockSession):
    """Computes everything and compares each call with the one before, branch by branch. Syncs; it is no accelerator."""

    watches: ClassVar[str] = "modulated"

    def __init__(self, settings: BlockProfiler, run: Run):
        super().__init__(settings, run)
        self.found = settings

    def decide(self, t: float, position: Position) -> Plan:
        return Plan.FULL

    def keep(self, keys: Sequence[Hashable], residual: torch.Tensor, watched: torch.Tensor) -> None:
        at = self.run.coordinate(self.t)
        for key, rows, seen in zip(keys, residual.chunk(len(keys)), watched.chunk(len(keys)), strict=True):
            then = self.store.coordinates(key)
            if not then:
                self.found.sizes.append((at, 0.0))
            elif at != then[-1]:
                old, old_seen = (self.store.get([k], rows.device) for k in (key, ("seen", key)))
                if old is None or old_seen is None:
                    continue
                ratio = float((rows.float().norm() / old.float().norm()).log())
                pair = float(change(seen, old_seen)), float(change(rows, old))
                if all(map(math.isfinite, (ratio, *pair))):
                    self.found.sizes.append((at, ratio))
                    self.found.changes.append(pair)
            self.store.put([key], rows, at)
            self.store.put([("seen", key)], seen)
