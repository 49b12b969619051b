"""OptimalSteps: the sigmas with which the student's own run stays nearest to the teacher's states."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ..kernel import axpy
from ..method import param
from ..process import ForwardProcess
from ..solver import Problem
from .cohort import Batch, Cohort
from .curve import Curve
from .grams import gram, grid, jumps
from .proposal import Measured, Measuring, Proposal
from .teacher import Trajectories


@dataclass(frozen=True)
class OptimalSteps(Proposal):
    """Runs Euler steps of your model between all pairs of sigmas, and keeps at each sigma the run that is nearest to a run of
    many steps. For numbers of steps up to the one it was measured with.

    For each sample, with the teacher's states z_j at levels t_0 > ... > t_N = 0,

        best_0(0) = z_0
        best_n(j) = the nearest to z_j of all  q x + c D(x, t_i),   x = best_{n-1}(i),  i < j         (one Euler step)

    and the levels that led to best_S(N) are the sample's schedule of S steps. Other than in GITS, errors made on the way are
    part of what is compared. The schedule of a number of steps is the median over samples of each sigma's level.

    The nearest state at a level need not be on the best way to the end, so this is no exact dynamic program; ``beam`` keeps more
    than one state per level, at as many times the cost. Exactly n steps are taken, from the start on: the authors' program
    also lets shorter ways win and runs begin at any level. Numbers of steps between measured ones are not interpolated.

    It costs about ``levels`` network calls per step and sample. It is for Euler steps; with other samplers it is only a
    beginning. Medians of levels need not be a good schedule for any sample. So its proposal is tried, and others on the way to
    it from the best usual schedule, and the finished samples decide. Mean error of 400 other samples of a mixture of Gaussians,
    best of Karras and exponential -> kept, at 5 and 10 steps: Euler .212 -> .166, .087 -> .071; DPM-Solver++ 2M .187 -> .154,
    .020 -> .020. As proposed: Euler .166, .076; 2M .154, .047. Demo DiT at 8 steps of 2M, CFG 4, 4 samples measured, 8 chose and
    8 others reported: .077 -> .062 from the best usual schedule (Beta). The demo UNet was not measured.

    Source: Pei et al. (2025), arXiv:2503.21774, algorithm 1; the median over samples from the authors' program.
    """

    id: ClassVar[str] = "OptimalSteps"
    title: ClassVar[str] = "OptimalSteps"
    paper: ClassVar[str] = "Pei et al. (2025), arXiv:2503.21774"
    states: ClassVar[bool] = True

    images: int = param(8, "Samples that are measured, each with as many calls: 5 to 12 are enough.", min=1, max=1024)
    levels: int = param(40, "Noise levels to choose from: network calls per step and sample.", min=8, max=200)
    beam: int = param(1, "States kept at each level. More find better ways, at as many times the cost.", min=1, max=8)

    @property
    def most(self) -> int:
        return self.levels

    def measure(self, cohort: Cohort, process: ForwardProcess, teacher: Trajectories | None, steps: int) -> Measuring:
        assert teacher is not None
        chosen, times = grid(teacher, self.levels)
        ways: list[list[list[int]]] = []
        for batch, ends in zip(cohort.batches, cohort.targets, strict=True):
            if len(ways) >= self.images:
                break
            rows = min(len(ends), self.images - len(ways))
            z = [torch.cat([teacher.x.get(i, len(ways) + r, 1).flatten(1) for i in chosen]) for r in range(rows)]
            z = [torch.cat([states, end.flatten()[None].float()]) for states, end in zip(z, ends, strict=False)]
            for made in self._runs(cohort, batch, process, times, z, steps):
                if made is not None:
                    ways += made
                yield None
        yield {"sigmas": times, "ways": ways}

    def _runs(
        self,
        cohort: Cohort,
        batch: Batch,
        process: ForwardProcess,
        times: list[float],
        z: list[torch.Tensor],
        steps: int,
    ):
        """Yields None after every visit, and in the end for each sample the ways of 2 .. steps steps."""
        N, (q, c) = len(times) - 1, jumps(process, times)
        shape: list[int] = []
        # beams[r][i]: the states of sample r at level i, each with the levels that led to it.
        beams: list[dict[int, list[tuple[torch.Tensor, list[int]]]]] = [{0: [(states[0], [0])]} for states in z]
        ways: list[list[list[int]]] = [[] for _ in z]
        for n in range(1, steps + 1):
            slots = [(i, b) for i in range(N) for b in range(self.beam) if any(len(s.get(i, [])) > b for s in beams)]

            def visit(problem: Problem, x: torch.Tensor, slots=slots, beams=beams) -> list[torch.Tensor]:
                shape[:] = x.shape[1:]
                return [
                    problem.denoise(_stacked(beams, x, i, b), times[i])[: len(beams)].flatten(1).cpu() for i, b in slots
                ]

            made = cohort.visit(batch, visit)
            yield None
            for r, states in enumerate(z):
                origins = [(k, i, *beams[r][i][b]) for k, (i, b) in enumerate(slots) if len(beams[r].get(i, [])) > b]
                x, D = torch.stack([o[2] for o in origins]), torch.stack([made[o[0]][r] for o in origins]).float()
                beams[r] = self._nearest(x, D, states, [(o[1], o[3]) for o in origins], q, c, range(n, N + 1))
                if n > 1:
                    ways[r].append(beams[r][N][0][1])
        yield ways

    def _nearest(self, x, D, z, origins, q, c, targets) -> dict[int, list[tuple[torch.Tensor, list[int]]]]:
        """For each level the states that come nearest to z, best first, of all jumps to it."""
        m, levels = len(x), np.array([i for i, _ in origins])
        G = gram(torch.cat([x, D, z]))
        own = np.diag(G)
        found = {}
        for j in targets:
            a, b = q[levels, j], c[levels, j]
            square = (
                a**2 * own[:m] + b**2 * own[m : 2 * m] + own[2 * m + j] + 2.0 * (a * b * np.diag(G[m : 2 * m, :m])
                - a * G[:m, 2 * m + j] - b * G[m : 2 * m, 2 * m + j])
            )  # fmt: skip
            square[levels >= j] = np.inf
            near = [k for k in np.argsort(square, kind="stable")[: self.beam] if math.isfinite(square[k])]
            if near:
                found[j] = [(axpy(x[k] * float(a[k]), D[k], float(b[k])), [*origins[k][1], int(j)]) for k in near]
        return found

    def times(self, measured: Measured, process: ForwardProcess, steps: int, order: int) -> list[float]:
        ways = [way for sample in measured["ways"] for way in sample if len(way) == steps + 1]
        if not ways:
            longest = max((len(way) - 1 for sample in measured["ways"] for way in sample), default=0)
            raise ValueError(
                f"OptimalSteps was measured for at most {longest} steps, not for {steps}; calibrate again."
            )
        middle = np.median(np.array(ways), axis=0)[1:-1]
        y = np.log(process.rho(measured["sigmas"][1:-1]))
        levels = np.interp(middle, np.arange(1, len(y) + 1), y)
        return Curve(process, process.t_max, process.t_min, steps).times(levels)


def _stacked(beams, x: torch.Tensor, i: int, b: int) -> torch.Tensor:
    """A batch of the states in one slot; where a sample has none there, its start, whose prediction is not used."""
    rows = x.clone()
    for r, states in enumerate(beams):
        if len(states.get(i, [])) > b:
            rows[r] = states[i][b][0].reshape(x.shape[1:]).to(x)
    return rows
