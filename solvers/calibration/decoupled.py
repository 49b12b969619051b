"""Decoupled times: the network is asked at other noise levels than the solver computes with. LD3's second vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from ..artifact import Artifact
from ..method import part
from ..process import RectifiedFlow, VarianceExploding
from ..solver import Denoise, Problem, SameCost, Solver, Step, Wrapper
from ..transform import Transform, Transformed
from .asking import MOST, asked, check_sigmas
from .families import Plan, Schedules, fitted_plan
from .fitted import FittedSolver
from .wider import Wider

KIND = "decoupled_schedule"
"""Of artifacts: their table has ``sigmas``, n + 1 of them, and ``offsets``, one for each of the first n, in log noise-to-signal."""


@dataclass(frozen=True)
class DecoupledTimes(Transform):
    """Asks the network at slightly other noise levels than those of the sigmas, which LD3 found for your model, sampler and
    number of steps: connect Found Schedule with the same file.

    In few steps a sample at noise level k is not quite what the network expects at k. At the i-th sigma it is asked for

        k_c = k exp(delta_i),     k = sigma / alpha,

    with the sample scaled to what a sample of that level would be, and its noise prediction is taken for that at sigma:
    D = (x - sigma eps_c) / alpha. Between sigmas delta is linear in log k. delta_0 = 0. No further network calls.

    Without a file it is the sampler as it is. On other sigmas than those of the file it refuses to run.

    Source: Tong et al. (2024), arXiv:2405.15506; the scaling of the sample is this pack's.
    """

    id: ClassVar[str] = "DecoupledTimes"
    title: ClassVar[str] = "Decoupled times"
    paper: ClassVar[str] = "Tong et al. (2024), arXiv:2405.15506"

    calibration: Artifact | None = part(  # noqa: RUF009
        KIND, "A file of LD3 in models/quickstep; none: the sampler as it is.", None
    )

    def __post_init__(self):
        if self.calibration is None:
            return
        if self.calibration.kind != KIND:
            raise ValueError(f"Decoupled times: the file holds {self.calibration.kind}, but {KIND} is needed here.")
        sigmas, offsets = (self.calibration.table.get(name) for name in ("sigmas", "offsets"))
        if not all(isinstance(row, list) and all(type(v) in (int, float) for v in row) for row in (sigmas, offsets)):
            raise ValueError("Decoupled times: the file must hold a list of sigmas and a list of offsets.")
        if len(sigmas) != len(offsets) + 1 or not offsets or offsets[0] != 0.0 or max(map(abs, offsets)) > MOST:
            raise ValueError(
                f"Decoupled times: the file must hold one offset for each sigma but the last, the first one 0, none above {MOST:g}."
            )

    def around(self, problem: Problem, times: Sequence[float]) -> Denoise:
        if self.calibration is None or len(times) < 2:
            return problem.denoise
        check_sigmas(times, self.calibration.table["sigmas"], self.title, "they were found")
        return asked(problem, times, self.calibration.table["offsets"])


@dataclass(frozen=True)
class Asked(SameCost):
    """A solver in a run over ``times`` with these offsets, as searches need it: its state is that of the solver."""

    times: tuple[float, ...] = ()
    offsets: tuple[float, ...] = ()

    @property
    def convergence_order(self) -> int:
        return self.solver.convergence_order

    def start(self, times: Sequence[float]) -> Any:
        return self.solver.start(times)

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: Any) -> Step:
        return self.solver.step(replace(problem, denoise=asked(problem, self.times, self.offsets)), x, s, t, state)


@dataclass(frozen=True)
class Decoupled(Wider):
    """Another family's runs with decoupled times: an offset for each inner one, smaller than ``MOST``."""

    most: float = MOST - 0.03  # finite differences go further, by ``small``

    @property
    def begins(self) -> list[int]:
        if isinstance(self.inner, Schedules) and transforms(self.inner.solver):
            return [0] * (self.n - 1)
        # Between two times the network is asked with an offset between theirs.
        return [i if self.stages else i + 1 for i in range(self.n - 1)]

    def numbers(self, plan: Plan) -> list[float]:
        return offsets_of(plan)[1:]

    def changed(self, plan: Plan, numbers: list[float]) -> Plan:
        return decoupled(plan.solver, plan.times, [0.0, *numbers])


def decoupled(solver: Solver, times: Sequence[float], offsets: Sequence[float]) -> Plan:
    """A run with these offsets; a fitted solver on its own sigmas keeps them itself."""
    if isinstance(solver, FittedSolver) and solver.at_home(times):
        return fitted_plan(times, solver.weights, offsets, solver.scales or None)
    return Plan(Asked(solver, tuple(times), tuple(offsets)), list(times))


def transforms(solver: Solver) -> bool:
    """Whether there is a transform in it, which keeps the denoiser of the first step, offsets included, to the end of the run."""
    return isinstance(solver, Transformed) or (isinstance(solver, Wrapper) and transforms(solver.solver))


def levels(found: Artifact) -> list[float]:
    """The noise levels at which the network is asked, as sigmas."""
    process = RectifiedFlow() if found.found_for.process == "flow" else VarianceExploding()
    first, *inner, last = found.table["sigmas"]
    k = process.rho(inner) * np.exp(found.table["offsets"][1:])
    return [first, *np.atleast_1d(process.t_of_rho(k)).tolist(), last]


def offsets_of(plan: Plan) -> list[float]:
    """Those of a run; zeros where it has none."""
    solver, zeros = plan.solver, [0.0] * (len(plan.times) - 1)
    if isinstance(solver, Asked) or (isinstance(solver, FittedSolver) and solver.at_home(plan.times)):
        return list(solver.offsets) or zeros
    return zeros
