"""DPM-Solver and DPM-Solver++ singlestep: exponential Runge-Kutta methods in lambda, without history.

With h = lambda_t - lambda_s and m the network's prediction, as noise ("DPM-Solver") or as clean sample ("DPM-Solver++"),

    noise:  x_t = (alpha_t / alpha_s) x_s - sigma_t h phi_1(h) m_s  - corrections
    data:   x_t = (sigma_t / sigma_s) x_s + alpha_t h phi_1(-h) m_s + corrections

where the corrections integrate the differences m_i - m_s, m_i being the prediction at lambda_s + r_i h:

    order 2            r_1 = 1/2             midpoint: h phi_1 (m_1 - m_s) / (2 r_1)        taylor: h phi_2 (m_1 - m_s) / r_1
    order 3            r_1, r_2 = 1/3, 2/3   midpoint: h phi_2 (m_2 - m_s) / r_2            taylor: quadratic through all three

and x at r_2 is found from m_s and m_1 by the second-order taylor form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from .declared import FRAME
from .kernel import Data, Kernel, Noise, begin, framed
from .method import param
from .runge_kutta import Stage, Tableau, reach, run_stages
from .solver import Problem, Solver, Step

THIRDS = (1 / 3, 2 / 3)


def exponential(order: int, correction: str, r: Sequence[float]) -> Tableau:
    """The tableau of order 1 to 3 with its ``order - 1`` inner evaluations at fractions r of the step."""
    if order == 1:
        return (Stage(1.0),)
    if order == 2:
        return (Stage(r[0]), Stage(1.0, (0, 1), midpoint=correction == "midpoint"))
    last = (0, 2) if correction == "midpoint" else (0, 1, 2)
    return (Stage(r[0]), Stage(r[1], (0, 1)), Stage(1.0, last))


def budget(calls: int, order: int, to_zero: bool) -> tuple[int, ...]:
    """Orders of the steps that spend ``calls`` network calls, their sum; a last step to t = 0 has order 1.

    DPM-Solver-fast's plan, but that three calls over, of which the last goes to 0, are spent as 2 + 2 + 1.
    """
    rest = calls % order
    tail = {1: [()], 2: [(1, 1) if to_zero else (), (1,)], 3: [(2, 1), (1,), (2, 2, 1) if to_zero else (2,)]}[order][
        rest
    ]
    if sum(tail) > calls:
        return (1,) * calls
    return (*(order,) * ((calls - sum(tail)) // order), *tail)


@dataclass(frozen=True)
class Spending:
    """State of a run in "budget": the times of the steps left, and of the one under way its x at s and its m so far."""

    steps: tuple[tuple[float, ...], ...]
    x: torch.Tensor | None = None
    values: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class DPMSolverSinglestep(Solver):
    """DPM-Solver++ (2S, 3S) and DPM-Solver (1, 2, 3) singlestep: two or three network calls per step and no memory of past
    steps. Take it where history does harm: few calls, uneven sigmas, a model that changes on the way.

    With ``plan = fixed`` every step makes ``order`` calls, the one to 0 a single one: 10 sigmas cost twice or three times as
    much as with a multistep sampler. With ``plan = budget`` every interval of the given sigmas is one call: two or three of
    them make one step whose inner evaluations are at the sigmas in between (so r_1, r_2 follow the schedule), and the
    previews in between are inner points. Its plan of orders is that of "DPM-Solver-fast".

    x_t = A x_s + B sum_j w_j m_j with the weights of ``solvers/singlestep.py``. Order 1 is DDIM for both algorithms. data,
    order 2, taylor and r1 = 1 is the exponential Heun method (ComfyUI's exp_heun_2_x0). On flow models data works with the
    true signal-to-noise ratio and noise with the sigmas as they are (frame vef), where it stays accurate near sigma = 1.

    Weaknesses: noise with order 2 or 3 explodes at high guidance (CFG above about 4 with 10 calls or fewer): take data
    there. At equal numbers of calls the multistep forms are usually closer. In "budget" the plan ends with steps of order 1
    and 2, so its order of convergence is 2; and third-order steps need r_2 = 2/3, that is a schedule without jumps.

    Source: Lu et al. (2022), arXiv:2206.00927: DPM-Solver-1, -2, -3 (noise) and DPM-Solver-fast (budget); Lu et al. (2022),
    arXiv:2211.01095: DPM-Solver++(2S) and (3S) (data).
    """

    id: ClassVar[str] = "DPMSolverSinglestep"
    title: ClassVar[str] = "DPM-Solver singlestep"
    paper: ClassVar[str] = "Lu et al. (2022), arXiv:2211.01095"

    order: int = param(2, "Network calls per step: 2 is 2S, 3 is 3S, 1 is DDIM.", min=1, max=3)
    algorithm: str = param(
        "data",
        "data is DPM-Solver++, steady under guidance. noise is DPM-Solver, for CFG up to about 3.",
        options=("data", "noise"),
    )
    plan: str = param(
        "fixed",
        "fixed: every step of the schedule takes `order` calls. budget: every step takes one call, `order` of them make one "
        "step of the method, so that calls equal steps.",
        options=("fixed", "budget"),
    )
    correction: str = param(
        "midpoint",
        "Form of the highest term: midpoint (the papers' own) or taylor (the exact integral); they differ little.",
        options=("midpoint", "taylor"),
        advanced=True,
    )
    r1: float = param(
        0.5,
        "Where order 2 with plan fixed evaluates inside the step: 0.5 in the middle (in lambda), 1 at its end.",
        min=0.05,
        max=1.0,
        step=0.05,
        advanced=True,
    )
    frame: str = param(**FRAME)

    draws: ClassVar[None] = None

    @property
    def calls(self) -> int:
        return self.order if self.plan == "fixed" else 1

    @property
    def convergence_order(self) -> int:
        return self.order if self.plan == "fixed" else min(self.order, 2)

    @property
    def kernel(self) -> Kernel:
        return Data() if self.algorithm == "data" else Noise("lambda")

    @property
    def in_frame(self) -> str:
        return {"data": "snr", "noise": "vef"}[self.algorithm] if self.frame == "auto" else self.frame

    def start(self, times: Sequence[float]) -> Spending:
        if self.plan == "fixed":
            return Spending(())
        steps, first = [], 0
        for calls in budget(len(times) - 1, self.order, times[-1] == 0.0):
            steps.append(tuple(times[first : first + calls + 1]))
            first += calls
        return Spending(tuple(steps))

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: Spending) -> Step:
        x0 = problem.denoise(x, s)
        if t == 0.0:
            return Step(x0, x0, state)
        process = framed(problem.process, self.in_frame)
        if self.plan == "budget":
            return self._one_call(process, x, s, t, x0, state)
        tableau = exponential(self.order, self.correction, (self.r1,) if self.order == 2 else THIRDS)
        return Step(run_stages(problem, process, self.kernel, tableau, x, s, t, x0).x, x0, state)

    def _one_call(self, process, x: torch.Tensor, s: float, t: float, x0: torch.Tensor, state: Spending) -> Step:
        """From one given time to the next: one stage of a step of the method."""
        kernel, times = self.kernel, state.steps[0]
        if not state.values:
            x, s = begin(process, x, s, t, x0)
            state = Spending(((s, *times[1:]), *state.steps[1:]), x)
            times = state.steps[0]
        values = (*state.values, kernel.read(process, x, x0, s))
        start, *inner, end = (kernel.place(process, time) for time in times)
        tableau = exponential(len(times) - 1, self.correction, [(place - start) / (end - start) for place in inner])
        stage = tableau[len(values) - 1]
        at = reach(process, kernel, tableau, stage, state.x, times[0], t, values)
        done = len(values) == len(tableau)
        return Step(at, x0, Spending(state.steps[1:]) if done else replace(state, values=values))
