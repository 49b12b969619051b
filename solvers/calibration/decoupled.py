"""Decoupled times: the network is asked at other noise levels than the solver computes with. LD3's second vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from ..artifact import Artifact
from ..method import part
from ..process import RectifiedFlow, VarianceExploding
from ..solver import Denoise, Problem, SameCost, Solver, Step
from ..transform import Transform
from .asking import MOST, asked
from .families import Family, Plan, fitted_plan
from .fitted import FittedSolver

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
        sigmas = self.calibration.table["sigmas"]
        if len(sigmas) != len(times):
            raise ValueError(
                f"Decoupled times: they were found for {len(sigmas) - 1} steps, and this run has {len(times) - 1}."
            )
        for given, meant in zip(times, sigmas, strict=True):
            if not math.isclose(given, meant, rel_tol=1e-4, abs_tol=1e-9):
                raise ValueError(
                    f"Decoupled times: sigma {given:g} was given where they were found for {meant:g}; connect the sigmas of "
                    "the same file (Found Schedule)."
                )
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
class Decoupled(Family):
    """Another family's runs with decoupled times: its parameters, then one for each inner time,

    delta_i = MOST tanh(theta_i / MOST).
    """

    inner: Family
    n: int
    stages: bool = False
    """Whether the network is called between times too, with an offset between theirs."""

    @property
    def since(self) -> list[int]:
        return [*self.inner.since, *(i if self.stages else i + 1 for i in range(self.n - 1))]

    @property
    def delta(self) -> np.ndarray:
        return np.concatenate([self.inner.delta, np.full(self.n - 1, 0.02)])

    def natural(self, theta: np.ndarray) -> np.ndarray:
        at = len(theta) - (self.n - 1)
        return np.concatenate([self.inner.natural(theta[:at]), MOST * np.tanh(theta[at:] / MOST)])

    def slope(self, theta: np.ndarray) -> np.ndarray:
        at = len(theta) - (self.n - 1)
        inner = self.inner.slope(theta[:at])
        whole = np.zeros((inner.shape[0] + self.n - 1, len(theta)))
        whole[: inner.shape[0], :at] = inner
        whole[inner.shape[0] :, at:] = np.diag(1.0 - np.tanh(theta[at:] / MOST) ** 2)
        return whole

    def plan(self, eta: np.ndarray) -> Plan:
        at = len(eta) - (self.n - 1)
        solver, times = self.inner.plan(eta[:at])
        return decoupled(solver, times, [0.0, *map(float, eta[at:])])

    def theta(self, inner: np.ndarray, offsets: Sequence[float]) -> np.ndarray:
        """Of the inner family's parameters, and given offsets."""
        share = np.clip(np.array(offsets[1:], dtype=np.float64) / MOST, -0.999, 0.999)
        return np.concatenate([inner, MOST * np.arctanh(share)])


def decoupled(solver: Solver, times: Sequence[float], offsets: Sequence[float]) -> Plan:
    """A run with these offsets; a fitted solver keeps them itself."""
    if isinstance(solver, FittedSolver):
        return fitted_plan(times, solver.weights, offsets)
    return Plan(Asked(solver, tuple(times), tuple(offsets)), list(times))


def levels(found: Artifact) -> list[float]:
    """The noise levels at which the network is asked, as sigmas."""
    process = RectifiedFlow() if found.found_for.process == "flow" else VarianceExploding()
    first, *inner, last = found.table["sigmas"]
    k = process.rho(inner) * np.exp(found.table["offsets"][1:])
    return [first, *np.atleast_1d(process.t_of_rho(k)).tolist(), last]


def offsets_of(plan: Plan) -> list[float]:
    """Those of a run; zeros where it has none."""
    offsets = list(plan.solver.offsets) if isinstance(plan.solver, Asked | FittedSolver) else []
    return offsets or [0.0] * (len(plan.times) - 1)
