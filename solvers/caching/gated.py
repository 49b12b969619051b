"""Accelerators of whole calls that decide about a call by the state the sampler comes with."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch

from .accelerator import Plan, Run
from .derivative import DerivativeSession


class GatedSession(DerivativeSession):
    """Abstract: every call is planned to be skipped, and ``answer`` says whether it is, with x in hand."""

    def __init__(self, run: Run, anchors: int, warmup: int, tail: int, most: int):
        super().__init__(run, anchors)
        self.warmup, self.tail, self.most = warmup, tail, most

    def plan_at(self, t: float) -> Plan:
        return Plan.SKIP

    def answer(self, x: torch.Tensor, t: float) -> torch.Tensor | None:
        may = self.watch(x, t) and self.store.has(self.key(x))
        if not may or self.skipped >= self.most or self.guarded_now(self.warmup, self.tail):
            return None
        self.skipped += 1
        return self.guess(x, t)

    @abstractmethod
    def watch(self, x: torch.Tensor, t: float) -> bool:
        """Look at the state of a call, full or not; whether the call may be left out."""

    @abstractmethod
    def guess(self, x: torch.Tensor, t: float) -> torch.Tensor:
        """The prediction of a call that is left out."""


class Newest:
    """Copies of the newest tensors of one shape; another shape, dtype or device begins anew."""

    def __init__(self, most: int):
        self.most = most
        self.kept: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        self.fit(x)
        self.kept = [*self.kept, x.detach().clone()][-self.most :]

    def fit(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """What is kept, forgotten first if ``x`` is unlike it."""
        if self.kept and (self.kept[-1].shape, self.kept[-1].dtype, self.kept[-1].device) != (
            x.shape,
            x.dtype,
            x.device,
        ):
            self.clear()
        return self.kept

    def clear(self) -> None:
        self.kept = []
