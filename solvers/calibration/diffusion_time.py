"""How low a run may begin: the divergence between noise and the noised pictures that a sampler takes it for.

    KL( N(m, Lambda + k^2) || N(0, k^2) ) = 1/2 ( ||m||^2 / k^2 + sum_i [ v_i / k^2 - ln(1 + v_i / k^2) ] ),      k = sigma / alpha,

in x / alpha, m being the mean and v_i the variances of pictures along their principal directions. What comes after the start cannot
raise it, so the pictures of an exact run are no further from the model's, as far as these are Gaussian. It falls with k.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..process import ForwardProcess
from ..schedules.schedule import ratios
from .gaussian import GaussianStatistics

_HALVINGS = 60


class Spectrum(NamedTuple):
    """||m||^2, the variances, and how often each is there; all in units of the model's noise."""

    mean: float
    variances: np.ndarray
    counts: np.ndarray


def spectrum(statistics: GaussianStatistics, size: tuple[int, ...], noise_scale: float = 1.0) -> Spectrum:
    """Of latents of that size, without channels."""
    known = statistics.at(size)
    inside, outside = known.mean.size, math.prod(size) - known.mean[0].size
    if len(known.eig):
        variances, counts = (
            np.append(known.eig, known.var.flat[0]),
            np.append(np.ones(len(known.eig)), inside - len(known.eig)),
        )
    else:
        variances, counts = known.var.ravel(), np.ones(inside)
    variances, counts = np.append(variances, known.tail), np.append(counts, np.full(len(known.tail), outside))
    unit = noise_scale**2
    return Spectrum(float((known.mean**2).sum()) / unit, variances / unit, counts)


def mismatch(pictures: Spectrum, k: float) -> float:
    """The divergence, in nats, of noise that a sampler takes for pictures at noise-to-signal ratio k."""
    share = pictures.variances / k**2
    return 0.5 * (pictures.mean / k**2 + float((pictures.counts * (share - np.log1p(share))).sum()))


def lowest(process: ForwardProcess, pictures: Spectrum, nats: float) -> float:
    """The lowest time at which noise is no further than ``nats`` from noised pictures; t_max if it is further even there."""
    high, low = np.log(ratios(process, process.t_max, process.t_min, 0.9999))
    if mismatch(pictures, math.exp(high)) > nats:
        return process.t_max
    for _ in range(_HALVINGS):
        middle = 0.5 * (high + low)
        high, low = (middle, low) if mismatch(pictures, math.exp(middle)) <= nats else (high, middle)
    return float(process.t_of_rho(math.exp(high)))
