"""Schedules that are a curve in sigma: Karras, exponential (uniform in log-SNR), polyexponential, cosine.

With v_i = i / (n - 1), each is a decreasing curve k(v) from k(0) = k_max to k(1) = k_min, k being the noise-to-signal
ratio sigma / alpha: sigma itself on variance exploding models.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..method import param
from ..process import ForwardProcess
from .schedule import SHIFT, SIGMA_CUT, SPACE, Schedule, ratios


@dataclass(frozen=True)
class CurveSchedule(Schedule):
    """Abstract: a curve between two positive finite numbers. Members give ``curve`` and the two fields it reads."""

    @property
    @abstractmethod
    def space(self) -> str:
        """``ratio`` or ``sigma``: what k is."""

    @property
    @abstractmethod
    def sigma_cut(self) -> float:
        """Where the curve starts if k_max is infinite."""

    @abstractmethod
    def curve(self, high: float, low: float, v: np.ndarray) -> np.ndarray:
        """k(v), shape of v, from k(0) = high to k(1) = low."""

    def nodes(self, process: ForwardProcess, t_max: float, t_min: float, n: int) -> np.ndarray:
        v = np.linspace(0.0, 1.0, n)
        if self.space == "sigma":
            t = self.curve(t_max, t_min, v)
        else:
            t = process.t_of_rho(self.curve(*ratios(process, t_max, t_min, self.sigma_cut), v))
        return np.where(v == 0.0, t_max, np.where(v == 1.0, t_min, t))


@dataclass(frozen=True)
class KarrasSchedule(CurveSchedule):
    """Sigmas evenly spaced in sigma^(1/rho), the schedule of EDM: small steps at low noise, the usual choice.

    k(v) = (k_max^(1/rho) + v (k_min^(1/rho) - k_max^(1/rho)))^rho

    rho = 1 is linear in sigma; rho towards infinity is the exponential schedule; 7 is the paper's choice for sampling,
    3 nearly evens out the truncation error.

    Source: Karras, Aittala, Aila, Laine (2022), arXiv:2206.00364, eq. 5.
    """

    id: ClassVar[str] = "KarrasSchedule"
    title: ClassVar[str] = "Karras schedule (EDM)"
    paper: ClassVar[str] = "Karras et al. (2022), arXiv:2206.00364"

    rho: float = param(
        7.0, "Higher puts more of the steps at low noise: 1 is linear in sigma.", min=0.1, max=1000.0, step=0.1
    )
    shift: float = param(**SHIFT)
    space: str = param(**SPACE)
    sigma_cut: float = param(**SIGMA_CUT)

    def curve(self, high: float, low: float, v: np.ndarray) -> np.ndarray:
        # Relative to high, so that no power leaves the range of floats; rho -> inf is high (low / high)^v.
        end = (low / high) ** (1.0 / self.rho)
        return high * (1.0 + v * (end - 1.0)) ** self.rho


@dataclass(frozen=True)
class ExponentialSchedule(CurveSchedule):
    """Sigmas in geometric progression, that is evenly spaced in log-SNR: what DPM-Solver was made for.

    ln k(v) = (1 - v) ln k_max + v ln k_min,  that is lambda(v) = lambda_min + v (lambda_max - lambda_min)

    On flow models k = sigma / alpha makes it uniform in log-SNR; with space = sigma it is geometric in sigma instead,
    which is something else there. Polyexponential with rho = 1.

    Source: Lu et al. (2022), arXiv:2206.00927 (steps uniform in lambda).
    """

    id: ClassVar[str] = "ExponentialSchedule"
    title: ClassVar[str] = "Exponential schedule (uniform in log-SNR)"
    paper: ClassVar[str] = "Lu et al. (2022), arXiv:2206.00927"

    shift: float = param(**SHIFT)
    space: str = param(**SPACE)
    sigma_cut: float = param(**SIGMA_CUT)

    def curve(self, high: float, low: float, v: np.ndarray) -> np.ndarray:
        return high * (low / high) ** v


@dataclass(frozen=True)
class PolyexponentialSchedule(CurveSchedule):
    """Log sigma along a power curve: rho above 1 shortens the steps towards low noise, below 1 towards high noise.

    ln k(v) = ln k_min + (1 - v)^rho (ln k_max - ln k_min)

    rho = 1 is the exponential schedule.

    Source: Crowson (2022), k-diffusion, https://github.com/crowsonkb/k-diffusion; no paper.
    """

    id: ClassVar[str] = "PolyexponentialSchedule"
    title: ClassVar[str] = "Polyexponential schedule"
    paper: ClassVar[str] = "Crowson (2022), k-diffusion"

    rho: float = param(
        1.0, "1 is exponential; higher puts more of the steps at low noise.", min=0.1, max=10.0, step=0.05
    )
    shift: float = param(**SHIFT)
    space: str = param(**SPACE)
    sigma_cut: float = param(**SIGMA_CUT)

    def curve(self, high: float, low: float, v: np.ndarray) -> np.ndarray:
        return low * (high / low) ** ((1.0 - v) ** self.rho)


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """Evenly spaced in the angle whose cosine is the signal and whose sine is the noise.

    k(v) = c tan((1 - v) atan(k_max / c) + v atan(k_min / c)),  k = sigma / alpha

    c = 1 is the cosine schedule: alpha = cos, sigma = sin of a uniform angle (its small offset is replaced by the exact
    ends of the model's range). With c the standard deviation of the latents it is the schedule for which Euler steps
    are KL-optimal on Gaussian data (Sabour et al. 2024, arXiv:2404.14507, theorem 3.1); ComfyUI's ``kl_optimal`` is
    c = 1. An infinite k_max, as on flow models, is the angle pi / 2 and needs no cut.

    Source: Nichol, Dhariwal (2021), arXiv:2102.09672, eq. 17.
    """

    id: ClassVar[str] = "CosineSchedule"
    title: ClassVar[str] = "Cosine schedule (KL-optimal)"
    paper: ClassVar[str] = "Nichol, Dhariwal (2021), arXiv:2102.09672"

    c: float = param(
        1.0,
        "Noise-to-signal ratio around which the steps gather: 1 is cosine, the std of the latents is KL-optimal.",
        min=0.01,
        max=100.0,
        step=0.01,
    )
    shift: float = param(**SHIFT)

    def nodes(self, process: ForwardProcess, t_max: float, t_min: float, n: int) -> np.ndarray:
        v = np.linspace(0.0, 1.0, n)
        high, low = np.arctan(process.rho([t_max, t_min]) / self.c)
        t = process.t_of_rho(self.c * np.tan((1.0 - v) * high + v * low))
        return np.where(v == 0.0, t_max, np.where(v == 1.0, t_min, t))
