"""Noise sources: ``(s, t) -> z``, standard normal, tied to the interval from time s down to t."""

from __future__ import annotations

import math

import torch

from .solver import Noise, no_noise

__all__ = ["KINDS", "brownian", "gaussian", "no_noise", "source"]

KINDS = ("gaussian", "brownian")


def gaussian(x: torch.Tensor, seed: int) -> Noise:
    """Independent noise per call, from a generator of its own on x's device (never the global one).

    The generator starts from ``seed + 1``: ``seed`` itself made the initial noise.
    """
    generator = torch.Generator(device=x.device).manual_seed((seed + 1) % 2**63)

    def noise(s: float, t: float) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)

    return noise


def brownian(x: torch.Tensor, seed: int, t_max: float, t_min: float) -> Noise:
    """Normalised increments of one Brownian path W in t: ``z = (W_s - W_t) / sqrt(s - t)``.

    The same seed gives the same path however it is cut into steps, so a run with more steps converges to one picture.
    t_max, t_min: the outermost times that will be asked for. One path per batch row.
    """
    from torchsde import BrownianTree  # ComfyUI brings it; imported here since few runs need it

    # A little wider than asked: torchsde compares the ends in single precision.
    low, high = (torch.tensor(t, dtype=torch.float64) for t in (t_min * (1 - 1e-6), t_max * (1 + 1e-6)))
    trees = [BrownianTree(low, torch.zeros_like(row), high, entropy=(seed + i) % 2**31) for i, row in enumerate(x)]

    def noise(s: float, t: float) -> torch.Tensor:
        a, b = torch.tensor(t, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)
        return torch.stack([tree(a, b) for tree in trees]).to(x) / math.sqrt(s - t)

    return noise


def source(kind: str, x: torch.Tensor, seed: int, times: list[float]) -> Noise:
    """The noise source ``kind`` (one of ``KINDS``) for a run over decreasing ``times``."""
    if kind == "gaussian" or len(times) < 2:
        return gaussian(x, seed)
    return brownian(x, seed, times[0], times[-1])
