"""DC-Solver: dynamic compensation of a multistep sampler by ratios found for one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from .artifact import Artifact
from .kernel import Noise, axpy
from .method import param, part
from .multistep import History, Multistep, Node, Place
from .process import ForwardProcess
from .solver import Problem, SameCost, Step
from .weights import weights

KIND = "dc_ratios"
"""Of artifacts: their table has ``ratios``, one number per step, or ``cascade``, numbers of shape (4, 3, 3)."""


def cascade(coefficients: Any, cfg: float, nfe: int) -> list[float]:
    """The ratios of all ``nfe`` steps at guidance scale ``cfg``, by the paper's cascade of polynomials.

    ratio(k) = sum_i a_i (k / nfe)^i, k = 3 .. nfe; a_i is quadratic in cfg / 12, its coefficients are quadratic in nfe / 50.
    coefficients: shape (4, 3, 3), (i, power of cfg: 2 1 0, power of nfe: 2 1 0). The first two steps have ratio 1.
    """
    in_nfe = [(nfe / 50.0) ** p for p in (2, 1, 0)]
    in_cfg = [(cfg / 12.0) ** p for p in (2, 1, 0)]
    try:
        a = np.asarray(coefficients, dtype=np.float64).reshape(4, 3, 3) @ in_nfe @ in_cfg
    except (TypeError, ValueError):
        raise ValueError("DC-Solver: a cascade is made of 4 x 3 x 3 numbers, and this one is not.") from None
    return [1.0 if k < 3 else float(np.polyval(a[::-1], k / nfe)) for k in range(1, nfe + 1)]


def compensated(process: ForwardProcess, nodes: tuple[Node, ...], ratio: float, degree: int) -> tuple[Node, ...]:
    """The nodes with the newest value replaced by the polynomial through the newest ``degree`` + 1 of them.

    It is read at ``ratio`` u_i + (1 - ratio) u_{i-1}, u being the model's training time. Unchanged while too few are known.
    """
    used = nodes[-degree - 1 :]
    if len(used) <= degree:
        return nodes
    u = [Noise("t").place(process, node.t) for node in used]
    place = [(v - u[-2]) / (u[-1] - u[-2]) for v in u]  # 0 at the last but one, 1 at the newest
    w = weights(place, [ratio**m for m in range(degree + 1)])
    values = {key: newest * w[-1] for key, newest in nodes[-1].values.items()}
    for node, weight in zip(used[:-1], w[:-1], strict=True):
        values = {key: axpy(value, node.values[key], weight) for key, value in values.items()}
    return (*nodes[:-1], replace(nodes[-1], values=values))


@dataclass(frozen=True)
class DCSolver(SameCost):
    """Compensates a multistep sampler for running with few steps and much guidance, by one number per step.

    Worth it only with ratios found for this very model, guidance scale, sampler and number of steps, by *Search DC Ratios*
    or *Fit DC Cascade*: they can then repair part of what 5 to 10 steps lose. Others make it worse, so compare both.
    Without ratios the sampler is left exactly as it is. Made for UniPC; works on any multistep sampler in data prediction.

    A corrector moves x_s, but keeps the prediction made before it was moved. Before the step from t_i, that prediction D_i is
    therefore replaced, for good, by

    D_i' = sum_j L_j(rho_i t_i + (1 - rho_i) t_{i-1}) D_j,

    L_j being the Lagrange polynomials through the newest ``dc_order`` + 1 predictions in the model's training time. rho = 1
    changes nothing, rho > 1 extrapolates. The last step to 0 returns D_i'. The first ``dc_order`` steps are not compensated, as
    too few predictions are known; their ratios are not used.

    A correction of errors at few steps, not a method of higher order: with any rho held at a number other than 1 it is first
    order. A cascade gives the ratios for a range of guidance scales and step counts; the guidance scale is the sampler's, or
    the one it was found for where that is not known. No further network calls.

    Raises ValueError for a sampler it does not work on, for ratios outside [0, 2], for a file whose ratios were found with
    another ``dc_order``, and when a run has another number of steps than there are ratios.

    Source: Zhao et al. (2024), arXiv:2409.03755; the persistence of D_i', its time and the cascade as in the authors' code
    (wl-zhao/DC-Solver).
    """

    id: ClassVar[str] = "DCSolver"
    title: ClassVar[str] = "DC-Solver"
    paper: ClassVar[str] = "Zhao et al. (2024), arXiv:2409.03755"

    solver: Multistep = part("solver", "A multistep sampler in data prediction: UniPC, DPM-Solver++ or SA-Solver.")  # noqa: RUF009
    calibration: Artifact | None = part(  # noqa: RUF009
        KIND, "Ratios found by a search and saved in models/quickstep; none: those of the text below.", None
    )
    ratios: str = param(
        "",
        "Ratios rho, one per step, between commas or spaces: 1, 1, 1.05, 0.97. Empty: the sampler as it is, or a file.",
    )
    dc_order: int = param(
        2, "Degree of the polynomial through the past predictions; 2 unless the ratios were found with another.", min=1, max=3,
        advanced=True,
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.solver, Multistep) or all(kernel.key != "x0" for kernel in self.solver.kernels):
            raise ValueError(f"DC-Solver works on multistep samplers in data prediction, {self.solver.title} is none.")
        if self.solver.span < self.dc_order:
            raise ValueError(
                f"DC-Solver: {self.solver.title} remembers {self.solver.span} predictions with these settings, "
                f"{self.dc_order} are needed; raise its order."
            )
        if self.calibration is not None:
            if self.ratios.strip():
                raise ValueError("DC-Solver: give ratios as a text or in a file, not both.")
            if self.calibration.kind != KIND:
                raise ValueError(f"DC-Solver: the file holds {self.calibration.kind}, but {KIND} is needed here.")
            found_with = self.calibration.table.get("dc_order", self.dc_order)
            if found_with != self.dc_order:
                raise ValueError(
                    f"DC-Solver: dc_order = {self.dc_order}, but the ratios of this file were found with {found_with}."
                )
        self._listed()  # refuses bad ones

    def _listed(self) -> list[float]:
        """The ratios that are given one by one; empty where they come from a cascade or are all 1."""
        if self.calibration is None:
            return _checked(self.ratios.replace(",", " ").split(), self.ratios)
        table = self.calibration.table
        if "cascade" in table:
            cascade(table["cascade"], 1.0, 5)  # has the right shape
            return []
        if not table.get("ratios"):
            raise ValueError("DC-Solver: the file holds neither ratios nor a cascade.")
        return _checked(table["ratios"], str(table["ratios"]))

    def ratios_at(self, cfg: float | None, steps: int) -> list[float]:
        """rho of every step of a run."""
        if self.calibration is None or "cascade" not in self.calibration.table:
            return self._listed() or [1.0] * steps
        cfg = self.calibration.found_for.cfg if cfg is None else cfg
        if cfg is None:
            raise ValueError(
                "DC-Solver: this file needs the guidance scale, which the guider does not tell; use CFGGuider."
            )
        return _checked(
            cascade(self.calibration.table["cascade"], cfg, steps), f"the cascade at CFG {cfg:g} and {steps} steps"
        )

    @property
    def convergence_order(self) -> int:
        as_it_is = self.calibration is None and all(rho == 1.0 for rho in self._listed())
        return self.solver.convergence_order if as_it_is else 1

    def start(self, times: Sequence[float]) -> Any:
        given, steps = len(self._listed()), len(times) - 1
        if given not in (0, steps) and steps > 0:
            raise ValueError(
                f"DC-Solver: {given} ratios are given, but this run has {steps} steps; each needs its own."
            )
        return self.solver.start(times)

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: History) -> Step:
        rho = self.ratios_at(problem.cfg, state.total)[state.i]
        if rho == 1.0:
            return self.solver.step(problem, x, s, t, state)
        hooks = self.solver.hooks

        def revise(place: Place, nodes: tuple[Node, ...], memory: Any) -> tuple[tuple[Node, ...], Any]:
            nodes = compensated(problem.process, nodes, rho, self.dc_order)
            return (nodes, memory) if hooks.revise is None else hooks.revise(place, nodes, memory)

        made = self.solver.advance(problem, x, s, t, state, replace(hooks, revise=revise))
        if t > 0.0:
            return made
        nodes = compensated(problem.process, (*state.nodes, Node(s, {"x0": made.x0})), rho, self.dc_order)
        return Step(nodes[-1].values["x0"], nodes[-1].values["x0"], made.state)


def _checked(values: Sequence[Any], where: str) -> list[float]:
    """As floats in [0, 2]."""
    try:
        ratios = [float(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError(f"DC-Solver: ratios must be numbers between commas or spaces, and {where!r} is not.") from None
    for rho in ratios:
        if not 0.0 <= rho <= 2.0:
            raise ValueError(f"DC-Solver: ratios lie between 0 and 2, mostly near 1, and {where} has {rho:g}.")
    return ratios
