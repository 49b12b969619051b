"""AT-EDM: tokens that attention finds unimportant are left out of a transformer's later layers and filled in at its
end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method import param
from .accelerator import Accelerator, Plan, Run, Session
from .declared import END, START
from .token_merge import most_similar
from .tracker import Position


@dataclass(frozen=True)
class ATEDM(Accelerator):
    """Leaves unimportant tokens out of a UNet's transformers, after their first self-attention, and fills them in at
    the end.

    For SDXL above all, whose transformers have many blocks; SD 1.x and 2.x save a little at large sizes. Keeps nothing
    between calls, so it works with every sampler. It changes a picture more than a cache that saves as much: try those
    first.

    In every transformer of the UNet, the attention maps A^h of its first block rank the tokens: starting from s = 1,

    s_i <- sum_j A^h_ji s_j / sum_j s_j,        s_i = (mean_h (s^h_i)^2)^(1/2),

    a weighted PageRank in which tokens count by the attention they get from tokens that count; the root mean square
    over heads favours heads with sharp attention. Rows j are ``samples`` evenly spaced queries, not all, so no n x n
    map is made and fast attention kernels stay in use. The ``ratio`` of tokens with the smallest s leaves. At the
    transformer's end, before the next convolution, a token i that left gets the change of the kept token k it resembled
    most when it left:

    x_i + (y_k - x_k);

    the paper copies y_k. In the first ``early`` part of the steps, whose attention says little yet, ``early_ratio``
    leaves.

    ``ratio`` and ``early_ratio`` 0 give exactly the plain result. Runs in which another pack patches attention inside a
    UNet (IP-Adapter, regional prompts, perturbed attention, Tome, HyperTile) are left alone, as those know the tokens
    by their place. Not for SVD and animation UNets, whose frames must keep the same tokens.

    Measured as FORA was, on the demo UNet, whose transformers are shallow and see 64 tokens at most: 2.8 % of the work
    saved, 0.078 from the whole network's picture (0.089 from the converged one instead of 0.047), 0.140 without sparing
    the first steps. Fewer steps are better there, by far; SDXL was not measured.

    Source: Wang, Liu, Kang, Li, Lin, Jha, Liu (2024), arXiv:2405.05218. Sampled queries and the copied change are ours.
    """

    id: ClassVar[str] = "ATEDM"
    title: ClassVar[str] = "AT-EDM"
    paper: ClassVar[str] = "Wang et al. (2024), arXiv:2405.05218"
    site: ClassVar[str] = "tokens"

    ratio: float = param(0.3, "The fraction of tokens that is left out.", min=0.0, max=0.9, step=0.01)
    early_ratio: float = param(0.1, "The fraction that is left out in the first steps.", min=0.0, max=0.9, step=0.01)
    early: float = param(0.3, "Which part of the steps counts as the first ones.", min=0.0, max=1.0, step=0.01)
    levels: int = param(
        0, "At how many resolutions that have attention, from the largest inwards; 0: at all of them.", min=0, max=8
    )
    samples: int = param(64, "How many queries rank the tokens.", min=4, max=4096, advanced=True)
    start_percent: float = START()
    end_percent: float = END()

    @property
    def percents(self) -> tuple[float, float]:
        return self.start_percent, self.end_percent

    def off(self, run: Run) -> str | None:
        return None

    def start(self, run: Run) -> ATEDMSession:
        return ATEDMSession(self, run)


class ATEDMSession(Session):
    """``left``: the fraction of tokens that the current call leaves out."""

    def __init__(self, settings: ATEDM, run: Run):
        super().__init__(run)
        self.settings, self.left = settings, 0.0

    def decide(self, t: float, position: Position) -> Plan:
        s = self.settings
        self.left = s.early_ratio if position.step < s.early * self.tracker.steps else s.ratio
        return Plan.FULL if self.active(t) and self.left > 0.0 else Plan.PLAIN


ITERATIONS = 4
"""Of the power method; with the ratio of its first two eigenvalues it has settled after three."""


def importance(q: torch.Tensor, k: torch.Tensor, samples: int) -> torch.Tensor:
    """How important each token is, ``(rows, tokens)``, from queries and keys ``(rows, heads, tokens, channels)``."""
    n = q.shape[2]
    at = torch.linspace(0, n - 1, min(samples, n)).round().long().to(q.device)
    a = torch.softmax((q[:, :, at].float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5, dim=-1)
    s = torch.ones_like(a[..., 0])  # of the sampled queries
    for _ in range(ITERATIONS):
        ranked = torch.einsum("bhj,bhji->bhi", s / s.sum(-1, keepdim=True), a)
        s = ranked[:, :, at]
    return ranked.square().mean(1).sqrt()


@dataclass(frozen=True)
class Pruned:
    """What is needed to fill in the tokens that left.

    x: all tokens before. kept, gone: indices ``(rows, count)``. like: for each that is gone, its place among the kept.
    """

    x: torch.Tensor
    kept: torch.Tensor
    gone: torch.Tensor
    like: torch.Tensor

    def restore(self, y: torch.Tensor) -> torch.Tensor:
        """All tokens after, from the kept ones ``y``."""
        change = y - _take(self.x, self.kept)
        filled = _take(self.x, self.gone) + _take(change, self.like)
        out = torch.empty_like(self.x)
        for index, tokens in ((self.kept, y), (self.gone, filled)):
            out.scatter_(1, index.unsqueeze(-1).expand_as(tokens), tokens.to(out.dtype))
        return out


def prune(x: torch.Tensor, scores: torch.Tensor, left: float) -> tuple[torch.Tensor, Pruned | None]:
    """``x`` without the ``left`` fraction of tokens with the smallest scores, the others in their order."""
    count = round(left * x.shape[1])
    if count == 0:
        return x, None
    order = scores.argsort(dim=1)
    gone, kept = order[:, :count], order[:, count:].sort(dim=1).values
    rest = _take(x, kept)
    return rest, Pruned(x, kept, gone, most_similar(_take(x, gone), rest))


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
