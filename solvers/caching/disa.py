"""DiSA: fewer diffusion steps for the later blocks of an autoregressive run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..method import Method, param

LINEAR, COSINE, TWO_STAGE = STRATEGIES = ("linear", "cosine", "two-stage")


@dataclass(frozen=True)
class DiSA(Method):
    """Lets an autoregressive video sampler take fewer steps for later blocks: what came before leaves them less open.

    For Sampler AR Video (Self-Forcing, Causal Forcing): block b of B gets

        n_b = lower + (n - lower) a(b / (B - 1)),   rounded down,

    of the schedule's n steps, with a(r) = 1 - r (linear), (1 + cos pi r) / 2 (cosine), or 1 in the first half and 0 in
    the second (two-stage). A block keeps its first and last sigmas and the ones in between that are nearest to evenly
    many apart. The sampler itself is ComfyUI's: a step that a block does not take costs no network call, and the noise
    drawn after it is thrown away with it.

    ``lower`` 0, or as many steps as the schedule has, changes nothing. Published for autoregressive image models whose
    diffusion head takes 50 to 100 steps per token, annealed to 5 to 15. ComfyUI's autoregressive video models are
    distilled to about four, so there is much less to anneal, and what it costs in quality has not been measured by us:
    compare.

    Works with no other sampler: there is nothing autoregressive about them. Raises ValueError for one.

    Source: Zhao et al. (2025), arXiv:2505.20297; rounding as in the authors' programs.
    """

    id: ClassVar[str] = "DiSA"
    title: ClassVar[str] = "DiSA"
    paper: ClassVar[str] = "Zhao et al. (2025), arXiv:2505.20297"

    lower: int = param(2, "Steps of the last block; 0 changes nothing.", min=0, max=1000)
    strategy: str = param(LINEAR, "How the number of steps falls from block to block.", options=STRATEGIES)

    def steps(self, block: int, blocks: int, upper: int) -> int:
        """How many of the schedule's ``upper`` steps a block takes; at least one."""
        lower = min(self.lower or upper, upper)
        r = block / (blocks - 1) if blocks > 1 else 0.0
        share = {
            LINEAR: 1.0 - r,
            COSINE: (1.0 + math.cos(math.pi * r)) / 2.0,
            TWO_STAGE: 1.0 if r < 0.5 else 0.0,
        }[self.strategy]
        return max(int(lower + (upper - lower) * share + 1e-9), 1)

    def taken(self, block: int, blocks: int, upper: int) -> list[int]:
        """Which of the schedule's steps 0 ... upper - 1 those are: the first always, evenly spread over the rest."""
        n = self.steps(block, blocks, upper)
        return [round(i * upper / n) for i in range(n)]
