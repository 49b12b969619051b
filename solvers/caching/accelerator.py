"""Accelerator and Session: frozen settings, and the state of one sampling run."""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from ..method import Method
from .store import BranchStore
from .tracker import Position, StepTracker

ALWAYS = (math.inf, 0.0)


class Plan(enum.Enum):
    """What one call of the denoiser does; decided once per call and obeyed by everything inside it."""

    PLAIN = "compute everything, keep nothing"
    FULL = "compute everything, keep what later calls reuse"
    PARTIAL = "compute a part, reuse the rest"


@dataclass(frozen=True)
class Accelerator(Method):
    """Abstract: a training-free way to do less network work in a sampling run.

    Besides ``Method``'s, subclasses declare ``site``: which part of the network it hooks into, by the name that the
    host gives it ("unet": the blocks of a UNet).
    """

    site: ClassVar[str]

    @property
    @abstractmethod
    def percents(self) -> tuple[float, float]:
        """Which part of sampling may be accelerated, as fractions of it; the host knows their times."""

    @abstractmethod
    def start(self, times: Sequence[float], window: tuple[float, float] = ALWAYS) -> Session:
        """The state of a run over ``times``. A call at t may be accelerated if ``window[0] >= t > window[1]``."""


class Session(ABC):
    """The state of one run. It lives as long as the run and holds nothing afterwards."""

    def __init__(self, times: Sequence[float], window: tuple[float, float] = ALWAYS):
        self.tracker = StepTracker(times)
        self.window = window
        self.store = BranchStore()
        self.plan: Plan | None = None
        """The plan of the current call, None between calls."""
        self._seen: Counter[Hashable] = Counter()

    @abstractmethod
    def decide(self, t: float, position: Position) -> Plan:
        """The plan of the call at ``t``."""

    @abstractmethod
    def flush(self) -> None:
        """Forget what was kept: the next call is about another image."""

    @contextmanager
    def call(self, t: float) -> Iterator[None]:
        """The body is one call of the denoiser at time ``t``. A call inside a call is the same call."""
        if self.plan is not None:
            yield
            return
        position = self.tracker.advance(t)
        if position.restarted:
            self.flush()
        self.plan = self.decide(t, position)
        self._seen.clear()
        try:
            yield
        finally:
            self.plan = None

    def branches(self, names: Sequence[Hashable]) -> list[Hashable]:
        """Keys for the branches of one network call.

        A name that comes a second time within one call of the denoiser is another pass over the same conditioning
        (perturbed-attention and skip-layer guidance do that), so its key counts the passes.
        """
        keys = []
        for name in names:
            keys.append((name, self._seen[name]))
            self._seen[name] += 1
        return keys

    def active(self, t: float) -> bool:
        return self.window[0] >= t > self.window[1]

    def close(self) -> None:
        """The end of the run, reached or not."""
        self.store.clear()
