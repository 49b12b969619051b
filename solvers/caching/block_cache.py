"""Reuse of what a run of transformer blocks did: the settings and sessions that all block caches share.

A DiT is a chain of blocks h_{i+1} = B_i(h_i), i = 0 ... n - 1. A cache is about a span of them, blocks a ... b - 1, and what they
add in total, the residual

    R = h_b - h_a.

A full pass computes every block and keeps R. A pass that hits computes blocks 0 ... a - 1, leaves out the span, goes on with
h_a + R and computes blocks b ... n - 1. h_a is always fresh, as are ControlNet residuals added before block a or after b - 1.
Those added in between are part of R and as old as it is.

What differs between the methods is the span, when to hit, and how R is carried along the run.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, ClassVar

import torch

from ..artifact import mismatches
from .accelerator import Accelerator, Plan, Run, Session
from .declared import place, room
from .forecast import lagrange
from .profile import BlockProfile
from .store import BranchStore
from .tracker import Position

FEW = 10
"""Steps below which there is little to reuse."""
WATCHED = 256
"""Tokens of a hidden state that are looked at for a decision."""


@dataclass(frozen=True)
class BlockCache(Accelerator):
    """Abstract: settings of a cache of transformer blocks.

    Fields that all of them declare themselves, so that their own come first: ``start_percent``, ``end_percent``, ``warmup``,
    ``tail``, ``max_cache_mb``, ``cache_device``.
    """

    site: ClassVar[str] = "blocks"

    if TYPE_CHECKING:
        start_percent: ClassVar[float]
        end_percent: ClassVar[float]
        warmup: ClassVar[int]
        tail: ClassVar[int]
        max_cache_mb: ClassVar[int]
        cache_device: ClassVar[str]

    @property
    def profile(self) -> BlockProfile | None:
        """What was calibrated for one network; None if nothing."""
        return None

    @property
    def made_for(self) -> str | None:
        """The only family of networks that these settings are for; None for any."""
        return None

    def spans(self, blocks: int) -> list[tuple[int, int]]:
        """The spans (a, b) that are left out in a chain of ``blocks``; raises ``ValueError`` where it is too short."""
        return [(0, blocks)]

    @property
    def percents(self) -> tuple[float, float]:
        return self.start_percent, self.end_percent

    @property
    @abstractmethod
    def most(self) -> int:
        """How many calls in a row may hit; 0 where none may."""

    @property
    @abstractmethod
    def degree(self) -> int:
        """Of the forecast of R; 0 reuses it as it is."""

    def note(self, run: Run) -> str | None:
        if run.steps < FEW:
            return f"{self.title} has little to reuse in {run.steps} steps, and each reuse shows; better without it"
        if run.stochastic and self.degree > 0:
            return f"{self.title} reuses without forecast, as noise is added between the steps"
        found = self.profile.source if self.profile is not None else None
        said = mismatches(found, run.process, steps=run.steps, cfg=run.cfg) if found is not None else []
        return f"{self.title}: the calibration may not fit. {' '.join(said)}".removesuffix(".") if said else None

    def cache(self, run: Run) -> BranchStore:
        """An empty one, of the size and at the place that the user allows."""
        anchors = 1 if run.stochastic else self.degree + 1
        return BranchStore(anchors, room(self.max_cache_mb), place(self.cache_device))


class BlockSession(Session):
    """What a run of a block cache holds, and the order of its questions.

    In a ``PARTIAL`` call every pass may hit; the first pass that knows its branches decides, the others of the call follow, so
    that conditional and unconditional predictions are of the same age.
    """

    watches: ClassVar[str] = ""
    """What the host shows before a decision: "change", h_a - h_0; "modulated", the first block's modulated input; "", nothing,
    as an empty tensor."""

    def __init__(self, settings: BlockCache, run: Run):
        super().__init__(run)
        self.settings = settings
        self.store = settings.cache(run)
        self.weights = lagrange(self.store.anchors - 1)
        self.hits = 0
        """Calls in a row that hit."""
        self.verdict: bool | None = None
        self.since = -math.inf
        """The coordinate of the last full call: what is older belongs to a branch that had no part in it."""
        self.step = 0
        self._judging = Lock()
        profile = settings.profile
        self._source = profile.source if profile is not None else None

    def decide(self, t: float, position: Position) -> Plan:
        self.verdict, self.step = None, position.step
        early = position.call < self.settings.warmup
        needed = position.call >= self.settings.warmup - self.store.anchors
        if (
            self.settings.most < 1
            or not self.active(t)
            or self.guarded(position, 0, self.settings.tail)
            or (early and not needed)
        ):
            self.hits = 0
            return Plan.PLAIN
        if early or self.hits >= self.settings.most or not self.wanted(t):
            self.hits, self.since = 0, self.run.coordinate(t)
            return Plan.FULL
        return Plan.PARTIAL

    def wanted(self, t: float) -> bool:
        """Whether the call may hit, as far as time alone says. Asked once per call, in their order."""
        return True

    def span(self, blocks: int) -> tuple[int, int]:
        """Blocks a ... b - 1 of ``blocks`` that this call leaves out, or whose residual it keeps."""
        return self.settings.spans(blocks)[0]

    def hit(self, keys: Sequence[Hashable], watched: torch.Tensor, device: torch.device) -> torch.Tensor | None:
        """R for a pass over the branches ``keys``, on ``device``; None: compute the span.

        watched: what ``watches`` names, of the same pass.
        """
        if self.plan is not Plan.PARTIAL or not self.store.has(keys, since=self.since):
            return None
        with self._judging:  # ComfyUI's multi-GPU runs the passes of a call in threads
            if self.verdict is None:
                self.verdict = self.judge(keys, watched)
                self.hits = self.hits + 1 if self.verdict else 0
                if not self.verdict:
                    self.since = self.run.coordinate(self.t)
        return self.store.forecast(keys, self.run.coordinate(self.t), self.weights, device) if self.verdict else None

    def judge(self, keys: Sequence[Hashable], watched: torch.Tensor) -> bool:
        """Whether this call hits; asked once per call at most."""
        return True

    def keep(self, keys: Sequence[Hashable], residual: torch.Tensor, watched: torch.Tensor) -> None:
        """R of a pass over ``keys`` that was computed."""
        self.store.put(keys, residual, self.run.coordinate(self.t))

    def sees(self, shape: tuple[int, ...]) -> None:
        """The latent's shape in a pass; said where a calibration was made for another one."""
        if self._source is not None and not self.notes:
            said = mismatches(self._source, shape=shape)
            self.notes += (
                [f"{self.settings.title}: the calibration may not fit. {said[0]}".removesuffix(".")] if said else []
            )

    def flush(self) -> None:
        self.hits, self.since = 0, -math.inf
        super().flush()


def sampled(hidden: torch.Tensor) -> torch.Tensor:
    """Some of the tokens of a hidden state (rows, tokens, ...), a copy; enough to see how it changes."""
    if hidden.ndim < 3 or hidden.shape[1] <= WATCHED:
        return hidden.detach().clone()
    # An odd stride does not stay in one column of the picture.
    return hidden[:, :: hidden.shape[1] // WATCHED | 1].detach().clone()


def change(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """mean |new - old| / mean |old| of the row where it is largest, in float32, on its device."""
    new, old = (rows.float().flatten(1) for rows in (new, old))
    return ((new - old).abs().mean(1) / (old.abs().mean(1) + 1e-8)).max()
