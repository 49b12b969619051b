"""The least-squares-fitted solver: a linear multistep method whose weights were fitted to one network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any, ClassVar

import torch

from ..artifact import Artifact
from ..kernel import axpy
from ..method import param, part
from ..process import ForwardProcess
from ..solver import Problem, Solver, Step
from .asking import MOST, asked, check_sigmas

KIND = "fitted_solver"
"""Of artifacts: their table has ``sigmas``, n + 1 of them, and ``weights``, for each step those of its predictions, newest
first, which add up to 1 unless there are ``scales``, one for each step. ``offsets``, if there are any: at which other noise levels
the network is asked, see ``asking``."""


def midpoint(process: ForwardProcess, times: Sequence[float], t: float) -> list[float]:
    """DPM-Solver++ 2M's weights of the predictions made at ``times`` (newest last) for a step to t, newest first."""
    if len(times) == 1 or t == 0.0:
        return [1.0]
    before, s, end = (process.lam(time) for time in (*times[-2:], t))
    r = (end - s) / (2.0 * (s - before))  # 0 after a flow model's pure noise, where lambda is -inf
    return [1.0 + r, -r]


@dataclass(frozen=True)
class Past:
    """Predictions made so far, with their times, newest last."""

    total: int
    i: int = 0
    times: tuple[float, ...] = ()
    made: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class FittedSolver(Solver):
    """A multistep sampler whose weights were fitted to your own model, for one schedule: see Fit Solver.

    Connect the sigmas it was fitted for (Found Schedule, with the same file). Without a file it is DPM-Solver++ 2M, which is
    where the fit begins.

    x_t = (sigma_t / sigma_s) x_s + (alpha_t - alpha_s sigma_t / sigma_s) sum_j w_ij D_j,     sum_j w_ij = 1,

    D_j being the newest predictions, and i the number of the step: each has weights of its own. That they add up to 1 keeps
    constant predictions solved exactly, on all models and from pure noise on; it is the general linear multistep method with
    that property. The last step to 0 mixes predictions too. Files that Fit Solver made with ``rescale`` have weights that add
    up to nearly 1, and a factor a_i near 1 before x_s; those made with ``decouple`` ask the network at slightly other noise levels
    than sigma_s, as *Decoupled times* does.

    Few numbers, so other prompts and seeds of the same model are served as well as those of the fit. One network call per step.
    Found at CFG 4 and 8 steps for the demo networks (geometric mean error of 16 samples, in brackets the best of core's pairs
    there, for the DiT with a shift of 3): at CFG 1 UNet .012 (.014), DiT .044 (.037); at CFG 7.5 .057 (.070), .148 (.113); at 40 x
    40 pixels instead of 32 x 32 .020 (.024), .045 (.059). So another size keeps a part of the gain, and another guidance scale may
    lose all of it: compare.

    On other sigmas than its own it refuses to run, or, with ``elsewhere`` = adapt, changes DPM-Solver++ 2M there by what the
    fit changed on its own sigmas at the same step: second order, and a guess for small deviations only. For other numbers of
    steps that guess is bad: at 6 steps .076 (.053), .096 (.060), at 10 .070 (.013), .046 (.036). Fit again for those.

    Source: least squares on a teacher's trajectory, then on its end, are this pack's own; the family of methods is that of
    Shaul et al. (2024), arXiv:2403.01329, with the constraint above.
    """

    id: ClassVar[str] = "FittedSolver"
    title: ClassVar[str] = "Fitted solver"
    paper: ClassVar[str] = "after Shaul et al. (2024), arXiv:2403.01329"

    calibration: Artifact | None = part(  # noqa: RUF009
        KIND, "Weights that Fit Solver found and saved in models/quickstep; none: DPM-Solver++ 2M.", None
    )
    elsewhere: str = param(
        "refuse",
        "What to do with other sigmas than those of the file: refuse, or adapt the weights, which is a guess.",
        options=("refuse", "adapt"),
        advanced=True,
    )

    calls: ClassVar[int] = 1
    draws: ClassVar[None] = None

    def __post_init__(self):
        super().__post_init__()
        if self.calibration is not None:
            _check(self.calibration)

    @property
    def convergence_order(self) -> int:
        return 2

    @property
    def weights(self) -> list[list[float]]:
        return self.calibration.table["weights"] if self.calibration is not None else []

    @property
    def sigmas(self) -> list[float]:
        return self.calibration.table["sigmas"] if self.calibration is not None else []

    @property
    def offsets(self) -> list[float]:
        return self.calibration.table.get("offsets", []) if self.calibration is not None else []

    @property
    def scales(self) -> list[float]:
        return self.calibration.table.get("scales", []) if self.calibration is not None else []

    def at_home(self, times: Sequence[float]) -> bool:
        """Whether these are the sigmas it was fitted for, where it is linear, with the weights of its file."""
        return bool(self.weights) and self.sigmas == list(times)

    @property
    def span(self) -> int:
        return max(map(len, self.weights), default=2)

    def start(self, times: Sequence[float]) -> Past:
        if self.elsewhere == "refuse" and self.sigmas and len(times) > 1:
            check_sigmas(times, self.sigmas, self.title, "it was fitted")
        return Past(len(times) - 1)

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: Past) -> Step:
        process = problem.process
        denoise = asked(problem, self.sigmas, self.offsets) if self.offsets else problem.denoise
        x0 = denoise(x, s)
        times, made = (*state.times, s)[-self.span :], (*state.made, x0)[-self.span :]
        w = self.shares(process, state.i, times, t)
        mean = mixed(made[::-1], w)
        after = Past(state.total, state.i + 1, times, made)
        if t == 0.0:
            return Step(mean, mean, after)
        q = process.sigma(t) / process.sigma(s)
        scale = self.scales[state.i] if state.i < len(self.scales) else 1.0
        return Step(axpy(x * (q * scale), mean, process.alpha(t) - q * process.alpha(s)), x0, after)

    def shares(self, process: ForwardProcess, i: int, times: Sequence[float], t: float) -> list[float]:
        """Weights of the predictions made at ``times`` (newest last) for step i, to t; newest first."""
        plain = midpoint(process, times, t)
        if i >= len(self.weights):
            return plain
        if self.elsewhere == "refuse":
            return self.weights[i]
        own = self.sigmas[max(0, i + 1 - self.span) : i + 1]
        rows = zip_longest(plain, self.weights[i], midpoint(process, own, self.sigmas[i + 1]), fillvalue=0.0)
        return [here + fitted - there for here, fitted, there in rows]


def mixed(made: Sequence[torch.Tensor], w: Sequence[float]) -> torch.Tensor:
    """``sum_j w_j made_j``, both newest first; the predictions beyond the weights are not used."""
    mean = made[0] * w[0]
    for prediction, weight in zip(made[1:], w[1:], strict=False):
        mean = axpy(mean, prediction, weight)
    return mean


def _check(calibration: Artifact) -> None:
    """Raises ValueError unless it holds sigmas, and weights for the steps between them."""
    if calibration.kind != KIND:
        raise ValueError(f"Fitted solver: the file holds {calibration.kind}, but {KIND} is needed here.")
    sigmas, weights = calibration.table.get("sigmas"), calibration.table.get("weights")
    if not _numbers(sigmas) or not isinstance(weights, list) or not all(map(_numbers, weights)):
        raise ValueError("Fitted solver: the file must hold a list of sigmas, and a list of weights for each step.")
    if len(weights) != len(sigmas) - 1 or any(b >= a for a, b in pairwise(sigmas)):
        raise ValueError("Fitted solver: the file must hold decreasing sigmas, one more than lists of weights.")
    scales = calibration.table.get("scales")
    for i, row in enumerate(weights):
        if len(row) > i + 1 or (scales is None and abs(sum(row) - 1.0) > 1e-6):
            raise ValueError(f"Fitted solver: step {i + 1} has at most {i + 1} weights, and they must add up to 1.")
    if scales is not None and (not _numbers(scales) or len(scales) != len(weights) or min(scales) <= 0.0):
        raise ValueError("Fitted solver: scales must be one number above 0 for each step.")
    offsets = calibration.table.get("offsets")
    if offsets is None:
        return
    if not _numbers(offsets) or len(offsets) != len(weights) or offsets[0] != 0.0 or max(map(abs, offsets)) > MOST:
        raise ValueError(
            f"Fitted solver: offsets must be one number for each step, the first one 0, and none beyond {MOST:g}."
        )


def _numbers(given: Any) -> bool:
    return isinstance(given, list) and len(given) > 0 and all(type(v) in (int, float) for v in given)
