"""Abstract: wrappers that bend the slope of a multistep solver.

Whatever a multistep solver averages, noise or clean samples, its step is linear in one mean prediction p = sum_j w_j m_j /
M_0. A wrapper here replaces p by something made of it and of what it saw before; the solver does all the rest.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .method import part
from .multistep import History, Hooks, Multistep, Node, Place
from .solver import Problem, SameCost, Step


@dataclass(frozen=True)
class Turned(SameCost):
    """Abstract: a multistep solver whose mean prediction is changed by ``turn``.

    The corrector of a predictor-corrector is left alone.
    """

    solver: Multistep = part("solver", "The sampler to bend: DDIM, DPM-Solver++, DEIS, iPNDM ...")  # noqa: RUF009

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.solver, Multistep):
            raise ValueError(
                f"{self.title} works on multistep samplers such as DDIM, DPM-Solver++, DEIS and iPNDM; "
                f"{self.solver.title} is none of them."
            )

    @abstractmethod
    def turn(self, place: Place, p: torch.Tensor, memory: Any) -> tuple[torch.Tensor, Any]:
        """``(p, memory)`` to use instead; memory is None in the first step."""

    @property
    @abstractmethod
    def changes(self) -> bool:
        """Whether ``turn`` does anything with these settings; if not, the solver runs untouched."""

    @property
    def convergence_order(self) -> int:
        return 1 if self.changes else self.solver.convergence_order

    def start(self, times: Sequence[float]) -> History:
        return self.solver.start(times)

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: History) -> Step:
        hooks = self.solver.hooks
        return self.solver.advance(problem, x, s, t, state, after(hooks, self.turn) if self.changes else hooks)


def after(hooks: Hooks, turn: Callable[[Place, torch.Tensor, Any], tuple[torch.Tensor, Any]]) -> Hooks:
    """``hooks`` with one more turn after their own; each keeps a memory of its own, the run's is the pair."""
    revise = hooks.revise or (lambda place, nodes, memory: (nodes, memory))
    first = hooks.turn or (lambda place, p, nodes, memory: (p, memory))

    def both_revise(place: Place, nodes: tuple[Node, ...], memory: Any):
        inner, outer = memory or (None, None)
        nodes, inner = revise(place, nodes, inner)
        return nodes, (inner, outer)

    def both_turn(place: Place, p: torch.Tensor, nodes: tuple[Node, ...], memory: Any):
        inner, outer = memory
        p, inner = first(place, p, nodes, inner)
        p, outer = turn(place, p, outer)
        return p, (inner, outer)

    return Hooks(both_revise, both_turn)
