"""Plots and picture sheets as images, drawn with Pillow alone.

Pure functions: data in, ``PIL.Image`` out; nothing here knows ComfyUI's nodes, only its IMAGE layout (``to_image``,
``to_pictures``). Everything is drawn at twice the size and reduced, which smooths the lines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

Series = tuple[str, Sequence[float], Sequence[float]]
"""``(label, xs, ys)``."""

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b4a9c", "#444444")
"""Told apart by colour-blind readers too (after Okabe and Ito); repeated after the last."""

_OVERSAMPLING = 2
_INK, _GRID, _PAPER = "#202020", "#e2e2e2", "#ffffff"


def line_plot(
    series: Sequence[Series],
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    size: tuple[int, int] = (960, 600),
) -> Image.Image:
    """Lines with axes, ticks, a title and a legend, as an RGB picture of ``size`` (width, height).

    Points that an axis cannot show (not finite, or not positive on a log axis) are left out and the line joins its
    neighbours. With 60 points or fewer each one is marked. Raises ValueError if no point is left to draw, or if a
    series has not as many ys as xs.
    """
    lines = [(label, *_visible(label, xs, ys, log_x, log_y)) for label, xs, ys in series]
    every_x, every_y = (np.concatenate([line[i] for line in lines] or [np.empty(0)]) for i in (1, 2))
    if len(every_x) == 0:
        raise ValueError(
            f"There is nothing to draw in the plot '{title}': no point has finite coordinates its axes can show."
        )

    s = _OVERSAMPLING
    width, height = size[0] * s, size[1] * s
    picture = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(picture)
    small, large = _font(15 * s), _font(20 * s)

    x_ticks, y_ticks = _ticks(every_x, log_x), _ticks(every_y, log_y)
    tick_width = max(draw.textlength(_number(v), small) for v in y_ticks)
    left, right = int(tick_width) + 44 * s, width - 24 * s
    top, bottom = 48 * s, height - 62 * s
    x_of = _axis(every_x, log_x, left, right)
    y_of = _axis(every_y, log_y, bottom, top)

    for v in x_ticks:
        draw.line([(x_of(v), top), (x_of(v), bottom + 5 * s)], fill=_GRID, width=s)
        draw.text((x_of(v), bottom + 8 * s), _number(v), _INK, small, anchor="ma")
    for v in y_ticks:
        draw.line([(left - 5 * s, y_of(v)), (right, y_of(v))], fill=_GRID, width=s)
        draw.text((left - 9 * s, y_of(v)), _number(v), _INK, small, anchor="rm")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill=_INK, width=s)

    draw.text((width / 2, 14 * s), title, _INK, large, anchor="ma")
    draw.text(((left + right) / 2, height - 10 * s), x_label, _INK, small, anchor="md")
    _text_upwards(picture, y_label, (18 * s, (top + bottom) // 2), small)

    for i, (_, xs, ys) in enumerate(lines):
        points = [(x_of(x), y_of(y)) for x, y in zip(xs, ys, strict=True)]
        colour = COLORS[i % len(COLORS)]
        if len(points) > 1:
            draw.line(points, fill=colour, width=3 * s, joint="curve")
        if len(points) <= 60:
            for x, y in points:
                draw.ellipse([x - 4 * s, y - 4 * s, x + 4 * s, y + 4 * s], fill=colour)

    points = [(x_of(x), y_of(y)) for _, xs, ys in lines for x, y in zip(xs, ys, strict=True)]
    _legend(draw, [label for label, _, _ in lines], points, (left, top, right, bottom), small)
    return picture.resize(size, Image.Resampling.LANCZOS)


def picture_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], title: str | None = None, cell: int | None = None
) -> Image.Image:
    """A sheet of pictures: each row's caption above its pictures, which stand side by side.

    cell: width in pixels that every picture is scaled to, its aspect kept; None: the width of the first picture. Small
    pictures are enlarged without smoothing, so that their pixels can be judged. Raises ValueError without pictures.
    """
    first = next((pictures[0] for _, pictures in rows if len(pictures)), None)
    if first is None:
        raise ValueError("There are no pictures to put on the sheet.")
    cell = cell or first.width
    gap, margin, font, large = 8, 16, _font(16), _font(22)
    scaled = [(caption, [_scaled(picture, cell) for picture in pictures]) for caption, pictures in rows]

    measure = ImageDraw.Draw(first.convert("RGB"))
    inner = max(max(len(p) for _, p in scaled) * (cell + gap) - gap, 320)
    heading = _wrapped(measure, title, large, inner) if title else ""
    blocks = [(_wrapped(measure, caption, font, inner) if caption else "", pictures) for caption, pictures in scaled]

    def text_height(text: str, used: ImageFont.ImageFont) -> int:
        return math.ceil(measure.multiline_textbbox((0, 0), text, used)[3]) + gap if text else 0

    heights = [text_height(c, font) + max((p.height for p in pictures), default=0) for c, pictures in blocks]
    height = 2 * margin + text_height(heading, large) + sum(heights) + 2 * gap * (len(heights) - 1)
    sheet = Image.new("RGB", (inner + 2 * margin, height), _PAPER)
    draw = ImageDraw.Draw(sheet)

    y = margin
    if heading:
        draw.multiline_text((margin, y), heading, _INK, large)
        y += text_height(heading, large)
    for (caption, pictures), block_height in zip(blocks, heights, strict=True):
        if caption:
            draw.multiline_text((margin, y), caption, _INK, font)
        for i, picture in enumerate(pictures):
            sheet.paste(picture, (margin + i * (cell + gap), y + text_height(caption, font)))
        y += block_height + 2 * gap
    return sheet


def to_image(picture: Image.Image) -> torch.Tensor:
    """A picture as ComfyUI's IMAGE: float32 [1, H, W, 3] in 0..1 on the CPU."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0)[None]


def to_pictures(image: torch.Tensor) -> list[Image.Image]:
    """An IMAGE batch [B, H, W, C >= 3] in 0..1 as RGB pictures; values outside are clamped."""
    pixels = (image[..., :3].detach().float().cpu().clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).numpy()
    return [Image.fromarray(p) for p in pixels]


def _visible(label, xs, ys, log_x: bool, log_y: bool) -> tuple[np.ndarray, np.ndarray]:
    xs, ys = np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64)
    if xs.shape != ys.shape or xs.ndim != 1:
        raise ValueError(f"The line '{label}' has {xs.size} x values and {ys.size} y values; it needs as many of both.")
    keep = np.isfinite(xs) & np.isfinite(ys)
    keep &= (xs > 0) | (not log_x)
    keep &= (ys > 0) | (not log_y)
    return xs[keep], ys[keep]


def _axis(values: np.ndarray, log: bool, start: float, end: float):
    """The map from a value to its pixel, with a margin of 3 % at both ends."""
    low, high = _range(values, log)
    pad = 0.03 * (end - start)

    def pixel(v: float) -> float:
        share = (math.log10(v) - low) / (high - low) if log else (v - low) / (high - low)
        return start + pad + share * (end - start - 2 * pad)

    return pixel


def _range(values: np.ndarray, log: bool) -> tuple[float, float]:
    """Lowest and highest coordinate (log10 of the value on a log axis), never equal."""
    low, high = float(values.min()), float(values.max())
    if log:
        low, high = math.log10(low), math.log10(high)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        pad = 0.5 if log else max(abs(low), 1.0) / 2
        return low - pad, high + pad
    return low, high


def _ticks(values: np.ndarray, log: bool) -> list[float]:
    """Round values inside the range: powers of ten on a wide log axis, else multiples of 1, 2 or 5."""
    low, high = _range(values, log)
    if log and high - low >= 1.0:
        every = max(1, math.ceil((high - low) / 9))
        digits = (1, 2, 5) if high - low < 2.5 else (1,)
        decades = range(math.floor(low), math.ceil(high) + 1)
        found = [d * 10.0**k for k in decades if k % every == 0 for d in digits]
        return [v for v in found if low - 1e-9 <= math.log10(v) <= high + 1e-9]
    if log:
        low, high = 10.0**low, 10.0**high
    raw = (high - low) / 8
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(m * base for m in (1, 2, 5, 10) if m * base >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _number(v: float) -> str:
    return f"{v:.6g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _text_upwards(picture: Image.Image, text: str, centre: tuple[int, int], font) -> None:
    box = ImageDraw.Draw(picture).textbbox((0, 0), text, font)
    strip = Image.new("RGB", (math.ceil(box[2]) + 2, math.ceil(box[3]) + 2), _PAPER)
    ImageDraw.Draw(strip).text((0, 0), text, _INK, font)
    strip = strip.rotate(90, expand=True)
    picture.paste(strip, (centre[0] - strip.width // 2, centre[1] - strip.height // 2))


def _legend(draw: ImageDraw.ImageDraw, labels: list[str], points: list[tuple[float, float]], frame, font) -> None:
    """A box in the corner of the frame that covers the fewest points."""
    s = _OVERSAMPLING
    if not any(labels):
        return
    line = 24 * s
    width = 52 * s + int(max(draw.textlength(label, font) for label in labels))
    height = 12 * s + line * len(labels)
    left, top, right, bottom = frame
    corners = [(x, y) for y in (top + 8 * s, bottom - height - 8 * s) for x in (right - width - 8 * s, left + 8 * s)]
    x, y = min(
        corners, key=lambda c: sum(c[0] <= px <= c[0] + width and c[1] <= py <= c[1] + height for px, py in points)
    )
    draw.rectangle([x, y, x + width, y + height], fill=_PAPER, outline="#b0b0b0", width=s)
    for i, label in enumerate(labels):
        middle = y + 6 * s + line * i + line // 2
        draw.line([(x + 8 * s, middle), (x + 34 * s, middle)], fill=COLORS[i % len(COLORS)], width=3 * s)
        draw.text((x + 42 * s, middle), label, _INK, font, anchor="lm")


def _scaled(picture: Image.Image, width: int) -> Image.Image:
    picture = picture.convert("RGB")
    if picture.width == width:
        return picture
    how = Image.Resampling.NEAREST if width > picture.width else Image.Resampling.LANCZOS
    return picture.resize((width, max(1, round(picture.height * width / picture.width))), how)


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font, width: int) -> str:
    """``text`` with line breaks at words, so that every line fits ``width`` if its words do."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and draw.textlength(longer, font) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    return "\n".join(lines)
