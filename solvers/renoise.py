"""The one re-noising primitive: from a noise level up to a higher one, with the exact marginal."""

from __future__ import annotations

import math

import torch

from .process import ForwardProcess


def spread(process: ForwardProcess, s: float, t: float) -> tuple[float, float]:
    """``(a, b)`` with ``x_t ~ a x_s + b z`` for a noisier t >= s, z standard normal.

    a = alpha_t / alpha_s,  b = noise_scale sqrt(sigma_t^2 - a^2 sigma_s^2). s = 0 is the clean sample.
    """
    if t < s:
        raise ValueError(f"noise is added from a lower to a higher sigma, not from {s!r} to {t!r}.")
    a = process.alpha(t) / process.alpha(s)
    missing = process.sigma(t) ** 2 - (a * process.sigma(s)) ** 2
    return a, process.noise_scale * math.sqrt(max(missing, 0.0))


def renoise(process: ForwardProcess, x: torch.Tensor, s: float, t: float, z: torch.Tensor, s_noise: float = 1.0):
    """x at noise level s brought up to level t >= s: ``alpha_t / alpha_s x + b z``; ``s_noise`` is a factor on b."""
    a, b = spread(process, s, t)
    return (x * a).add_(z, alpha=b * s_noise)
