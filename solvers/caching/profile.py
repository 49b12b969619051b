"""What the blocks of one network do along sampling: measured once, used by TeaCache and MagCache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..artifact import Artifact

KIND = "block_profile"
"""Of artifacts: their table has the fields of ``BlockProfile`` but for the last."""
DEGREE = 4


@dataclass(frozen=True, eq=False)
class BlockProfile:
    """How the residual R of all blocks changes from one call to the next.

    network: class of the network. blocks: how many it has.
    polynomial: highest power first: from the relative change of the first block's modulated input to that of R.
    span: the least and the largest change seen; what lies outside is taken as the nearest of them.
    at, log_size: sum of log (|R_i| / |R_{i-1}|) up to half log-SNR ``at``, increasing.
    source: the artifact it was read from.
    """

    network: str
    blocks: int
    polynomial: tuple[float, ...]
    span: tuple[float, float]
    at: tuple[float, ...]
    log_size: tuple[float, ...]
    source: Artifact | None = None

    @classmethod
    def of(cls, artifact: Artifact) -> BlockProfile:
        """Raises ``ValueError`` for a table that is none."""
        table = artifact.table
        try:
            polynomial, at, log_size = (tuple(map(float, table[name])) for name in ("polynomial", "at", "log_size"))
            low, high = map(float, table["span"])
            made = cls(str(table["network"]), int(table["blocks"]), polynomial, (low, high), at, log_size, artifact)
        except (KeyError, TypeError, ValueError):
            raise ValueError("The file holds no profile of transformer blocks, or a damaged one.") from None
        if len(made.at) != len(made.log_size) or not made.at or list(made.at) != sorted(made.at):
            raise ValueError("The file holds a damaged profile of transformer blocks.")
        return made

    def table(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "source"}

    def growth(self, start: float, end: float) -> float:
        """|R(end)| / |R(start)| between two half log-SNRs; where nothing was measured it stays what it is."""
        return math.exp(float(np.interp(end, self.at, self.log_size) - np.interp(start, self.at, self.log_size)))

    def change(self, watched: float) -> float:
        """The change of R to expect of this change of the modulated input."""
        return expected(self.polynomial, min(max(watched, self.span[0]), self.span[1]))


def expected(polynomial: Sequence[float], watched: float) -> float:
    """Never negative, NaN for NaN."""
    value = float(np.polyval(polynomial, watched))
    return value if not value < 0.0 else 0.0


def fitted(
    network: str, blocks: int, changes: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]]
) -> BlockProfile:
    """changes: pairs (of the modulated input, of R). sizes: pairs (half log-SNR, log of the ratio to the call before, 0 for the
        first call).

    Least squares, of lower degree where there are few pairs. Calls at the same half log-SNR count once, by their mean.

    Raises ``ValueError`` where less than three calls were measured.
    """
    if len({at for at, _ in sizes}) < 2 or len(changes) < 2:
        raise ValueError("Too few calls were measured: at least three different ones are needed.")
    x, y = np.asarray(changes, dtype=np.float64).T
    degree = min(DEGREE, (len(np.unique(x)) - 1) // 3)
    at = sorted({at for at, _ in sizes})
    steps = [float(np.mean([ratio for c, ratio in sizes if c == a])) for a in at]
    return BlockProfile(
        network,
        blocks,
        tuple(np.polyfit(x, y, degree).tolist()),
        (float(x.min()), float(x.max())),
        tuple(at),
        tuple(np.cumsum(steps).tolist()),
    )
