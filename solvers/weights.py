"""Weights of exponential multistep methods: the integral of a polynomial through past values against an exponential."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def phi(k: int, z: float) -> float:
    """phi_k(z) = sum_{j>=0} z^j / (j + k)!, the functions of exponential integrators; phi_0 is exp.

    The recursion phi_k = (phi_{k-1} - 1/(k-1)!) / z cancels for small z, where the series is used instead.
    """
    if abs(z) < 0.5 * (k + 1):
        term = total = 1.0 / math.factorial(k)
        for j in range(1, 30):
            term *= z / (j + k)
            total += term
        return total
    value = math.exp(z)
    for j in range(k):
        value = (value - 1.0 / math.factorial(j)) / z
    return value


def data_moments(k: int, H: float) -> list[float]:
    """Integrals of u^m, m < k, against data prediction's kernel: int_0^1 H e^{-H (1-u)} u^m du = H m! phi_{m+1}(-H)."""
    return [H * math.factorial(m) * phi(m + 1, -H) for m in range(k)]


def weights(u: Sequence[float], M: Sequence[float]) -> list[float]:
    """Weights w_j with sum_j w_j u_j^m = M_m, m < k: what integrates every polynomial of degree below k exactly.

    u: the k nodes, in units of the step (0 is its start, 1 its end). M: the moments of the kernel. Both of length k.
    """
    if len(u) == 1:
        return [M[0]]
    return np.linalg.solve(np.vander(u, increasing=True).T, M).tolist()
