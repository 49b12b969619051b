"""Accelerator, Run and Session: frozen settings, what is known of a run beforehand, and the state of one run."""

from __future__ import annotations

import enum
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method import Method
from ..process import ForwardProcess
from .store import BranchStore
from .tracker import Position, StepTracker

ALWAYS = (math.inf, 0.0)
EDGE = 1e-4  # of a flow model's time: its log-SNR is kept finite


class Plan(enum.Enum):
    """What one call of the denoiser does; decided once per call and obeyed by everything inside it."""

    PLAIN = "compute everything, keep nothing"
    FULL = "compute everything, keep what later calls reuse"
    PARTIAL = "compute a part, reuse the rest"
    SKIP = "compute nothing, answer from what was kept"


@dataclass(frozen=True)
class Run:
    """What is known of a sampling run before its first call.

    times: the schedule. window: the times between which the accelerator may work, ``window[0] >= t > window[1]``.
    process: the model's; None in tests that need none. sampler: its name. stochastic: whether it adds noise. adaptive: whether
    it chooses its steps by comparing calls. both_sides: whether it reads the unconditional prediction as well (CFG++).
    cfg: the guidance scale, None for guiders without one scale.
    """

    times: Sequence[float]
    window: tuple[float, float] = ALWAYS
    process: ForwardProcess | None = None
    sampler: str = ""
    stochastic: bool = False
    adaptive: bool = False
    both_sides: bool = False
    cfg: float | None = None
    seed: int = 0

    @property
    def steps(self) -> int:
        return max(len(self.times) - 1, 0)

    def coordinate(self, t: float) -> float:
        """Half log-SNR at time t: where along the run t is, evenly for the network. Forecasts use it."""
        if self.process is None:
            return -math.log(t)
        edge = EDGE if self.process.alpha(1.0) <= 0.0 else 0.0
        return self.process.lam(min(max(t, edge), 1.0 - edge) if edge else t)


@dataclass(frozen=True)
class Accelerator(Method):
    """Abstract: a training-free way to do less network work in a sampling run, or to get more from it.

    Besides ``Method``'s, subclasses declare ``site``: the level at which it works, by the name that the host gives it
    (``composition.SITES``).
    """

    site: ClassVar[str]

    @property
    @abstractmethod
    def percents(self) -> tuple[float, float]:
        """Which part of sampling may be accelerated, as fractions of it; the host knows their times."""

    @abstractmethod
    def start(self, run: Run) -> Session:
        """The state of a run."""

    def off(self, run: Run) -> str | None:
        """Why this run has to do without it, as the end of "X is off: ..."; None if it need not."""
        # Kept features would look to the sampler like a step that went well.
        return "the sampler chooses its steps by comparing network calls" if run.adaptive else None

    def note(self, run: Run) -> str | None:
        """What the user should know about a run that it works in, a sentence without full stop; None for nothing."""
        return None


class Session(ABC):
    """The state of one run. It lives as long as the run and holds nothing afterwards."""

    def __init__(self, run: Run):
        self.run = run
        self.tracker = StepTracker(run.times)
        self.store = BranchStore()
        self.plan: Plan | None = None
        """The plan of the current call, None between calls."""
        self.t = math.nan
        """The time of the current call."""
        self.notes: list[str] = []
        """What the user should read after the run, each a sentence without full stop."""
        self._seen: Counter[Hashable] = Counter()

    @abstractmethod
    def decide(self, t: float, position: Position) -> Plan:
        """The plan of the call at ``t``."""

    def flush(self) -> None:
        """Forget what was kept: the next call is about another image."""
        self.store.clear()

    @contextmanager
    def call(self, t: float) -> Iterator[None]:
        """The body is one call of the denoiser at time ``t``. A call inside a call is the same call."""
        if self.plan is not None:
            yield
            return
        position = self.tracker.advance(t)
        if position.restarted:
            self.flush()
        self.t = t
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
        return self.run.window[0] >= t > self.run.window[1]

    def guarded(self, position: Position, warmup: int, tail: int) -> bool:
        """Whether the call is among the first ``warmup`` calls or in the last ``tail`` steps, which are full anyway."""
        return position.call < warmup or position.step >= self.tracker.steps - tail

    def close(self) -> None:
        """The end of the run, reached or not."""
        self.flush()


class Windowed(Session):
    """A session with nothing to decide: on inside the window, off outside."""

    def decide(self, t: float, position: Position) -> Plan:
        return Plan.FULL if self.active(t) else Plan.PLAIN


class Answering(Session):
    """Abstract: a session that can answer a whole call of the denoiser by itself (``Plan.SKIP``)."""

    @abstractmethod
    def answer(self, x: torch.Tensor, t: float) -> torch.Tensor | None:
        """The denoised prediction at ``x``, without the network; None where ``x`` shows that it must be computed."""

    @abstractmethod
    def learn(self, x: torch.Tensor, t: float, x0: torch.Tensor) -> None:
        """The network's own prediction ``x0`` in a ``FULL`` call. Nothing given may be changed or kept without a copy."""
