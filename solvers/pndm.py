"""Pseudo numerical methods: Adams-Bashforth combinations of noise predictions, and starters of their own.

Every step is the DDIM map with a combined noise e instead of the newest prediction,

    transfer(x, s, t, e) = (alpha_t / alpha_s) x + alpha_t (rho_t - rho_s) e,     rho = sigma / alpha,

which is the classical method for dy / drho = eps, y = x / alpha. Flow models are seen in their own sigma, where it reads
dx / dsigma = (x - D) / sigma.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch

from .kernel import RHO, Kernel, framed
from .method import param
from .multistep import History, Multistep, Node, Place, Rule
from .process import ForwardProcess
from .runge_kutta import Stage, Tableau, run_stages
from .solver import Problem, Solver, Step


@lru_cache(maxsize=64)
def adams_bashforth(k: int, beta: float = 1.0) -> tuple[float, ...]:
    """Shares of the newest k predictions in one step of k equal ones, newest last; k <= 5.

    u = sum_{m<k} g_m nabla^m eps, g = 1, 1/2, 5/12, 3/8, 251/720, nabla the backward difference. With beta < 1 the
    shares are those of the moving averages v_i = (1 - beta) v_{i-1} + beta eps_i instead, that is of
    eps_i = v_i + (1/beta - 1) nabla v_i, up to nabla^{k-1}.
    """
    g = (1.0, 1 / 2, 5 / 12, 3 / 8, 251 / 720)
    lag = 1.0 / beta - 1.0
    d = [g[m] + (lag * g[m - 1] if m > 0 else 0.0) for m in range(k)]
    return tuple((-1) ** j * sum(math.comb(m, j) * d[m] for m in range(j, k)) for j in reversed(range(k)))


@dataclass(frozen=True)
class IPNDM(Multistep):
    """Adams-Bashforth on the noise predictions from the first step on, one network call per step (iPNDM, iPNDM_v, LMS).

    e = sum_j c_j eps_j over the newest ``points`` predictions, fewer in the first steps. "uniform" takes the textbook
    c for equal steps, (55, -59, 37, -9) / 24 with four points: the published iPNDM, whose order on other grids is 2 however
    many points it has. "exact" takes those of the actual steps: iPNDM_v, LMS and DEIS in rho, of order ``points`` on any
    grid. One point is DDIM.

    The iPNDM_v of diff-sampler, copied into ComfyUI, has wrong coefficients for three and four points; these are right.
    Little stability: at high CFG take 2 points, or GHVB.

    Source: Zhang, Chen (2022), arXiv:2204.13902 (iPNDM); the variable-step coefficients are classical.
    """

    id: ClassVar[str] = "IPNDM"
    title: ClassVar[str] = "iPNDM"
    paper: ClassVar[str] = "Zhang and Chen (2022), arXiv:2204.13902"

    points: int = param(4, "Noise predictions used per step; 2 is steadier at high CFG, 1 is DDIM.", min=1, max=4)
    coefficients: str = param(
        "uniform",
        "uniform: those of equal steps (iPNDM), mostly better below about 30 steps. exact: those of the actual steps "
        "(iPNDM_v, LMS), better beyond.",
        options=("uniform", "exact"),
    )

    kernels: ClassVar[tuple[Kernel, ...]] = (RHO,)
    in_frame: ClassVar[str] = "vef"
    draws: ClassVar[None] = None

    @property
    def convergence_order(self) -> int:
        return self.points if self.coefficients == "exact" else min(self.points, 2)

    @property
    def span(self) -> int:
        return self.points

    def rule(self, place: Place) -> Rule:
        points = min(self.points, place.known)
        return Rule(RHO, points, shares=adams_bashforth(points) if self.coefficients == "uniform" else None)


@dataclass(frozen=True)
class PNDM(Solver):
    """PNDM and PLMS: Adams-Bashforth on the noise predictions, started by extra network calls in the first steps.

    - plms: the first step by the improved Euler method, e = (eps_s + eps_t) / 2, eps_t at the transferred point; then two,
      three and four points (latent diffusion's PLMS). N + 1 calls for N steps.
    - s-pndm: the same start, then two points, e = (3 eps_i - eps_{i-1}) / 2. N + 1 calls.
    - f-pndm: three steps by the Runge-Kutta method, e = (e_1 + 2 e_2 + 2 e_3 + e_4) / 6 with e_2, e_3 halfway in training
      time, then e = (55 eps_i - 59 eps_{i-1} + 37 eps_{i-2} - 9 eps_{i-3}) / 24. N + 9 calls.

    The coefficients are those of equal steps, so the order is 2 on any other grid; on steps equal in sigma, f-pndm has
    order 4 and plms 3. The step to sigma 0 is the prediction itself, and so are starting steps that end there. Not for high
    CFG at few steps.

    Source: Liu, Ren, Lin, Zhao (2022), arXiv:2202.09778, and the authors' code; PLMS: Rombach et al. (2021),
    arXiv:2112.10752, their code.
    """

    id: ClassVar[str] = "PNDM"
    title: ClassVar[str] = "PNDM"
    paper: ClassVar[str] = "Liu et al. (2022), arXiv:2202.09778"

    method: str = param(
        "plms",
        "plms: one extra network call, up to four points. s-pndm: one extra call, two points, steadier. f-pndm: nine extra "
        "calls, four points; for 20 steps and more.",
        options=("plms", "s-pndm", "f-pndm"),
    )

    convergence_order: ClassVar[int] = 2
    draws: ClassVar[None] = None

    @property
    def _starters(self) -> tuple[int, int]:
        """Steps of the starter, and network calls of each."""
        return (3, 4) if self.method == "f-pndm" else (1, 2)

    @property
    def _after(self) -> IPNDM:
        return IPNDM(2 if self.method == "s-pndm" else 4)

    def nfe(self, steps: int) -> int:
        count, calls = self._starters
        return steps + min(count, max(steps - 1, 0)) * (calls - 1)

    def start(self, times: Sequence[float]) -> History:
        return self._after.start(times)

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: History) -> Step:
        if t == 0.0 or state.i >= self._starters[0]:
            return self._after.step(problem, x, s, t, state)
        process = framed(problem.process, self._after.in_frame)
        tableau = runge_kutta(process, s, t) if self.method == "f-pndm" else IMPROVED_EULER
        x0 = problem.denoise(x, s)
        node = Node(s, {RHO.key: RHO.read(process, x, x0, s)})
        x = run_stages(problem, process, RHO, tableau, x, s, t, x0).x
        return Step(x, x0, History(state.total, state.i + 1, (*state.nodes, node)))


IMPROVED_EULER: Tableau = (Stage(1.0, (0,), (1.0,)), Stage(1.0, (0, 1), (0.5, 0.5)))


def runge_kutta(process: ForwardProcess, s: float, t: float) -> Tableau:
    """The pseudo Runge-Kutta method of order four, its middle halfway in training time."""
    middle = float(process.t_of_u((process.u_of_t(s) + process.u_of_t(t)) / 2.0))
    start, end, at = (RHO.place(process, time) for time in (s, t, middle))
    c = (at - start) / (end - start)
    last = Stage(1.0, (0, 1, 2, 3), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
    return Stage(c, (0,), (1.0,)), Stage(c, (1,), (1.0,)), Stage(1.0, (2,), (1.0,)), last
