"""USF: a sampler of which every step is chosen by itself, run from a table; and other samplers written as such tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch

from .dpm_solver_v3 import Statistical
from .ems import KIND, ModelStatistics
from .kernel import Data, Kernel, Noise, below_noise, framed
from .method import param, part
from .multistep import NO_HOOKS, Bend, History, Multistep, Place, Rule, nearest, weigh
from .process import ForwardProcess
from .solver import Problem, Step
from .usf_table import RELAXATIONS, Corrector, Row, Table, Update, parse
from .weights import phi

_FACTOR: dict[str, Callable[[float, float], float]] = {
    "none": lambda z, c: 1.0,
    "dpmsolver-2": lambda z, c: phi(1, z) / (2.0 * phi(2, z)),
    "unipc-bh1": lambda z, c: 1.0 / (2.0 * phi(2, z)),
    "unipc-bh2": lambda z, c: phi(1, z) / (2.0 * phi(2, z)),
    "0.5exp": lambda z, c: 1.0 + 0.5 * math.expm1(z),
    "-0.5exp": lambda z, c: 1.0 - 0.5 * math.expm1(z),
    "linear": lambda z, c: 1.0 + c * z,
}
"""What the first derivative is multiplied by; z = h, and -h for data predictions except in linear."""


@dataclass(frozen=True)
class USF(Multistep):
    """Unified sampling framework: each step has its own kind, order, points and corrector, read from a table.

    For schedules that were searched for one model and number of steps, written by hand, or exported from other samplers and
    then changed. A step with prediction m, from the point at s (the latest one or an older one) to t, is

    x_t = A x_s + B sum_{k < order} M_k r_k m^(k),     m^(k) from the polynomial through the predictions chosen for it,

    A, B and the moments M_k being those of data prediction, noise prediction or DPM-Solver-v3, m^(k) the k-th Taylor
    coefficient over the step, and r_1 a relaxation 1 + O(h); then maybe corrected. DDIM, DPM-Solver(++), DEIS, iPNDM, UniPC
    and DPM-Solver-v3 are tables of it, and so are single-step solvers whose inner points are sigmas of the schedule.

    Of the table, a JSON object with "usf": 1 and a list of steps:

    - sigma: where the run starts. Given for the table and every step, or for none: then the sampler's sigmas are meant.
    - frame: "snr", the true signal-to-noise ratio, or "vef", flow models seen by their sigmas.
    - afs: instead of the first network call, "zero" takes 0 for its prediction, "mean" the mean of the data.
    - repeat: so many of the last steps go on for as long as there are sigmas. 0: the number of steps is fixed.

    Of a step:

    - sigma: where it ends. A step to 0 is always the prediction itself.
    - prediction: what is integrated: "data", "noise", or "v3" (f of DPM-Solver-v3, by model statistics).
    - variable: what noise predictions are a polynomial in: "lambda", "rho", "t", "vp".
    - start: from which point it starts: 1 is the latest one, k the k-th latest, as in single-step solvers.
    - order: terms of the Taylor expansion, 1 to 6.
    - points: by how many other predictions each derivative is estimated (Difference_q); derivative m by at least m. Those
      between the start and the latest come first, then older ones. Default: order - 1 for each.
    - relax, relax_value: factor on the first derivative. dpmsolver-2, also called unipc-bh2: phi_1(h) / (2 phi_2(h));
      unipc-bh1: 1 / (2 phi_2(h)); 0.5exp and -0.5exp: 1 + or - (e^h - 1) / 2, all with -h for h in data prediction; linear:
      1 + relax_value h.
    - weights: instead of order, points and relax: shares of the step's predictions, newest first; they add up to 1.
    - corrector: "pseudo" (free: its evaluation is the next step's) or "implicit" (evaluated once more), one order and one point
      more than the step; or an object with kind, order, points, relax, relax_value, weights of its own.

    What is left out has its default. The order of a run is that of its worst step. One network call per step, one more for
    each implicit corrector, one less with an analytic first step. To correct the last step of a run that stops above 0 would
    take one more call, so it is left as it is.

    Nothing is searched here. A table found for one network, guidance scale and number of steps is of little use for others.

    Raises ValueError, naming step and field, for a table with a mistake; and when a run has other steps than its table.

    Source: Liu et al. (2023), arXiv:2312.07243, and the authors' code (thu-nics/USF).
    """

    id: ClassVar[str] = "USF"
    title: ClassVar[str] = "USF (solver schedule)"
    paper: ClassVar[str] = "Liu et al. (2023), arXiv:2312.07243"

    table: str = param(
        '{"usf": 1, "repeat": 1, "steps": [\n  {"order": 1},\n  {"order": 2, "relax": "dpmsolver-2"}\n]}',
        "The schedule as JSON, one object per step. As it stands: DPM-Solver++ 2M for any number of steps. The help page "
        "names all fields.",
        multiline=True,
    )
    statistics: ModelStatistics | None = part(  # noqa: RUF009
        KIND, "Model statistics from ComfyUI's models/quickstep folder, for steps with v3 predictions.", default=None
    )

    draws: ClassVar[None] = None

    def __post_init__(self):
        super().__post_init__()
        for i, row in enumerate(self.plan.steps, 1):
            if row.prediction == "v3" and self.statistics is None:
                raise ValueError(f"USF table, step {i}: v3 predictions need model statistics, and none are given.")
        if self.plan.afs == "mean" and (self.statistics is None or self.statistics.mean is None):
            raise ValueError("USF table: afs = mean needs model statistics with the mean of the data.")

    @property
    def plan(self) -> Table:
        return parse(self.table)

    @property
    def in_frame(self) -> str:
        return self.plan.frame

    @property
    def span(self) -> int:
        return max(row.predictions for row in self.plan.steps)

    @property
    def keeps_points(self) -> bool:
        return any(row.start > 1 for row in self.plan.steps)

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return tuple({kernel.key: kernel for kernel in map(self._kernel, self.plan.steps)}.values())

    @property
    def convergence_order(self) -> int:
        rows = self.plan.steps[-self.plan.repeat :]  # all of a table of fixed length
        starts = {(i + 1 - row.start) % len(rows) for i, row in enumerate(rows)}
        # A point that no step starts from is an inner point: its prediction counts, which is one order better.
        inner = [(i + 1) % len(rows) not in starts for i in range(len(rows))]
        order = min(row.convergence_order + extra for row, extra in zip(rows, inner, strict=True))
        return order if self.plan.afs == "none" else 1

    def nfe(self, steps: int) -> int | None:
        if not self.plan.repeat and steps > len(self.plan.steps):
            return None
        again = sum(self._implicit(self.plan.row(i)) for i in range(steps - 1))
        return max(steps, 0) + again - (self.plan.afs != "none" and steps > 0)

    def start(self, times: Sequence[float]) -> History:
        steps, plan = len(times) - 1, self.plan
        if steps > 0 and not plan.repeat and steps != len(plan.steps):
            raise ValueError(
                f"USF: the table has {len(plan.steps)} steps, so it needs {len(plan.steps) + 1} sigmas; {steps + 1} were given."
            )
        if plan.afs != "none" and steps == 1:
            raise ValueError("USF: an analytic first step leaves a run of one step without any network call.")
        if any(row.weights for row in plan.steps) and steps > 0:
            for given, meant in zip(times, plan.sigmas, strict=True):
                if not math.isclose(given, meant, rel_tol=1e-4):
                    raise ValueError(
                        f"USF: the table's weights are for its own sigmas, but sigma {given:g} was given where it has {meant:g}."
                    )
        return super().start(times)

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: History) -> Step:
        if self.statistics is not None:
            self.statistics.check(x)
        if state.i == 0 and self.plan.afs != "none":
            problem = replace(problem, denoise=self._guess)
        return super().step(problem, x, s, t, state)

    def rule(self, place: Place) -> Rule:
        row = self.plan.row(place.i)
        kernel = self._kernel(row)
        rule = replace(_rule(kernel, row, row.start), start=row.start)
        if row.corrector is None:
            return rule
        own = _rule(kernel, row.corrector, row.start + 1, new=True)
        return replace(rule, corrector=own.points, correct=own, again=self._implicit(row))

    def _guess(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        """The first prediction without the network."""
        zero = torch.zeros_like(x)
        if self.plan.afs == "zero" or self.statistics is None or self.statistics.mean is None:
            return zero
        return zero.add_(self.statistics.mean.to(x, non_blocking=True))

    def _kernel(self, row: Row) -> Kernel:
        if row.prediction == "v3" and self.statistics is not None:
            return Statistical(self.statistics)
        return Data() if row.prediction == "data" else Noise(row.variable)

    @staticmethod
    def _implicit(row: Row) -> bool:
        return row.corrector is not None and row.corrector.kind == "implicit"


def _rule(kernel: Kernel, update: Update, start: int, new: bool = False) -> Rule:
    if update.weights:
        return Rule(kernel, len(update.weights), shares=update.weights[::-1])
    reach = nearest(start, update.counts, new)
    return Rule(
        kernel, max(max(row) for row in reach), reach=reach, bend=_bend(kernel, update.relax, update.relax_value)
    )


def _bend(kernel: Kernel, relax: str, value: float) -> Bend | None:
    if relax == "none":
        return None
    sign = -1.0 if isinstance(kernel, Data) and relax != "linear" else 1.0

    def bend(M: list[Any], h: float) -> list[Any]:
        return [M[0], M[1] * _FACTOR[relax](sign * h, value), *M[2:]] if len(M) > 1 else M

    return bend


def to_table(solver: Multistep, times: Sequence[float], process: ForwardProcess) -> Table:
    """The steps a multistep solver takes over ``times``, as a table that does the same.

    Raises ValueError for one that adds noise, changes its predictions on the way or integrates something else.
    """
    if not isinstance(solver, Multistep) or solver.draws is not None or solver.hooks != NO_HOOKS:
        raise ValueError(
            f"{solver.title} cannot be written as a USF table; deterministic linear multistep samplers can."
        )
    seen, rows = framed(process, solver.in_frame), []
    starts = [below_noise(seen, s, t) for s, t in pairwise(times)]
    lost = int(bool(starts) and seen.alpha(times[0]) == 0.0 and solver.starts_first_order)
    for i, (s, t) in enumerate(zip(starts, times[1:], strict=True)):
        place = Place(seen, s, t, i, len(starts), tuple(starts[max(lost, i - solver.span) : i + 1]))
        rows.append(replace(_row(solver, place) if t > 0.0 and i >= lost else Row(), sigma=t))
    afs = solver.plan.afs if isinstance(solver, USF) else "none"
    return Table(tuple(rows), times[0] if rows else None, solver.in_frame, afs)


def _row(solver: Multistep, place: Place) -> Row:
    rule = solver.rule(place)
    prediction = {Data: "data", Noise: "noise", Statistical: "v3"}.get(type(rule.kernel))
    if prediction is None:
        raise ValueError(f"{solver.title} cannot be written as a USF table: it integrates something else.")
    variable = rule.kernel.variable if isinstance(rule.kernel, Noise) else "lambda"
    place = replace(place, s=place.times[-rule.start])
    corrector = None
    if rule.corrector:
        own = _written(rule.correcting, place, (*place.times, place.t), rule.start + 1, new=True)
        corrector = Corrector(**own, kind="implicit" if rule.again else "pseudo")
    own = _written(rule, place, place.times, rule.start)
    return Row(**own, prediction=prediction, variable=variable, start=rule.start, corrector=corrector)


def _written(rule: Rule, place: Place, times: tuple[float, ...], start: int, new: bool = False) -> dict[str, Any]:
    """The fields of an ``Update`` that does what the rule does."""
    n = len(times[-rule.points :])
    counts = tuple(map(len, rule.reach)) if rule.reach else (1, *(n,) * (n - 1))
    written = {"order": len(counts), "points": tuple(q - 1 for q in counts[1:])}
    plain = rule.shares is None and (rule.reach is None or nearest(start, counts, new) == rule.reach)
    if plain and rule.bend is None:
        return written
    w = weigh(rule, place, times)[0]
    for relax in RELAXATIONS:
        relaxed = _rule(rule.kernel, Update(**written, relax=relax), start, new)
        if plain and relax != "linear" and all(map(_close, weigh(relaxed, place, times)[0], w)):
            return {**written, "relax": relax}
    M0 = rule.kernel.moments(place.process, place.s, place.t, 1, 1.0)[0]
    return {"weights": tuple(weight / M0 for weight in reversed(w))}


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-11, abs_tol=1e-14)
