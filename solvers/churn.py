"""EDM's churn: a little noise before every step of any solver."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .anew import check_given_times, check_starts_anew, remembers
from .method import param
from .process import ForwardProcess
from .renoise import renoise
from .solver import Problem, Step, Wrapper


@dataclass(frozen=True)
class Churn(Wrapper):
    """EDM's stochastic sampler around another one: noise is added before every step, which then has further to go. It
    washes out errors of the network at 30 steps and more; take rhoRK-DEIS 2heun inside for the published sampler.

    With rho = sigma / alpha and N steps, a step from s to t is one of the wrapped sampler from s' to t, where

        rho_s' = (1 + gamma) rho_s,   gamma = min(S_churn / N, sqrt(2) - 1) while S_tmin <= rho_s <= S_tmax, else 0,
        x_s' = (alpha_s' / alpha_s) x_s + S_noise sqrt(sigma_s'^2 - (alpha_s' / alpha_s)^2 sigma_s^2) z.

    On flow models this keeps s' below 1; pure noise, s = 1, is left as it is. The noise comes from the seed. With
    S_churn = 0 it is the wrapped sampler itself. No further calls; weak order 2 with rhoRK 2heun, 1 with DDIM.
    Published settings, for 256 steps: ImageNet-64 S_churn 40, S_tmin 0.05, S_tmax 50, S_noise 1.003; CIFAR-10 30,
    0.01, 1, 1.007.

    It pays where the network errs. With a perfect one it only costs, as every step gets longer: for 2heun over 20
    Karras steps and Gaussian data of variance 0.4 the error of the variance is 0.010 without, 0.016 at S_churn 2,
    0.035 from 8.3 on.

    A step with churn forgets the past of the sampler: what a multistep sampler knows was seen without the noise, maybe
    at this very sigma. DPM-Solver++ 2M and its like take first-order steps there, so single-step samplers gain more.
    Noise is independent for each step, even if the sampler asks for one path, which would bring the same noise again
    where steps overlap.

    Raises ValueError for samplers that choose their own steps.

    Source: Karras et al. (2022), arXiv:2206.00364, algorithm 2; in rho for flow models, our own.
    """

    id: ClassVar[str] = "Churn"
    title: ClassVar[str] = "Churn (EDM stochastic)"
    paper: ClassVar[str] = "Karras et al. (2022), arXiv:2206.00364"

    S_churn: float = param(
        2.0,
        "Noise added over the whole run: 0 none, 2 raises sigma by a tenth at each of 20 steps. Raise it along with the "
        "steps; from 0.41 per step on it stays the same.",
        min=0.0,
        max=1000.0,
        step=0.1,
    )
    S_tmin: float = param(
        0.05,
        "No churn below this sigma (flow models: sigma / (1 - sigma)); keeps fine detail.",
        min=0.0,
        max=1e4,
        step=0.01,
    )
    S_tmax: float = param(
        50.0, "No churn above this sigma (flow models: sigma / (1 - sigma)).", min=0.0, max=1e6, step=0.01
    )
    S_noise: float = param(
        1.0,
        "Factor on the added noise; EDM takes 1.003 to 1.007 against lost detail.",
        min=0.0,
        max=2.0,
        step=0.001,
        advanced=True,
    )

    def __post_init__(self):
        super().__post_init__()
        check_given_times(self.solver, self.title)

    @property
    def calls(self) -> int:
        return self.solver.calls

    @property
    def convergence_order(self) -> int:
        order = self.solver.convergence_order
        if self.S_churn == 0.0:
            return order
        return 1 if remembers(self.solver) else min(order, 2)

    @property
    def draws(self) -> str | None:
        return "gaussian" if self.S_churn > 0.0 else self.solver.draws

    def nfe(self, steps: int) -> int | None:
        """None where the first step of the sampler costs more or less than others, as every churned one is a first."""
        calls = self.solver.nfe(steps)
        forgetful = self.S_churn > 0.0 and remembers(self.solver)
        return None if forgetful and calls != steps else calls

    def start(self, times: Sequence[float]) -> tuple[tuple[float, ...], int, Any]:
        if self.S_churn > 0.0:
            check_starts_anew(self.solver, times, self.title)
        return tuple(times), 0, self.solver.start(times)

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: Any) -> Step:
        times, i, inner = state
        hat = self.raised(problem.process, s, len(times) - 1)
        if hat > s:
            x = renoise(problem.process, x, s, hat, problem.noise(hat, s), self.S_noise)
            inner = self.solver.start((hat, *times[i + 1 :]))
        step = self.solver.step(problem, x, hat, t, inner)
        return Step(step.x, step.x0, (times, i + 1, step.state))

    def raised(self, process: ForwardProcess, s: float, steps: int) -> float:
        """s', the time at which a step from s begins; not beyond what the network was trained on."""
        rho = math.exp(-process.lam(s))
        gamma = min(self.S_churn / steps, math.sqrt(2.0) - 1.0)
        if gamma == 0.0 or math.isinf(rho) or not self.S_tmin <= rho <= self.S_tmax:
            return s
        return min(float(process.t_of_rho((1.0 + gamma) * rho)), max(s, process.t_max))
