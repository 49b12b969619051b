"""Weights of exponential multistep methods: the integral of a polynomial through past values against an exponential."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


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


def weights(u: Sequence[float], M: Sequence[Any], reach: Sequence[Sequence[int]] | None = None) -> list[Any]:
    """Weights w_j with sum_j w_j u_j^m = M_m, m < k: what integrates every polynomial of degree below k exactly.

    u: the k nodes, in units of the step (0 is its start, 1 its end). M: the moments of the kernel. Both of length k.
    reach: for each power m, the nodes (places in u) whose polynomial gives the coefficient of u^m, at least m + 1 for it
        to count; there may be more nodes than moments then. None: all nodes for all, as above.
    """
    if reach is None:
        nodes = range(len(u))
        return [sum(c * m for c, m in zip(lagrange(u, j, nodes), M, strict=True)) for j in nodes]
    found: list[Any] = [0.0] * len(u)
    for m, (nodes, moment) in enumerate(zip(reach, M, strict=True)):
        for j in nodes if m < len(nodes) else ():
            found[j] = found[j] + lagrange(u, j, nodes)[m] * moment
    return found


def lagrange(u: Sequence[float], j: int, nodes: Sequence[int]) -> list[float]:
    """Coefficients, constant first, of the polynomial that is 1 at node j and 0 at the others of ``nodes``."""
    c = [1.0]
    for i in nodes:
        if i != j:
            c = [(a - u[i] * b) / (u[j] - u[i]) for a, b in zip([0.0, *c], [*c, 0.0], strict=True)]
    return c
