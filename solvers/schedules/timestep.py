"""Schedules that are a rule for training time: uniform, beta quantiles, linear-quadratic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import betaincinv

from ..method import param
from ..process import ForwardProcess
from .schedule import SHIFT, SIGMA_CUT, Schedule, between


@dataclass(frozen=True)
class UniformSchedule(Schedule):
    """Evenly spaced in training time: the first schedule of diffusion models, and still the usual one of flow models.

    With u the training time, 0 at t_min and 1 at t_max, and i = 0 .. n - 1,

    - trailing: u_i = 1 - i / n. Starts at t_max and takes n equal steps; the last one goes to 0 where t_min would be.
    - linspace: u_i = 1 - i / (n - 1). Both ends are nodes; the last step goes from t_min to 0.
    - leading: u_i = (n - 1 - i) / n. Ends at t_min but starts below t_max, as the first DDIM code did, which limits how
      dark or bright a picture can get (section 3.3 of the source). It is here to reproduce old pictures, and is the one
      rule whose first sigma is not t_max (except with 1 step).

    Source: Lin, Liu, Li, Yang (2023), arXiv:2305.08891, table 2.
    """

    id: ClassVar[str] = "UniformSchedule"
    title: ClassVar[str] = "Uniform schedule (in t)"
    paper: ClassVar[str] = "Lin et al. (2023), arXiv:2305.08891"

    spacing: str = param(
        "trailing",
        "trailing: n equal steps down from the top. linspace: both ends of training time are used. leading: starts "
        "below the top, as old DDIM code did.",
        options=("trailing", "linspace", "leading"),
    )
    shift: float = param(**SHIFT)

    def nodes(self, process: ForwardProcess, t_max: float, t_min: float, n: int) -> np.ndarray:
        i = np.arange(n)
        u = {"trailing": 1.0 - i / n, "linspace": 1.0 - i / (n - 1), "leading": (n - 1 - i) / n}[self.spacing]
        return between(process, t_max, t_min, u, "timestep", 1.0)


@dataclass(frozen=True)
class BetaSchedule(Schedule):
    """Quantiles of a beta distribution: dense at both ends, where low and high frequencies settle, sparse in between.

    q_i = B^(-1)_{alpha, beta}(1 - i / n),  i = 0 .. n - 1,

    B being the distribution function; q is read as a share of the range of training time, of sigma, or of lambda (half
    the log-SNR). alpha = beta = 1 is uniform. There are always n different nodes: where extreme alpha and beta crowd
    them together, they are kept a hundredth of 1 / n apart. (ComfyUI's ``beta`` rounds to whole training steps and
    drops the repeated ones; diffusers' works in sigma.)

    Source: Lee et al. (2024), arXiv:2407.12173.
    """

    id: ClassVar[str] = "BetaSchedule"
    title: ClassVar[str] = "Beta schedule"
    paper: ClassVar[str] = "Lee et al. (2024), arXiv:2407.12173"

    alpha: float = param(0.6, "Below 1 adds steps at low noise, above 1 removes them.", min=0.1, max=10.0, step=0.05)
    beta: float = param(0.6, "Below 1 adds steps at high noise, above 1 removes them.", min=0.1, max=10.0, step=0.05)
    space: str = param(
        "timestep",
        "What the quantiles divide: training time (timestep, the paper's), sigma, or log-SNR (lambda).",
        options=("timestep", "sigma", "lambda"),
    )
    shift: float = param(**SHIFT)
    sigma_cut: float = param(**{**SIGMA_CUT, "help": "Space lambda only. " + SIGMA_CUT["help"]})

    def nodes(self, process: ForwardProcess, t_max: float, t_min: float, n: int) -> np.ndarray:
        q = _spread(betaincinv(self.alpha, self.beta, 1.0 - np.arange(n) / n), 0.01 / n)
        return between(process, t_max, t_min, q, self.space, self.sigma_cut)


def _spread(q: np.ndarray, gap: float) -> np.ndarray:
    """q, falling from 1 and then to 0, with every step at least about ``gap`` long; as it is if that holds."""
    steps = np.maximum(-np.diff(q, append=0.0), gap)
    return 1.0 - np.append(0.0, np.cumsum(steps)[:-1]) / steps.sum()


@dataclass(frozen=True)
class LinearQuadraticSchedule(Schedule):
    """Small even steps through the first noise, then growing ones: for video and flow models with shape settled early.

    t_i = t_max (1 - p_i),  p_i = a i / L + b max(i - L, 0)^2,  b = (1 - a n / L) / (n - L)^2

    The first L = linear_steps steps remove the share a = threshold_noise of the noise, evenly; the others grow, joined
    without a kink, to end at 0. Movie Gen emulates the start of a linear schedule of N steps: a = L / N. It is applied
    to the model's own sigma on every model; t_min is not a node.

    Raises ValueError if linear_steps is not below the number of steps, or the first steps would remove so much that the
    later ones go backwards.

    Source: Polyak et al. (2024), Movie Gen, arXiv:2410.13720.
    """

    id: ClassVar[str] = "LinearQuadraticSchedule"
    title: ClassVar[str] = "Linear-quadratic schedule"
    paper: ClassVar[str] = "Polyak et al. (2024), arXiv:2410.13720"

    threshold_noise: float = param(
        0.025, "Share of the noise that the linear steps remove together.", min=0.0001, max=0.99, step=0.001
    )
    linear_steps: int = param(0, "How many of the steps are linear; 0 is half of them.", min=0, max=10000)
    shift: float = param(**SHIFT)

    def nodes(self, process: ForwardProcess, t_max: float, t_min: float, n: int) -> np.ndarray:
        a, L = self.threshold_noise, self.linear_steps or n // 2
        if n <= L:
            raise ValueError(f"{self.title}: linear_steps = {L} must be below the number of steps, {n}.")
        b = (1.0 - a * n / L) / (n - L) ** 2
        if a / L + 2.0 * b * (n - L) <= 0.0:
            raise ValueError(
                f"{self.title}: {L} linear steps that remove {a:g} of the noise leave too little for the other "
                f"{n - L}; lower threshold_noise or raise linear_steps."
            )
        i = np.arange(n)
        return t_max * (1.0 - a * i / L - b * np.maximum(i - L, 0) ** 2)
