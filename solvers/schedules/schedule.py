"""What a schedule is, the shift all of them share, and the tail that a partial denoise runs.

A schedule says at which times the network is called. Most formulas are written for variance exploding models; on flow
models they are applied to the noise-to-signal ratio rho = sigma / alpha = exp(-lambda), which is the same model's sigma
seen as variance exploding, and mapped back.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..method import Method
from ..process import ForwardProcess

SHIFT: dict[str, Any] = dict(
    default=1.0,
    help="Multiplies the noise-to-signal ratio of every sigma but the first, which stays: above 1 spends more steps at "
    "high noise. On flow models this is SD3's shift, on top of the model's own; 1 changes nothing.",
    min=0.01,
    max=100.0,
    step=0.01,
)
SPACE: dict[str, Any] = dict(
    default="ratio",
    help="What the formula is applied to: ratio, noise to signal, which is right for flow models too; or sigma as it "
    "is, as ComfyUI's own nodes do. The same on models that are not flow models.",
    options=("ratio", "sigma"),
    advanced=True,
)
SIGMA_CUT: dict[str, Any] = dict(
    default=0.999,
    help="Flow models only: they start at sigma 1, where noise to signal is infinite, so the formula starts here and "
    "its first sigma is then set to 1. Lower spends fewer steps on nearly pure noise.",
    min=0.5,
    max=0.9999,
    step=0.001,
    advanced=True,
)


@dataclass(frozen=True)
class Schedule(Method):
    """Abstract: a rule that places n network calls between t_max and t_min. Subclasses give ``nodes`` and ``shift``.

    Calling it returns n + 1 times, strictly decreasing: n at which the network is called, then 0. The first is t_max,
    unless the rule is one that starts lower (it says so). With n = 1 all rules are ``[t_max, 0]``.

    ``ends_clean``: False for a rule that stops above 0, whose ``nodes`` then make all of the n + 1 times.
    """

    ends_clean: ClassVar[bool] = True

    @property
    @abstractmethod
    def shift(self) -> float:
        """Factor m on the noise-to-signal ratio, see ``shifted``."""

    @abstractmethod
    def nodes(self, process: ForwardProcess, t_max: float, t_min: float, n: int) -> np.ndarray:
        """The n >= 2 times of the unshifted rule, without the final 0; shape (n,), float64."""

    def __call__(self, process: ForwardProcess, t_max: float, t_min: float, n: int) -> np.ndarray:
        """Times of shape (n + 1,), float64, strictly decreasing, the last one 0.

        Raises ValueError, in one sentence, for fewer than one step, a range that is empty, not finite or outside the
        process, and where n times do not fit the range (they must stay apart in float32, which is sampled with).
        """
        t_max, t_min = float(t_max), float(t_min)
        if n < 1:
            raise ValueError(f"{self.title}: steps = {n}, but a schedule needs at least 1 step.")
        if not (math.isfinite(t_max) and math.isfinite(t_min)):
            raise ValueError(f"{self.title}: the sigmas must be finite, but they run from {t_max:g} to {t_min:g}.")
        if not 0.0 < t_min < t_max:
            raise ValueError(
                f"{self.title}: the smallest sigma must be positive and below the largest one, but they are {t_min:g} "
                f"and {t_max:g}."
            )
        if process.alpha(t_max) < 0.0:
            raise ValueError(f"{self.title}: the largest sigma is {t_max:g}, but a flow model's sigmas end at 1.")
        nodes = n if self.ends_clean else n + 1
        t = t_max if nodes == 1 else shifted(process, self.nodes(process, t_max, t_min, nodes), t_max, self.shift)
        times = np.append(t, 0.0) if self.ends_clean else np.asarray(t)
        if times.shape != (n + 1,) or times[0] > t_max or not (np.diff(times.astype(np.float32)) < 0.0).all():
            raise ValueError(
                f"{self.title}: {n} steps with these settings do not give {n} different sigmas between {t_max:g} and "
                f"{t_min:g}; use fewer steps or less extreme settings."
            )
        return times


def shifted(process: ForwardProcess, t: np.ndarray, t_max: float, m: float) -> np.ndarray:
    """Multiply the noise-to-signal ratio by m without leaving the range of the model.

        1 / rho' = 1 / (m rho) + (1 - 1/m) / rho_max

    Where rho_max is infinite (a flow model's t_max = 1) this is rho' = m rho, that is SD3's
    t' = m t / (1 + (m - 1) t) (Esser et al. 2024, arXiv:2403.03206, eq. 23). Where it is finite, rho' = m rho far below
    rho_max, and rho_max stays: the whole schedule moves, its start does not. The last node moves with the others, with
    m < 1 below the t_min that was asked for. m = 1 returns ``t`` unchanged.
    """
    if m == 1.0:
        return t
    inverse = 1.0 / (m * process.rho(t)) + (1.0 - 1.0 / m) / process.rho(t_max)
    with np.errstate(divide="ignore"):
        return np.where(t == t_max, t_max, process.t_of_rho(1.0 / inverse))


def ratios(process: ForwardProcess, t_max: float, t_min: float, sigma_cut: float) -> tuple[float, float]:
    """Noise-to-signal ratio at t_max and t_min, both finite.

    Where the signal vanishes towards t_max (alpha below 1 - sigma_cut, so never if alpha is 1), the first is the ratio
    at ``sigma_cut`` instead. Raises ValueError if nothing is left between the two.
    """
    high, low = process.rho([sigma_cut if process.alpha(t_max) < 1.0 - sigma_cut else t_max, t_min]).tolist()
    if not low < high:
        raise ValueError(f"sigma_cut = {sigma_cut:g} must be above the smallest sigma, {t_min:g}; raise it.")
    return high, low


def between(
    process: ForwardProcess, t_max: float, t_min: float, q: np.ndarray, space: str, sigma_cut: float
) -> np.ndarray:
    """The times at share q of the way from t_min (0) to t_max (1), measured in ``space``.

    space: ``timestep``, the training time of the process; ``sigma``; or ``lambda``, half the log-SNR, cut as in
    ``ratios``. Shape of q. q = 0 and q = 1 give t_min and t_max exactly.
    """
    if space == "timestep":
        low, high = process.u_of_t([t_min, t_max])
        t = process.t_of_u(low + q * (high - low))
    elif space == "sigma":
        t = t_min + q * (t_max - t_min)
    else:
        high, low = np.log(ratios(process, t_max, t_min, sigma_cut))
        t = process.t_of_rho(np.exp(low + q * (high - low)))
    return np.where(q == 1.0, t_max, np.where(q == 0.0, t_min, t))


def times(schedule: Schedule, process: ForwardProcess, n: int, denoise: float = 1.0) -> np.ndarray:
    """The schedule over the whole range of the process, shape (n + 1,), or its end if the image is only partly redone.

    denoise: with less than 1, the last n steps of the schedule of int(n / denoise) steps, so that about this share of
    the schedule runs; 0 or less is no step at all, shape (0,). This is ComfyUI's meaning of the word.
    """
    if denoise <= 0.0:
        return np.empty(0)
    total = n if denoise >= 1.0 else int(n / denoise)
    return schedule(process, process.t_max, process.t_min, total)[-(n + 1) :]
