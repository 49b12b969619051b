"""Families of runs by parameters: what an optimizer searches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from ..artifact import Artifact
from ..process import ForwardProcess
from ..solver import Problem, Solver, sample
from .curve import Curve
from .fitted import KIND, FittedSolver


class Plan(NamedTuple):
    """A way to sample."""

    solver: Solver
    times: list[float]


class Family(ABC):
    """Runs by a vector theta, through natural coordinates eta in which each number acts from one step on.

    Optimizers move theta, which may be any number; derivatives of runs are taken by eta, where a run has to be repeated only
    from the step on that the number acts on, and d eta / d theta is known.
    """

    @property
    @abstractmethod
    def since(self) -> list[int]:
        """For each eta, the first step that it changes."""

    @property
    @abstractmethod
    def delta(self) -> np.ndarray:
        """For each eta, the step of finite differences: well above rounding of times and of half precision."""

    @abstractmethod
    def natural(self, theta: np.ndarray) -> np.ndarray:
        """eta."""

    @abstractmethod
    def slope(self, theta: np.ndarray) -> np.ndarray:
        """d eta / d theta."""

    @abstractmethod
    def plan(self, eta: np.ndarray) -> Plan:
        """The run."""


@dataclass(frozen=True)
class Schedules(Family):
    """One solver on all schedules of a ``Curve``; theta: logits, eta: log noise-to-signal of the inner times."""

    solver: Solver
    curve: Curve

    @property
    def since(self) -> list[int]:
        return list(range(self.curve.n - 1))

    @property
    def delta(self) -> np.ndarray:
        return np.full(self.curve.n - 1, min(0.06, 0.5 * self.curve.gap))

    def natural(self, theta: np.ndarray) -> np.ndarray:
        return self.curve.levels(theta)

    def slope(self, theta: np.ndarray) -> np.ndarray:
        return self.curve.slope(theta)

    def plan(self, eta: np.ndarray) -> Plan:
        return Plan(self.solver, self.curve.times(eta))

    def theta(self, times: Sequence[float]) -> np.ndarray:
        """Of the nearest schedule of the family."""
        return self.curve.logits(times)


@dataclass(frozen=True)
class Weights(Family):
    """Fitted solvers on one schedule; theta = eta: the weights of all predictions but the newest, step by step."""

    times: tuple[float, ...]
    memory: int

    @property
    def counts(self) -> list[int]:
        """Of older predictions that each step uses."""
        return [min(i, self.memory - 1) for i in range(len(self.times) - 1)]

    @property
    def since(self) -> list[int]:
        return [i for i, count in enumerate(self.counts) for _ in range(count)]

    @property
    def delta(self) -> np.ndarray:
        return np.full(sum(self.counts), 0.02)

    def natural(self, theta: np.ndarray) -> np.ndarray:
        return theta

    def slope(self, theta: np.ndarray) -> np.ndarray:
        return np.eye(len(theta))

    def plan(self, eta: np.ndarray) -> Plan:
        return fitted_plan(self.times, self.rows(eta))

    def rows(self, eta: np.ndarray) -> list[list[float]]:
        """Weights for each step, newest first."""
        rows, at = [], 0
        for count in self.counts:
            older = [float(w) for w in eta[at : at + count]]
            rows.append([1.0 - sum(older), *older])
            at += count
        return rows

    def theta(self, rows: Sequence[Sequence[float]]) -> np.ndarray:
        """Of given weights; missing ones are 0."""
        padded = [[*row, *[0.0] * count][1 : count + 1] for row, count in zip(rows, self.counts, strict=True)]
        return np.array([w for row in padded for w in row])


@dataclass(frozen=True)
class Joint(Family):
    """Fitted solvers on all schedules of a ``Curve``: the parameters of ``Schedules``, then those of ``Weights``."""

    curve: Curve
    memory: int

    @property
    def schedules(self) -> Schedules:
        return Schedules(FittedSolver(), self.curve)

    def weights(self, times: Sequence[float]) -> Weights:
        return Weights(tuple(times), self.memory)

    @property
    def _some(self) -> Weights:
        """All that does not depend on the times."""
        return self.weights([float(i) for i in range(self.curve.n, -1, -1)])

    @property
    def since(self) -> list[int]:
        return self.schedules.since + self._some.since

    @property
    def delta(self) -> np.ndarray:
        return np.concatenate([self.schedules.delta, self._some.delta])

    def natural(self, theta: np.ndarray) -> np.ndarray:
        n = self.curve.n
        return np.concatenate([self.curve.levels(theta[:n]), theta[n:]])

    def slope(self, theta: np.ndarray) -> np.ndarray:
        n = self.curve.n
        whole = np.zeros((len(theta) - 1, len(theta)))
        whole[: n - 1, :n] = self.curve.slope(theta[:n])
        whole[n - 1 :, n:] = np.eye(len(theta) - n)
        return whole

    def plan(self, eta: np.ndarray) -> Plan:
        n = self.curve.n
        return self.weights(self.curve.times(eta[: n - 1])).plan(eta[n - 1 :])

    def theta(self, times: Sequence[float], rows: Sequence[Sequence[float]]) -> np.ndarray:
        """Of given weights on the schedule of the curve nearest to ``times``."""
        return np.concatenate([self.curve.logits(times), self.weights(times).theta(rows)])


def fitted_plan(
    times: Sequence[float],
    rows: Sequence[Sequence[float]],
    offsets: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
) -> Plan:
    """A fitted solver with these weights, newest first, on its times, and with offsets and scales if there are any."""
    table: dict[str, Any] = {"sigmas": [float(t) for t in times], "weights": [list(row) for row in rows]}
    for name, values in (("offsets", offsets), ("scales", scales)):
        if values is not None:
            table[name] = [float(value) for value in values]
    return Plan(FittedSolver(Artifact(KIND, table)), table["sigmas"])


def written(solver: Solver, process: ForwardProcess, times: Sequence[float]) -> Plan:
    """A linear solver, written as a fitted solver with a memory of all predictions, which makes the same run.

    Run on unit vectors: the start is the first one, the i-th call of the network returns the next one. Then every x at which the
    network is called is the list of what it is made of. Correctors included: what they change is in the later points.

    Raises ValueError for solvers that add noise, take other than one call per step, or are not exact on constants.
    """
    n = len(times) - 1
    if solver.stochastic or solver.nfe(n) != n:
        raise ValueError(f"{solver.title} is not a deterministic sampler with one network call per step.")
    units, points = torch.eye(n + 1, dtype=torch.float64), []

    def denoise(x: torch.Tensor, t: Any) -> torch.Tensor:
        points.append(x[0].clone())
        return units[len(points)][None]

    points.append(sample(Problem(denoise, process), solver, units[:1], times)[0])
    rows = []
    for i, (s, t) in enumerate(pairwise(times)):
        q = process.sigma(t) / process.sigma(s)
        w = (points[i + 1] - q * points[i]) / (process.alpha(t) - q * process.alpha(s))
        row = w[1 : i + 2].flip(0).tolist()
        if abs(float(w[0])) > 1e-6 or abs(sum(row) - 1.0) > 1e-6:
            raise ValueError(f"{solver.title} is not exact on constant predictions.")
        rows.append(row)
    return fitted_plan(times, rows)
