"""Transforms: what a sampler sees of the network is changed, whatever the sampler is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .method import Method
from .solver import Denoise, Problem, SameCost, Step


@dataclass(frozen=True)
class Transform(Method):
    """Abstract: a change of the denoiser, for every sampler, ComfyUI's own included."""

    @abstractmethod
    def around(self, problem: Problem, times: Sequence[float]) -> Denoise:
        """The denoiser to use instead of ``problem.denoise`` in one run over ``times``. Its state dies with the run."""


@dataclass(frozen=True)
class Transformed(SameCost):
    """A solver that sees the network through a transform."""

    transform: Transform  # pyright: ignore[reportGeneralTypeIssues]  (part() without a default gives none)

    def __post_init__(self):  # no parameters of its own
        object.__setattr__(self, "id", f"{self.solver.id}_{self.transform.id}")
        object.__setattr__(self, "title", f"{self.solver.title}, {self.transform.title}")

    @property
    def convergence_order(self) -> int:
        return self.solver.convergence_order

    def start(self, times: Sequence[float]) -> Any:
        return tuple(times), None, self.solver.start(times)

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: Any) -> Step:
        times, denoise, inner = state
        denoise = denoise or self.transform.around(problem, times)
        step = self.solver.step(replace(problem, denoise=denoise), x, s, t, inner)
        return replace(step, state=(times, denoise, step.state))
