"""Seamless tiles: a large picture in tiles side by side, whose borders move from step to step."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch

from ..method import param
from .accelerator import Accelerator, Run, Windowed
from .declared import END, START
from .tracker import Position

PREVIOUS, WRAP, EXTRA = FILLS = ("previous", "wrap", "extra")

Box = tuple[slice, slice]
"""Rows and columns of a tile."""


def starts(size: int, tile: int, overlap: int, shift: int, whole: bool) -> list[int]:
    """Where the tiles along a side of ``size`` begin: from ``shift`` on, the last one moved inside to keep its size.

    whole: with one more at 0, where ``shift`` leaves a margin. A tile as large as the side is alone.
    """
    if tile >= size:
        return [0]
    last, found = size - tile, []
    place = min(shift, last)
    while not found or found[-1] < last:
        found.append(min(place, last))
        place += tile - overlap
    return [0, *found] if whole and found[0] > 0 else found


@dataclass(frozen=True)
class SeamlessTiles(Accelerator):
    """Samples a picture larger than the model was made for in tiles side by side, which move from step to step.

    For memory and for models that repeat themselves in large pictures, best in a second pass over an enlarged picture, or
    with a ControlNet: nothing but what is there already holds the tiles together. No faster than the whole picture, except
    for the attention, whose cost grows with the square of the tile.

    Borders that stay where they are become seams. Here the grid begins at a random offset in every step, the same for all
    calls of the step, so that a border is inside a tile in the next one; as the paper shows, that does as well as
    overlapping tiles, at the cost of none. The last tiles of a row and column are moved inside to keep their size, the mean
    counts where they overlap. Above and left of the grid an uncovered margin is left, which gets, by ``fill``,

        D = x - t d   with d = (x' - D') / t' of the call before  (previous, the paper's noise reference),
        D of the picture moved around its edges                   (wrap),
        D of one more row and column of tiles                     (extra; no margin, up to 9 tiles for 4).

    Measured on our small UNet, tiles of 32 in 64 x 64, 12 of 20 Euler steps over a finished picture, against the picture
    redone as a whole: relative distance, and its jump across the fixed borders beside that elsewhere. Six pictures: small
    differences mean nothing.

        plain 0.25, 1.10      overlap 8, 2.25 times the work 0.23, 0.95      extra, 2.1 times 0.23, 0.90
        previous, moves up to 16 0.23, 0.99      wrap, up to 16 0.31, 0.74      wrap, up to 31 0.22, 0.74

    wrap has the weakest seams, but its tiles across the outer edge see two pictures, and there it is off most. Without the
    steps that are not moved (``reset_every`` 100) previous has a margin that is never fresh: a visible line of noise.

    A tile as large as the picture changes nothing. Areas, masks, inpainting and hooks are as always; what has the picture's
    size (inpainting models' inputs) is cut with it, and so are residuals of ControlNets, which see the whole picture.
    Raises ValueError for ControlNets of token models, second pictures (Kontext, Qwen Edit) and GLIGEN. With samplers that
    choose their steps the tiles stand still.

    Source: Zheng et al. (2023), arXiv:2308.16582, and the authors' program; wrap and extra are ours.
    """

    id: ClassVar[str] = "SeamlessTiles"
    title: ClassVar[str] = "Seamless Tiles"
    paper: ClassVar[str] = "Zheng et al. (2023), arXiv:2308.16582"
    site: ClassVar[str] = "tiles"

    tile: int = param(
        128, "Side of a tile in latent pixels (8 image pixels each in SD and Flux): a size the model was trained on.",
        min=4, max=1024, step=4,
    )  # fmt: skip
    max_shift: int = param(
        32, "The most that the tiles are moved in a step, in latent pixels; 0 is plain tiling, with its seams.", min=0,
        max=1024,
    )  # fmt: skip
    fill: str = param(
        PREVIOUS,
        "What the margin left by moved tiles gets: the previous prediction; the picture wrapped around; an extra tile, "
        "which costs more.",
        options=FILLS,
    )
    reset_every: int = param(
        4, "With previous, one step in this many is not moved, so that the margins are fresh.", min=1, max=100, advanced=True
    )  # fmt: skip
    overlap: int = param(
        0, "Latent pixels that neighbours have in common; more is smoother and slower.", min=0, max=512, advanced=True
    )  # fmt: skip
    seed: int = param(0, "Of the moves.", min=0, max=2**31 - 1, advanced=True)
    start_percent: float = START()
    end_percent: float = END()

    def __post_init__(self):
        super().__post_init__()
        if 2 * self.overlap > self.tile:
            raise ValueError(f"Seamless Tiles: overlap = {self.overlap} is more than half a tile of {self.tile}.")

    @property
    def percents(self) -> tuple[float, float]:
        return self.start_percent, self.end_percent

    def off(self, run: Run) -> str | None:
        return None  # the whole picture may not fit into memory; for adaptive samplers the tiles stand still

    def start(self, run: Run) -> SeamlessTilesSession:
        return SeamlessTilesSession(self, run)


class SeamlessTilesSession(Windowed):
    """One move per step, the same for all of its calls; the store has the newest d = (x - D) / t of every branch."""

    def __init__(self, settings: SeamlessTiles, run: Run):
        super().__init__(run)
        self.settings = settings
        self.step = 0

    def decide(self, t: float, position: Position):
        self.step = position.step
        return super().decide(t, position)

    def move(self, height: int, width: int, unit: int = 1) -> tuple[int, int]:
        """How far the tiles of this step are moved down and right, in multiples of ``unit``; 0 along sides of one tile."""
        s = self.settings
        if self.run.adaptive or (s.fill == PREVIOUS and self.step % s.reset_every == 0):
            return 0, 0
        draw = random.Random(f"{s.seed} {self.step}")
        most = min(s.max_shift, s.tile - 1 if s.fill == WRAP else s.tile // 2)
        dy, dx = (draw.randint(0, most) // unit * unit for _ in range(2))
        return (dy if height > s.tile else 0), (dx if width > s.tile else 0)

    def boxes(self, height: int, width: int, move: tuple[int, int], whole: bool) -> list[Box]:
        """The tiles. whole: leaving no margin."""
        s = self.settings
        if s.fill == WRAP:
            move = (0, 0)  # the picture is moved instead
        sides = [
            starts(size, s.tile, s.overlap, shift, whole or s.fill == EXTRA)
            for size, shift in zip((height, width), move, strict=True)
        ]
        return [(slice(y, min(y + s.tile, height)), slice(x, min(x + s.tile, width))) for y, x in product(*sides)]


def joined(parts: list[tuple[Box, torch.Tensor]], fallback: torch.Tensor) -> torch.Tensor:
    """The picture made of tiles: their mean where they overlap, ``fallback`` where there is none."""
    wide = torch.promote_types(fallback.dtype, torch.float32)
    total = torch.zeros(fallback.shape, dtype=wide, device=fallback.device)
    count = torch.zeros(fallback.shape[-2:], dtype=wide, device=fallback.device)
    for box, part in parts:
        total[(..., *box)] += part
        count[box] += 1.0
    return torch.where(count > 0, total / count.clamp(min=1.0), fallback.to(wide)).to(fallback.dtype)
