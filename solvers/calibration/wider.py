"""Families of runs with more numbers than another family has."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from .families import Family, Plan, fitted_plan
from .fitted import FittedSolver


@dataclass(frozen=True)
class Wider(Family):
    """Abstract: another family's runs of n steps, changed by numbers of their own, which come last:

    eta = MOST tanh(theta / MOST).
    """

    inner: Family
    n: int
    stages: bool = False
    """Whether the network is called between times too."""

    most: float = 0.5
    small: float = 0.02

    @property
    @abstractmethod
    def begins(self) -> list[int]:
        """For each number, the first step that it changes."""

    @abstractmethod
    def numbers(self, plan: Plan) -> list[float]:
        """Those of a run."""

    @abstractmethod
    def changed(self, plan: Plan, numbers: list[float]) -> Plan:
        """A run of the inner family with these."""

    @property
    def since(self) -> list[int]:
        return [*self.inner.since, *self.begins]

    @property
    def delta(self) -> np.ndarray:
        return np.concatenate([self.inner.delta, np.full(len(self.begins), self.small)])

    def natural(self, theta: np.ndarray) -> np.ndarray:
        inner, own = self._parts(theta)
        return np.concatenate([self.inner.natural(inner), self.most * np.tanh(own / self.most)])

    def slope(self, theta: np.ndarray) -> np.ndarray:
        inner, own = self._parts(theta)
        slope = self.inner.slope(inner)
        whole = np.zeros((slope.shape[0] + len(own), len(theta)))
        whole[: slope.shape[0], : slope.shape[1]] = slope
        whole[slope.shape[0] :, slope.shape[1] :] = np.diag(1.0 - np.tanh(own / self.most) ** 2)
        return whole

    def plan(self, eta: np.ndarray) -> Plan:
        inner, own = self._parts(eta)
        return self.changed(self.inner.plan(inner), own.tolist())

    def begin(self, inner: np.ndarray, plan: Plan) -> np.ndarray:
        """theta of the inner family's parameters, with the numbers of a run."""
        share = np.clip(np.array(self.numbers(plan), dtype=np.float64) / self.most, -0.999, 0.999)
        return np.concatenate([inner, self.most * np.arctanh(share)])

    def _parts(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = len(values) - len(self.begins)
        return values[:at], values[at:]


@dataclass(frozen=True)
class Rescaled(Wider):
    """Fitted solvers whose steps are no longer exact on constants: of each step, what its weights are more than 1 together, and,
    but for the last one, by what the sample's part is multiplied, less 1."""

    small: float = 0.01

    @property
    def begins(self) -> list[int]:
        return [*range(self.n), *range(self.n - 1)]

    def numbers(self, plan: Plan) -> list[float]:
        assert isinstance(plan.solver, FittedSolver)
        more = [sum(row) - 1.0 for row in plan.solver.weights]
        return more + [a - 1.0 for a in (plan.solver.scales or [1.0] * self.n)[:-1]]

    def changed(self, plan: Plan, numbers: list[float]) -> Plan:
        assert isinstance(plan.solver, FittedSolver)
        more, scales = numbers[: self.n], [*(1.0 + a for a in numbers[self.n :]), 1.0]
        rows = [[row[0] + b, *row[1:]] for row, b in zip(plan.solver.weights, more, strict=True)]
        return fitted_plan(plan.times, rows, scales=scales)
