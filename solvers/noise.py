"""Noise sources: ``(s, t) -> z``, standard normal, tied to the interval from time s down to t.

All noise is made of *named* normal tensors: the stream that fills row i of one of them is started by a hash of (source,
seed, i, name). So a row depends on its seed, its place in the batch and its shape alone, never on how many other rows
there are, nor on what was drawn before; and no stream is that of ComfyUI's initial noise, which starts from the seed
itself. The generators are the sources' own, on x's device: the same seed gives other noise on another kind of device.

Normals are drawn in float32 and added up in float32, in float64 if x is; half types get the rounded result. So the
noise does not depend on the precision either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b

import torch

from .solver import Noise

Draw = Callable[..., torch.Tensor]
"""``(*name) -> z``: the independent standard normal tensor of that name, float32, of x's shape and device."""

LOWEST = 2.0**-10
"""An octave is [2^k, 2^{k+1}) from here on; below is one interval, [0, LOWEST)."""

BITS = 18
"""Halvings of an octave: times are rounded to 2e-6 of themselves (to 2e-9 below LOWEST)."""


def _named(source: str, x: torch.Tensor, seed: int) -> Draw:
    """Every whole number is a seed of its own.

    torch starts a stream from 64 bits of the hash, on the CPU from 32: there, of the 400 streams that make the paths of
    one row over 20 steps, two are equal in one run of 50 000.
    """
    shape, device = x.shape, x.device  # x itself is not kept alive
    generator = torch.Generator(device=device)

    def draw(*name: float) -> torch.Tensor:
        z = torch.empty(shape, dtype=torch.float32, device=device)
        for i, row in enumerate(z):
            start = blake2b(repr((source, int(seed), i, *name)).encode(), digest_size=8).digest()
            row.normal_(generator=generator.manual_seed(int.from_bytes(start, "little")))
        return z

    return draw


def gaussian(x: torch.Tensor, seed: int, times: Sequence[float] = ()) -> Noise:
    """Independent noise per call, whatever the interval: the n-th call gets the n-th noise of the seed."""
    draw, dtype = _named("gaussian", x, seed), x.dtype
    calls = 0

    def noise(s: float, t: float) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return draw(calls).to(dtype)

    return noise


def brownian(x: torch.Tensor, seed: int, times: Sequence[float] = ()) -> Noise:
    """Normalised increments of one Brownian path W in t: ``z = (W_s - W_t) / sqrt(s - t)``, s > t >= 0.

    The same seed gives the same path however it is cut into steps, so a run with more steps converges to one picture.
    Nor does the path depend on ``times``: a run finished by a second sampler goes on along it.

    The path is Lévy's construction on every octave. As its normals have names, W is known at any time without what was
    asked before: W_t costs one draw per halving, W over a whole octave one. Octaves, because most steps are taken at
    small times, which a tree over [0, t_max] would reach only after many halvings.

    Rounded times are those of a lattice (see BITS), and z is normalised by the rounded s - t. So z is exactly standard
    normal, and independent over intervals that do not overlap. Two times rounded to one get noise of their own, which
    is no part of the path. Rounding error of z: 1e-7 sqrt(s / (s - t)). Memory: three times the size of x, in float32
    for half types.

    Source: Lévy (1948), the midpoint construction; Li et al. (2020), arXiv:2001.01328, the virtual Brownian tree.
    """
    draw, shape, dtype, device = _named("brownian", x, seed), x.shape, x.dtype, x.device
    sum_dtype = torch.promote_types(dtype, torch.float32)

    @lru_cache(maxsize=3)  # the start, a stage and the end of a step
    def above_octave(t: float) -> torch.Tensor:
        """W_t - W_low, low being the start of the octave of t."""
        low, width = _octave(t)
        w = torch.zeros(shape, dtype=sum_dtype, device=device)
        for name, share in _levy((t - low) / width):
            w.add_(draw(low, *name), alpha=share * math.sqrt(width))
        return w

    def noise(s: float, t: float) -> torch.Tensor:
        upper, lower = _rounded(s), _rounded(t)
        if upper == lower:
            return draw("within", float(s), float(t)).to(dtype)
        w = above_octave(upper) - above_octave(lower)
        low, width = _octave(lower)
        while low < _octave(upper)[0]:
            w.add_(draw(low), alpha=math.sqrt(width))
            low, width = _octave(low + width)
        return w.div_(math.sqrt(upper - lower)).to(dtype)

    return noise


def _octave(t: float) -> tuple[float, float]:
    """Start and length of the octave of t; all times below the lowest octave share one interval."""
    if t < LOWEST:
        return 0.0, LOWEST
    start = 2.0 ** (math.frexp(t)[1] - 1)
    return start, start


def _rounded(t: float) -> float:
    spacing = _octave(t)[1] / 2**BITS
    return round(t / spacing) * spacing


def _levy(u: float) -> Iterator[tuple[tuple[int, ...], float]]:
    """W_u for a Brownian path from 0, u in [0, 1): names of independent normals and the factor on each.

    The unnamed one makes W_1; (level, i) makes the midpoint of the i-th of 2^level intervals, given W at their ends: a
    tent of height 2^{-level/2} / 2. A dyadic u is an end sooner or later, where all further tents are 0.
    """
    if u == 0.0:
        return
    yield (), u
    level, i, inside = 0, 0, u
    while inside != 0.0:
        yield (level, i), min(inside, 1.0 - inside) * 2.0 ** (-level / 2)
        level += 1
        inside, i = math.modf(u * 2.0**level)
        i = int(i)


SOURCES: dict[str, Callable[[torch.Tensor, int, Sequence[float]], Noise]] = {"brownian": brownian, "gaussian": gaussian}
"""By the name a solver asks for: ``(x, seed, times) -> Noise``."""
