"""A table of cells as a picture: what is left out, step by step."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ..solvers.caching.auto_diffusion import Skips

_LEFT, _DONE, _INK, _PAPER = "#d55e00", "#cfe3f0", "#202020", "#ffffff"
_CELL, _GAP, _MARGIN, _ROW = 44, 3, 16, 26


def cells(rows: Sequence[tuple[str, Sequence[bool]]], title: str, below: Sequence[str], legend: str) -> Image.Image:
    """A row of cells for each name, filled where it is true; ``below`` is written under the columns. RGB."""
    small, large = ImageFont.load_default(15), ImageFont.load_default(20)
    names = max((small.getlength(name) for name, _ in rows), default=0.0)
    left = int(names) + 2 * _MARGIN
    width = max(left + len(below) * _CELL + _MARGIN, int(large.getlength(title)) + 2 * _MARGIN, 480)
    top = 56
    bottom = top + len(rows) * _ROW
    picture = Image.new("RGB", (width, bottom + 66), _PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((width / 2, 14), title, _INK, large, anchor="ma")
    for r, (name, values) in enumerate(rows):
        y = top + r * _ROW
        draw.text((left - 10, y + _ROW / 2), name, _INK, small, anchor="rm")
        for c, value in enumerate(values):
            x = left + c * _CELL
            draw.rectangle([x, y, x + _CELL - _GAP, y + _ROW - _GAP], fill=_LEFT if value else _DONE)
    for c, word in enumerate(below):
        draw.text((left + (c + 0.5) * _CELL, bottom + 6), word, _INK, small, anchor="ma")
    draw.text((width / 2, bottom + 54), legend, _INK, small, anchor="md")
    return picture


def skipped(found: Skips) -> Image.Image:
    """Which parts of the network each step leaves out."""
    rows = [(f"{u.name}, {u.work:.1%}", [u.name in names for names in found.left_out]) for u in found.units]
    below = [f"{sigma:.3g}" for sigma in found.sigmas[:-1]]
    return cells(
        rows, f"Left out: {1.0 - found.kept:.1%} of the work", below, "orange: left out; columns: steps, by their sigma"
    )
