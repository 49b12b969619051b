"""rhoRK-DEIS: classical explicit Runge-Kutta methods in the noise-to-signal ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .declared import FRAME
from .kernel import Noise, framed
from .method import param
from .runge_kutta import Tableau, classical, run_stages
from .solver import Problem, Solver, Step

TABLEAUS: dict[str, Tableau] = {
    "2heun": classical((1,), ((1,),), (1 / 2, 1 / 2)),
    "3kutta": classical((1 / 2, 1), ((1 / 2,), (-1, 2)), (1 / 6, 4 / 6, 1 / 6)),
    "3heun": classical((1 / 3, 2 / 3), ((1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    "3ral": classical((1 / 2, 3 / 4), ((1 / 2,), (0, 3 / 4)), (2 / 9, 3 / 9, 4 / 9)),
    "3vdh": classical((8 / 15, 2 / 3), ((8 / 15,), (1 / 4, 5 / 12)), (1 / 4, 0, 3 / 4)),
    "3ssprk": classical((1, 1 / 2), ((1,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 4 / 6)),
    "4rk": classical((1 / 2, 1 / 2, 1), ((1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 2 / 6, 2 / 6, 1 / 6)),
}
"""By name: the digit is the order and the number of network calls per step."""


@dataclass(frozen=True)
class RhoRK(Solver):
    """Heun, Kutta and Runge-Kutta methods of order 2 to 4 (rhoRK-DEIS): two to four network calls per step, for accurate runs
    with many calls and low guidance.

    With y = x / alpha, rho = sigma / alpha and eps = (x - alpha D) / sigma the model's equation is dy / drho = eps, which a
    Butcher array (c, a, b) solves from rho_s over H = rho_t - rho_s:

    y_i = y_s + H sum_j a_ij eps_j  at rho_s + c_i H,        y_t = y_s + H sum_i b_i eps_i.

    2heun is the deterministic sampler of EDM and ComfyUI's "heun". 3kutta, 3heun (Heun's third-order method), 3ral
    (Ralston), 3vdh (van der Houwen) and 3ssprk (strong stability preserving) differ in their inner points only; 4rk is
    the classical method. The last step to 0 is an Euler step, one call.

    On flow models the frame vef (auto) takes sigma and x themselves, dx / dsigma = (x - D) / sigma. In the frame snr, rho
    grows beyond all bounds towards sigma = 1, and errors are 10 to 900 times larger.

    Weaknesses: with 20 calls and fewer, or at high CFG, methods of one call per step are closer at the same cost. All but 3heun,
    3ral and 3vdh evaluate at the end of the step and weigh that slope with all of H: a step over a ratio of sigmas in the
    hundreds (few steps on a zero-terminal-SNR model, sigma 4500 to 1) makes nonsense.

    Source: Zhang and Chen (2022), arXiv:2204.13902.
    """

    id: ClassVar[str] = "RhoRK"
    title: ClassVar[str] = "rhoRK-DEIS"
    paper: ClassVar[str] = "Zhang and Chen (2022), arXiv:2204.13902"

    method: str = param(
        "2heun",
        "The digit is the order and the network calls per step. Start with 2heun; 4rk pays from about 60 calls.",
        options=tuple(TABLEAUS),
    )
    frame: str = param(**FRAME)

    draws: ClassVar[None] = None

    @property
    def calls(self) -> int:
        return len(TABLEAUS[self.method])

    @property
    def convergence_order(self) -> int:
        return int(self.method[0])

    def start(self, times: Sequence[float]) -> None:
        return None

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: Any) -> Step:
        x0 = problem.denoise(x, s)
        if t == 0.0:
            return Step(x0, x0, None)
        process = framed(problem.process, "snr" if self.frame == "snr" else "vef")
        return Step(run_stages(problem, process, Noise("rho"), TABLEAUS[self.method], x, s, t, x0).x, x0, None)
