"""The dynamic program that all schedules on a grid share: the cheapest way in n jumps from the first level to the last."""

from __future__ import annotations

import numpy as np


def cheapest(cost: np.ndarray, n: int, gamma: float = 1.0) -> list[int]:
    """Levels 0 = j_0 < j_1 < ... < j_n = N - 1 with the least sum_i gamma^i cost[j_i, j_{i+1}]; the first ones where several are.

        V_1(j) = cost[j, N - 1],      V_k(j) = min_{i > j} cost[j, i] + gamma V_{k-1}(i)

    cost (N, N): of the jump from one level to a later one; all else is not read. Costs may be negative. With gamma above 1 later
    jumps count more, so that levels gather there. O(n N^2), exact.
    """
    N = len(cost)
    if not 1 <= n < N:
        raise ValueError(f"There are ways of 1 to {N - 1} jumps over {N} levels, not of {n}.")
    later = np.where(np.triu(np.ones((N, N), dtype=bool), 1), cost, np.inf)
    value, chosen = later[:, -1], []
    for _ in range(n - 1):
        total = later + gamma * value[None]
        chosen.append(total.argmin(1))
        value = total.min(1)
    path = [0]
    for choice in reversed(chosen):
        path.append(int(choice[path[-1]]))
    return [*path, N - 1]


def packed(cost: np.ndarray) -> list[list[float]]:
    """For each level the costs of jumps to all later ones, in 6 digits: short in a file."""
    return [[float(f"{v:.6g}") for v in row[i + 1 :]] for i, row in enumerate(cost.tolist())]


def unpacked(rows: list[list[float]], N: int) -> np.ndarray:
    """(N, N), from ``packed``; rows may be missing at the end, where there is nothing to jump to."""
    cost = np.zeros((N, N))
    for i, row in enumerate(rows):
        cost[i, i + 1 :] = row
    return cost
