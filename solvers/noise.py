"""Noise sources: ``(s, t) -> z``, standard normal, tied to the interval from time s down to t."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from .solver import Noise


def gaussian(x: torch.Tensor, seed: int, times: Sequence[float] = ()) -> Noise:
    """Independent noise per call, from a generator of its own on x's device (never the global one).

    The generator starts from ``seed + 1``: ``seed`` itself made the initial noise.
    """
    generator = torch.Generator(device=x.device).manual_seed((seed + 1) % 2**63)

    def noise(s: float, t: float) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)

    return noise


def brownian(x: torch.Tensor, seed: int, times: Sequence[float]) -> Noise:
    """Normalised increments of one Brownian path W in t: ``z = (W_s - W_t) / sqrt(s - t)``.

    The same seed gives the same path however it is cut into steps, so a run with more steps converges to one picture.
    times: decreasing; noise can be drawn between the first and the last. Every batch row has a path of its own.
    """
    from torchsde import BrownianTree  # ComfyUI brings it; imported here since few runs need it

    t_max, t_min = times[0], times[-1]
    # A little wider than asked: torchsde compares the ends in single precision.
    low, high = (torch.tensor(t, dtype=torch.float64) for t in (t_min * (1 - 1e-6), t_max * (1 + 1e-6)))
    trees = [BrownianTree(low, torch.zeros_like(row), high, entropy=[seed, i]) for i, row in enumerate(x)]

    def noise(s: float, t: float) -> torch.Tensor:
        a, b = torch.tensor(t, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)
        return torch.stack([tree(a, b) for tree in trees]).to(x) / math.sqrt(s - t)

    return noise


SOURCES: dict[str, Callable[[torch.Tensor, int, Sequence[float]], Noise]] = {"brownian": brownian, "gaussian": gaussian}
"""By the name a solver asks for: ``(x, seed, times) -> Noise``."""
