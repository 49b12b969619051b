"""Momentum for sampling: a moving average that damps the oscillations high-order methods show at few steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from .kernel import RHO, Kernel
from .method import param
from .multistep import Hooks, Multistep, Node, Place, Rule
from .pndm import adams_bashforth
from .turned import Turned


@dataclass(frozen=True)
class GHVB(Multistep):
    """Generalized heavy ball: Adams-Bashforth on averaged noise predictions, steady at few steps and high CFG.

    v_i = (1 - beta) v_{i-1} + beta eps_i,     e = (1 / beta) sum_{j<k} c_j(beta) v_{i-j},     v_{-1} = eps_0,

    where the c_j make up for the average's lag, so that the order of k points is kept. A smaller beta is more stable and
    less accurate; beta = 1 is iPNDM with k points. k and beta are one number, ``order`` = k - 1 + beta: 2.3 is k = 3,
    beta = 0.3, a whole number k points without averaging. As in iPNDM the coefficients are those of equal steps, which
    limits the order to 2 on other grids. One network call per step; fewer points in the first steps.

    Source: Wizadwongsa et al. (2023), arXiv:2307.11118, and the authors' code.
    """

    id: ClassVar[str] = "GHVB"
    title: ClassVar[str] = "GHVB"
    paper: ClassVar[str] = "Wizadwongsa et al. (2023), arXiv:2307.11118"

    order: float = param(
        1.8,
        "Points and momentum in one number: 1.8 is two points with beta 0.8, 2.5 three with beta 0.5. Lower fractions damp "
        "artifacts more; whole numbers have no momentum.",
        min=1.0,
        max=5.0,
        step=0.1,
    )

    kernels: ClassVar[tuple[Kernel, ...]] = (RHO,)
    in_frame: ClassVar[str] = "vef"
    draws: ClassVar[None] = None

    @property
    def points(self) -> int:
        return math.ceil(self.order - 1e-9)  # rounding above a whole number is no momentum of nearly 0

    @property
    def beta(self) -> float:
        return self.order - self.points + 1.0

    @property
    def convergence_order(self) -> int:
        return min(self.points, 2)

    @property
    def span(self) -> int:
        return self.points

    @property
    def hooks(self) -> Hooks:
        return Hooks(revise=self._average)

    def _average(self, place: Place, nodes: tuple[Node, ...], memory: Any) -> tuple[tuple[Node, ...], Any]:
        """What is kept of a prediction is its average with the ones before."""
        if len(nodes) > 1 and self.beta < 1.0:
            v = torch.lerp(nodes[-2].values[RHO.key], nodes[-1].values[RHO.key], self.beta)
            nodes = (*nodes[:-1], replace(nodes[-1], values={RHO.key: v}))
        return nodes, memory

    def rule(self, place: Place) -> Rule:
        points = min(self.points, place.known)
        return Rule(RHO, points, shares=adams_bashforth(points, self.beta))


@dataclass(frozen=True)
class HB(Turned):
    """Heavy-ball momentum on any multistep sampler: tames divergence artifacts at few steps. First order, so less accurate with
    many steps; at 8 and 10 calls and CFG 4 it was among the most accurate on the demo UNets, at 5 it was not.

    v_i = (1 - beta) v_{i-1} + beta p_i,

    and the step is taken with v_i instead of p_i, the mean prediction of the wrapped sampler: of the noise (iPNDM, DEIS:
    the paper's PLMS with HB) or of the clean sample (DPM-Solver++: the paper's DPM-Solver++ with HB). v starts as the
    first p. beta = 1 is the wrapped sampler itself, exactly; below, the order is 1 whatever the sampler's. ``nesterov``
    steps with (1 - beta) v_i + beta p_i, which lags less.

    The corrector of a predictor-corrector (UniPC) is left alone: there only the point where the network is asked moves.

    Raises ValueError if the sampler is not a multistep one.

    Source: Wizadwongsa et al. (2023), arXiv:2307.11118, and the authors' code.
    """

    id: ClassVar[str] = "HB"
    title: ClassVar[str] = "Momentum (heavy ball)"
    paper: ClassVar[str] = "Wizadwongsa et al. (2023), arXiv:2307.11118"

    beta: float = param(
        0.8, "Share of the new slope. Lower is steadier and less accurate, 1 no momentum.", min=0.05, max=1.0, step=0.05
    )
    nesterov: bool = param(False, "Nesterov's variant, which lags less behind and damps less.", advanced=True)

    @property
    def changes(self) -> bool:
        return self.beta < 1.0

    def turn(self, place: Place, p: torch.Tensor, memory: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        v = p if memory is None else torch.lerp(memory, p, self.beta)
        return torch.lerp(v, p, self.beta) if self.nesterov else v, v
