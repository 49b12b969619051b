"""How the end of a fitted solver's run moves with its numbers, from few network calls."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from ..process import ForwardProcess
from ..solver import Problem
from .asking import asked
from .cohort import Batch, Cohort, Running, sketch
from .families import Family, Plan
from .fitted import FittedSolver

SMALL, NEAR, TINY = 0.02, 0.03, 1e-7
"""Finite differences: of a parameter, for the network's step along x; of log noise-to-signal; of formulas, in double precision."""

ROOM = 2**30
"""Bytes of vectors above which runs are repeated instead."""

_PIECE = 2**16


def jacobian(cohort: Cohort, family: Family, eta: np.ndarray, share: float, lost: float) -> Running:
    """What ``Cohort.jacobian`` returns, for runs with a fitted solver at a fraction of its cost; for others by it.

    Such a run mixes x_0 and the predictions D_j, with numbers that are known functions of eta, so

        z_i = x_i / alpha_i = sum_j M_ij v_j,      v = x_0, D_0, D_1, ...,      D_i = F(z_i; y_i, delta_i),
        dz_i / d eta_p = sum_j dM_ij / d eta_p v_j + sum_j M_{i,j+1} dD_j / d eta_p,
        dD_i / d eta_p = F_z dz_i / d eta_p + F_y dy_i / d eta_p + F_delta d delta_i / d eta_p,

    y_i being log noise-to-signal, and delta_i the offset there; in z all kinds of models are the same. Only F_z asks the network
    more than once for all p, along each tangent dz_i / d eta_p. But tangents of one sample are nearly all in a space of few
    dimensions, as successive predictions hardly differ: the network is asked along its principal directions, for each sample its
    own, until all others together have no more than ``lost`` of their root mean square. All tangents are kept as combinations of
    the vectors seen so far. On the demo networks with 8 steps this is 70 calls for each sample, and 103 with 0.03, where repeated
    runs are 226.
    """
    plan = family.plan(eta)
    some = cohort.batches[: math.ceil(share * len(cohort.batches))]
    vectors = 12 * len(plan.times) * max(target[0].numel() * len(target) for target in cohort.targets)
    known = isinstance(plan.solver, FittedSolver) and plan.solver.at_home(plan.times)
    if not known or not len(eta) or 4 * vectors > ROOM:
        return (yield from cohort.jacobian(family, eta, share))
    found, formulas = [], None
    for batch in some:
        bundle = _Bundle(cohort, batch, family, eta, lost, formulas)
        found.append((yield from bundle.run()))
        formulas = bundle.formulas  # the same for all batches
    return torch.cat(found)


def mixture(plan: Plan, process: ForwardProcess) -> np.ndarray:
    """M, (n + 1, n + 1): what x_0, z_1 .. z_n are made of."""
    solver = plan.solver
    assert isinstance(solver, FittedSolver)
    M = np.zeros((len(plan.times), len(plan.times)))
    M[0, 0] = 1.0
    for i, (s, t) in enumerate(pairwise(plan.times)):
        q = process.sigma(t) / process.sigma(s)
        scale = solver.scales[i] if solver.scales else 1.0
        M[i + 1] = q * scale * M[i]
        for j, w in enumerate(solver.weights[i]):
            M[i + 1, i + 1 - j] += (process.alpha(t) - q * process.alpha(s)) * w
    return M / np.array([[1.0], *([process.alpha(t)] for t in plan.times[1:])])


@dataclass(frozen=True)
class Formulas:
    """M, y and delta of a run, and their derivatives by eta, which come first."""

    M: np.ndarray
    y: np.ndarray
    offsets: np.ndarray
    dM: np.ndarray
    dy: np.ndarray
    doffsets: np.ndarray

    @classmethod
    def of(cls, family: Family, eta: np.ndarray, process: ForwardProcess) -> Formulas:
        here = _numbers(family.plan(eta), process)
        moved = [_numbers(family.plan(eta + TINY * row), process) for row in np.eye(len(eta))]
        slopes = (np.stack([(m[k] - here[k]) / TINY for m in moved]) for k in range(3))
        return cls(*here, *slopes)


def _numbers(plan: Plan, process: ForwardProcess) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """M; y and delta at the inner times."""
    assert isinstance(plan.solver, FittedSolver)
    inner = plan.times[1:-1]
    y = np.log(process.rho(inner)) if inner else np.empty(0)
    return mixture(plan, process), y, np.array(plan.solver.offsets[1:] or [0.0] * len(inner), dtype=np.float64)


class _Bundle:
    """The tangents of one batch. ``v``: vectors seen, (samples, vectors, numbers); ``gram``: their inner products."""

    def __init__(
        self, cohort: Cohort, batch: Batch, family: Family, eta: np.ndarray, lost: float, formulas: Formulas | None
    ):  # fmt: skip
        self.cohort, self.batch, self.family, self.eta, self.lost = cohort, batch, family, eta, lost
        self.times = family.plan(eta).times
        self.v = self.gram = torch.empty(0)
        self.formulas = formulas
        self.places: list[int] = []  # of x_0, D_0, D_1, ... among the vectors
        self.moves: list[tuple[slice, torch.Tensor]] = []  # of D_0, D_1, ...: d / d eta, by which vectors

    def run(self) -> Running:
        for i in range(len(self.times) - 1):
            self.cohort.visit(self.batch, lambda problem, x, i=i: self._step(problem, x, i))
            yield
        T = self._tangents(len(self.times) - 1)
        short = torch.stack([sketch(v) for v in self.v.unbind(1)], 1)
        return torch.einsum("bpm,bms->bsp", T, short.double()).to(short.dtype)

    def _tangents(self, i: int) -> torch.Tensor:
        """d z_i / d eta, (samples, eta, vectors)."""
        f = self.formulas
        assert f is not None
        T = torch.zeros(len(self.gram), len(self.eta), self.v.shape[1], dtype=torch.float64)
        T[:, :, self.places[: i + 1]] += torch.from_numpy(f.dM[:, i, : i + 1])
        for j, (where, by) in enumerate(self.moves[:i]):
            T[:, :, where] += f.M[i, j + 1] * by
        return T

    def _keep(self, *vectors: torch.Tensor) -> None:
        new = torch.stack([v.flatten(1).cpu() for v in vectors], 1)
        new = new.to(torch.promote_types(new.dtype, torch.float32))
        self.v = torch.cat([self.v, new], 1) if self.v.numel() else new
        known, count = self.gram.shape[1], self.v.shape[1]
        products = torch.zeros(len(new), count - known, count, dtype=torch.float64)
        for some, every in zip(new.split(_PIECE, -1), self.v.split(_PIECE, -1), strict=True):
            products += some.double() @ every.double().mT
        gram = torch.zeros(len(new), count, count, dtype=torch.float64)
        gram[:, :known, :known] = self.gram
        gram[:, known:], gram[:, :, known:] = products, products.mT
        self.gram = gram

    def _step(self, problem: Problem, x: torch.Tensor, i: int) -> None:
        """Asks the network at z_i, and along what moves it."""
        if i == 0:
            self.gram = torch.empty(len(x), 0, 0, dtype=torch.float64)
            self.formulas = self.formulas or Formulas.of(self.family, self.eta, problem.process)
            self._keep(x)
            self.places.append(0)
            x0 = problem.denoise(x, self.times[0])
            self._made(x0, [], torch.zeros(len(x), len(self.eta), 0, dtype=torch.float64))
            return
        f, alpha = self.formulas, problem.process.alpha
        assert f is not None
        t, y, offset = self.times[i], f.y[i - 1], float(f.offsets[i - 1])

        def asks(z: torch.Tensor, t: float = t, offset: float = offset) -> torch.Tensor:
            return asked(problem, (self.times[0], t, 0.0), (0.0, offset))(z * alpha(t), t)

        T = self._tangents(i)
        products = T @ self.gram @ T.mT
        lengths, along = principal(products, self.lost)
        h = (
            (SMALL * products.diagonal(dim1=1, dim2=2).clamp(min=0.0).amax(1).sqrt())
            .view(-1, *[1] * (x.ndim - 1))
            .to(x)
        )
        units = ((along / lengths[:, None]).mT @ T).to(self.v.dtype)  # (samples, directions, vectors)
        M = torch.from_numpy(f.M[i, : i + 1]).to(self.v.dtype)
        z = torch.einsum("m,bmd->bd", M, self.v[:, self.places]).view(x.shape).to(x)
        x0 = asks(z)
        seen, by = [], along * lengths[:, None]
        for k in range(lengths.shape[1]):
            q = (units[:, k, None] @ self.v).view(x.shape).to(x)
            seen.append((asks(z + h * q) - x0) / h)
        if np.any(f.dy[:, i - 1]):
            seen.append((x0 - asks(z, float(problem.process.t_of_rho(math.exp(y - NEAR))))) / NEAR)
            by = _beside(by, f.dy[:, i - 1])
        if np.any(f.doffsets[:, i - 1]):
            near = -NEAR if offset > 0.0 else NEAR  # not below the model's range from 0
            seen.append((asks(z, offset=offset + near) - x0) / near)
            by = _beside(by, f.doffsets[:, i - 1])
        self._made(x0, seen, by)

    def _made(self, x0: torch.Tensor, slopes: list[torch.Tensor], by: torch.Tensor) -> None:
        """A prediction, its slopes, and how they add up to its tangents."""
        at = self.v.shape[1]
        self.places.append(at)
        self.moves.append((slice(at + 1, at + 1 + len(slopes)), by))
        # Where the network's answer is no number its slope counts as 0: every step is tried before it is taken.
        self._keep(x0, *(torch.nan_to_num(slope, 0.0, 0.0, 0.0) for slope in slopes))


def principal(gram: torch.Tensor, lost: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths and coefficients, (samples, r) and (samples, vectors, r), of the fewest principal directions of vectors with these
    inner products such that all others together have no more than ``lost`` of their root mean square, in every sample."""
    squares, along = torch.linalg.eigh(gram)
    squares, along = squares.flip(-1).clamp(min=0.0), along.flip(-1)
    total = squares.sum(-1, keepdim=True)
    rest = total - squares.cumsum(-1)
    r = int((rest > lost**2 * total).sum(-1).max()) + 1 if float(total.max()) > 0.0 else 0
    along = along[..., :r]
    # Of both signs always the same: finite differences depend on it.
    along = along * along.gather(1, along.abs().argmax(1, keepdim=True)).sign()
    lengths = squares[:, :r].clamp(min=1e-12 * float(total.max() or 1.0)).sqrt()
    return lengths, along


def _beside(by: torch.Tensor, column: np.ndarray) -> torch.Tensor:
    return torch.cat([by, torch.from_numpy(column)[None, :, None].expand(len(by), -1, 1)], -1)
