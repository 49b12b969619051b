"""What a sampling run cost: counted while it runs, kept in a ledger, said in one line.

Two units are counted, because accelerators save either:

- a *call* is one evaluation of the denoiser, asked for by the sampler (one NFE);
- a *forward* is one pass of the network inside a call: a call makes one or more (positive and negative conditioning,
  areas, context windows), or none where an accelerator answered in its place.

The work of a forward is the size of its input times the share of the network that was computed. A call is worth as
much as the largest call of the run, so

    work done = sum over calls of sum over forwards of size x share  /  (calls x largest call).

Conditionings that apply only to some of the steps therefore count as work not done in the others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RunReport:
    """The numbers of one sampling run.

    label: which sampler, how many steps.
    group: runs with the same group belong together (the passes of one queued prompt).
    calls: denoiser evaluations; ``full + partial + skipped`` of them.
    forwards: network passes inside them.
    work: share of the network's work that was computed, None if some of it is unknown.
    seconds: from the first call to the end of the run, model loading excluded.
    cache_bytes: peak memory held by accelerators.
    finished: False for an interrupted or failed run.
    """

    label: str
    group: str
    steps: int
    calls: int
    full: int
    partial: int
    skipped: int
    forwards: int
    work: float | None
    seconds: float
    cache_bytes: int = 0
    notes: tuple[str, ...] = ()
    finished: bool = True

    def line(self) -> str:
        """One line for a person."""
        parts = [f"{self.label}: {self.calls} calls in {self.seconds:.2f} s"]
        if self.partial or self.skipped:
            parts.append(f"{self.full} full, {self.partial} partial, {self.skipped} skipped")
        if self.work is None:
            parts.append("share of network work skipped unknown")
        else:
            parts.append(f"{100 * (1 - self.work):.0f}% of network work skipped")
        if self.cache_bytes:
            parts.append(f"cache peak {self.cache_bytes / 2**20:.1f} MB")
        if not self.finished:
            parts.append("stopped before the end")
        return "; ".join([*parts, *self.notes])


@dataclass
class Forward:
    """One pass of the network. ``share``: how much of it is computed, set by who skips a part; None if unknown."""

    size: int
    share: float | None = 1.0


@dataclass
class Meter:
    """Counts one run. The clock starts with the first call."""

    label: str = "run"
    group: str = ""
    steps: int = 0
    finished: bool = False
    _calls: list[list[Forward]] = field(default_factory=list)
    _open: list[Forward] | None = None
    _began: float | None = None
    _held: dict[str, int] = field(default_factory=dict)
    _notes: list[str] = field(default_factory=list)

    @contextmanager
    def call(self) -> Iterator[None]:
        """The body is one evaluation of the denoiser. A call inside a call is the same call."""
        if self._open is not None:
            yield
            return
        if self._began is None:
            self._began = time.perf_counter()
        self._open = []
        self._calls.append(self._open)
        try:
            yield
        finally:
            self._open = None

    def forward(self, size: int) -> Forward:
        """One pass of the network over ``size`` numbers begins."""
        made = Forward(size)
        if self._open is not None:
            self._open.append(made)
        return made

    def held(self, who: str, nbytes: int) -> None:
        """``who`` held at most ``nbytes`` of cache."""
        self._held[who] = max(nbytes, self._held.get(who, 0))

    def note(self, text: str) -> None:
        """Something the user should read, once."""
        if text not in self._notes:
            self._notes.append(text)

    def report(self) -> RunReport:
        calls = self._calls
        full = sum(bool(c) and all(f.share == 1.0 for f in c) for c in calls)
        skipped = sum(not c for c in calls)
        forwards = [f for c in calls for f in c]
        whole = len(calls) * max((sum(f.size for f in c) for c in calls), default=0)
        known = whole > 0 and all(f.share is not None for f in forwards)
        return RunReport(
            label=self.label,
            group=self.group,
            steps=self.steps,
            calls=len(calls),
            full=full,
            partial=len(calls) - full - skipped,
            skipped=skipped,
            forwards=len(forwards),
            work=sum(f.size * (f.share or 0.0) for f in forwards) / whole if known else None,
            seconds=0.0 if self._began is None else time.perf_counter() - self._began,
            cache_bytes=sum(self._held.values()),
            notes=tuple(self._notes),
            finished=self.finished,
        )


class Ledger:
    """The reports of the newest runs of one model and its clones, oldest first."""

    def __init__(self, keep: int = 64):
        self._runs: deque[RunReport] = deque(maxlen=keep)

    def add(self, report: RunReport) -> None:
        self._runs.append(report)

    @property
    def runs(self) -> list[RunReport]:
        return list(self._runs)

    def last(self) -> list[RunReport]:
        """The newest run and the earlier ones of its group, in the order they ran."""
        return [run for run in self._runs if run.group == self._runs[-1].group]
