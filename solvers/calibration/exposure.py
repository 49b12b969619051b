"""Exposure bias, measured: how much more noise a network predicts on a run's own samples than on noisy clean ones."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from ..artifact import Artifact
from ..exposure_bias import RHO_MAX, Scaling
from ..method import part
from ..process import ForwardProcess
from ..solver import Problem, sample
from ..transform import Transformed
from .cohort import Cohort, Running
from .families import Plan
from .statistics import Part, over
from .teacher import teach

KIND = "exposure"
"""Of artifacts whose table has ``lambda``, log signal-to-noise, increasing, and ``factor``, of the same length."""

TRIED = (0.98, 0.99, 0.995, 1.005, 1.01, 1.02)
"""Uniform factors that are tried first; then twice halfway from the best to its neighbours."""

ROUNDS = 2

CLEARLY = 0.99
"""Share of the error without factors that those that are kept may leave."""


@dataclass(frozen=True)
class FoundEpsilonScaling(Scaling):
    """Divides the predicted noise by what *Measure Epsilon Scaling* found for your model, sampler and steps. For any sampler.

    As *Epsilon scaling*, with a factor for each level of noise from a file: linear in log signal-to-noise between those that were
    measured, constant beyond. No file changes nothing. Where sigma / alpha is above 50 the prediction is left alone.

    Source: Ning et al. (2023), arXiv:2308.15321.
    """

    id: ClassVar[str] = "FoundEpsilonScaling"
    title: ClassVar[str] = "Found epsilon scaling"
    paper: ClassVar[str] = "Ning et al. (2023), arXiv:2308.15321"

    calibration: Artifact | None = part(  # noqa: RUF009
        KIND, "A file of Measure Epsilon Scaling in models/quickstep.", default=None
    )

    def divisor(self, process: ForwardProcess, t: float) -> float:
        if self.calibration is None:
            return 1.0
        lam, factor = (np.array(self.calibration.table[name]) for name in ("lambda", "factor"))
        return float(over(lam, factor, process.lam(t))) if len(lam) > 1 else float(factor[0])


class Norms(NamedTuple):
    """The mean norm of the predicted noise at the times of a run: on its own samples, and on noisy clean ones."""

    times: list[float]
    own: np.ndarray
    forward: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        return self.own / np.maximum(self.forward, 1e-12)


def norms(
    parts: Sequence[Part], process: ForwardProcess, plan: Plan, seed: int = 0
) -> Generator[Norms | None, None, Norms]:
    """``Norms`` of the calls of a run, but where sigma / alpha is above ``RHO_MAX``; two runs' calls for each part. Yields those
    of the parts so far."""
    own, forward, times = np.zeros(1), np.zeros(1), []
    for i, one in enumerate(parts):
        seen: dict[float, list[float]] = {}

        def visit(problem: Problem, x: torch.Tensor, one=one, i=i, seen=seen) -> None:
            def size(x: torch.Tensor, x0: torch.Tensor, t: float) -> float:
                eps = (x - process.alpha(t) * x0) / process.sigma(t)
                return float(eps.flatten(1).norm(dim=1).sum())

            def denoise(x: torch.Tensor, t: Any) -> torch.Tensor:
                x0 = problem.denoise(x, t)
                if process.sigma(t) <= RHO_MAX * process.alpha(t):
                    seen[t] = [size(x, x0, t)]
                return x0

            sample(replace(problem, denoise=denoise), plan.solver, x, plan.times)
            for t, found in seen.items():
                noisy = one.noised(process, x, t, seed + i)
                found.append(size(noisy, problem.denoise(noisy, t), t))

        one.batch(visit)
        times = sorted(seen, reverse=True)
        both = np.array([seen[t] for t in times]).reshape(-1, 2)
        own, forward = own + both[:, 0], forward + both[:, 1]
        yield Norms(times, own, forward) if times else None
    return Norms(times, own, forward)


def scaling(process: ForwardProcess, times: Sequence[float], factor: Sequence[float]) -> FoundEpsilonScaling:
    """The transform with a factor for each of decreasing times."""
    table = {"lambda": [process.lam(t) for t in times], "factor": [float(f) for f in factor]}
    return FoundEpsilonScaling(Artifact(KIND, table))


class Choice(NamedTuple):
    """What was chosen, its name, what was measured, and the errors on samples kept aside before and after."""

    scaling: FoundEpsilonScaling
    label: str
    norms: Norms
    tried: dict[str, float]
    before: torch.Tensor
    after: torch.Tensor


def search(
    fit: Cohort, select: Cohort, report: Cohort, process: ForwardProcess, plan: Plan, teacher: int
) -> Generator[Norms | None, None, Choice]:
    """Factors from the norms, and uniform ones by trying; those whose samples are nearest to the teacher's, or none. Yields the
    norms while they are measured."""
    for cohort in (fit, select, report):
        yield from teach(cohort, process, teacher)
    parts = [Part(batch, x0) for batch, x0 in zip(fit.batches, fit.targets, strict=True)]
    found: Norms = yield from norms(parts, process, plan)

    def scaled(factor: Sequence[float]) -> Plan:
        return Plan(Transformed(plan.solver, scaling(process, found.times, factor)), plan.times)

    def uniform(b: float) -> list[float]:
        return [b] * len(found.times)

    candidates: dict[str, list[float]] = {"none": uniform(1.0)}
    if found.times:
        ratio = np.clip(found.ratio, 0.8, 1.25)
        candidates["as measured"] = ratio.tolist()
        candidates["their mean"] = uniform(float(ratio.mean()))
        if len(ratio) > 2:
            lam = process.lams(found.times)
            candidates["a line through them"] = np.polyval(np.polyfit(lam, ratio, 1), lam).tolist()
        candidates["the best uniform one"] = uniform((yield from _best_uniform(fit, lambda b: scaled(uniform(b)))))
    tried = {}
    for label, factor in candidates.items():
        loss = float((yield from select.errors(scaled(factor))).mean()) if found.times else 0.0
        tried[label] = loss if math.isfinite(loss) else math.inf
    label = min(tried, key=lambda name: tried[name])
    if not tried[label] < CLEARLY * tried["none"] - 1e-9:
        label = "none"
    before = yield from report.errors(plan)
    after = before if label == "none" else (yield from report.errors(scaled(candidates[label])))
    times = found.times or [plan.times[-2]]
    chosen = scaling(process, times, candidates[label] or [1.0])
    return Choice(chosen, label, found, tried, before, after)


def _best_uniform(cohort: Cohort, plan_of) -> Running:
    """The factor with the least error, by trying."""
    losses = {}

    def tried(values):
        for b in values:
            if b not in losses:
                losses[b] = float((yield from cohort.errors(plan_of(b))).mean())

    yield from tried((1.0, *TRIED))
    for _ in range(ROUNDS):
        known = sorted(losses)
        i = known.index(min(known, key=lambda b: losses[b]))
        yield from tried([0.5 * (known[i] + known[j]) for j in (i - 1, i + 1) if 0 <= j < len(known)])
    return min(losses, key=lambda b: losses[b])
