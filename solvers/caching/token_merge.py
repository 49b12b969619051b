"""ToDo: queries keep all tokens, keys and values fewer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from ..method import param
from .accelerator import Accelerator, Plan, Run, Windowed
from .declared import END, START


@dataclass(frozen=True)
class ToDo(Accelerator):
    """Gives the self-attention of a UNet's outer blocks fewer keys and values, which is where large pictures cost most.

    For SD 1.x, SD 2.x, SDXL at large sizes, where attention dominates: from about 1024 x 1024 (SD 1.x) or 1536 x 1536
    (SDXL). At a model's own size it saves little. Works with all samplers, also with few steps, and keeps nothing
    between calls.

    With tokens x on an h x w grid, attention computes softmax(Q(x) K(y)^T / sqrt(d)) V(y) with y = x on every
    ``factor``-th row and column. Its cost falls by ``factor``^2, that of K and V too. ``keep`` says what the tokens
    that stay stand for: "nearest" themselves, as in the paper; "mean" the average of their cell; "similar" the average
    of the tokens that resemble them most, wherever they are (ToMe's matching, for keys and values only; costs a half of
    what it saves).

    ``factor`` 1 gives exactly the plain result. Where another pack replaces a self-attention or has changed the number
    of its tokens (perturbed attention, HyperTile), that layer is left alone. With ComfyUI's Tome Patch Model both work.

    Measured as FORA was, on the demo UNet, which is far too small to profit: 1.2 % of the work saved, 0.015 from the
    whole network's picture with "nearest", 0.014 with "mean", 0.020 with "similar", which repays its cost nowhere in
    this test.

    Source: Smith, Saxena, Saha (2024), arXiv:2402.13573; "similar" after Bolya, Hoffman (2023), arXiv:2303.17604.
    """

    id: ClassVar[str] = "ToDo"
    title: ClassVar[str] = "ToDo"
    paper: ClassVar[str] = "Smith, Saxena, Saha (2024), arXiv:2402.13573"
    site: ClassVar[str] = "tokens"

    factor: int = param(
        2, "Every how manieth row and column of keys and values stays; 1 switches it off.", min=1, max=8
    )
    levels: int = param(1, "At how many resolutions that have attention, from the largest inwards.", min=1, max=8)
    keep: str = param(
        "nearest", "What the tokens that stay stand for: themselves, the mean of their cell, or the tokens most like them.",
        options=("nearest", "mean", "similar"),
    )  # fmt: skip
    start_percent: float = START()
    end_percent: float = END()

    @property
    def percents(self) -> tuple[float, float]:
        return self.start_percent, self.end_percent

    def off(self, run: Run) -> str | None:
        return None

    def start(self, run: Run) -> ToDoSession:
        return ToDoSession(self, run)


class ToDoSession(Windowed):
    def __init__(self, settings: ToDo, run: Run):
        super().__init__(run)
        self.settings = settings

    def decide(self, t, position):
        return Plan.PLAIN if self.settings.factor == 1 else super().decide(t, position)


def fewer(x: torch.Tensor, height: int, width: int, factor: int, keep: str) -> torch.Tensor:
    """Tokens ``(rows, height * width, channels)`` on every ``factor``-th row and column of their grid."""
    grid = x.view(len(x), height, width, -1)
    if keep == "nearest":
        return grid[:, ::factor, ::factor].flatten(1, 2)
    if keep == "mean":
        cells = F.avg_pool2d(grid.movedim(-1, 1), factor, ceil_mode=True)
        return cells.flatten(2).movedim(1, 2)
    # Which tokens stay is known without the device: a mask there would have to be counted.
    index = torch.arange(height * width).view(height, width)
    stays = index[::factor, ::factor].flatten()
    rest = torch.ones(height * width, dtype=torch.bool)
    rest[stays] = False
    goes = rest.nonzero().flatten()
    return merged(x[:, stays.to(x.device)], x[:, goes.to(x.device)])


def merged(into: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Tokens ``into``, each averaged with those of ``out`` that resemble it more than any other."""
    best = most_similar(out, into).unsqueeze(-1)
    total = into.float().scatter_add(1, best.expand(-1, -1, into.shape[-1]), out.float())
    size = torch.ones_like(total[..., :1]).scatter_add(1, best, torch.ones_like(out[..., :1], dtype=torch.float32))
    return (total / size).to(into.dtype)


def most_similar(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """For every token of ``a`` the index of the one of ``b`` with the largest cosine."""
    return (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(1, 2)).argmax(-1)
