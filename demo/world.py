"""The picture world of the demo model: procedurally drawn shapes with exact captions.

A picture is one shape on a plain background, ``32 x 32`` RGB in ``[0, 1]``. It is described by five attributes,
each an index into a list of words: colour, shape, size, place, background. Everything else (exact position, radius,
rotation, tint) varies continuously, so that the model has a distribution to learn and not a table to remember.

The vocabulary, the token ids and the attribute order are part of the trained weights' format: change them only
together with ``WORLD_VERSION`` and a new training run.
"""

from __future__ import annotations

import math

import torch

WORLD_VERSION = "1"
SIZE = 32

COLOURS = {
    "red": (0.88, 0.12, 0.12),
    "yellow": (0.97, 0.86, 0.12),
    "green": (0.12, 0.65, 0.22),
    "cyan": (0.15, 0.80, 0.88),
    "blue": (0.12, 0.22, 0.85),
    "pink": (0.97, 0.45, 0.72),
}
BACKGROUNDS = {"white": (0.95, 0.95, 0.95), "grey": (0.55, 0.55, 0.55), "black": (0.06, 0.06, 0.06)}
PLACES = {
    "in the middle": (0.5, 0.5),
    "on the left": (0.3, 0.5),
    "on the right": (0.7, 0.5),
    "at the top": (0.5, 0.3),
    "at the bottom": (0.5, 0.7),
}
SIZES = {"small": 0.16, "big": 0.26}
SHAPES = ("circle", "square", "triangle", "cross", "ring")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "place": tuple(PLACES),
    "background": tuple(BACKGROUNDS),
}

SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")
PAD, START, END, UNKNOWN = range(4)
_FILLER = ("a", "in", "on", "at", "the", "background", "middle", "left", "right", "top", "bottom")
WORDS = SPECIAL + _FILLER + tuple(SIZES) + tuple(COLOURS) + tuple(BACKGROUNDS) + SHAPES
VOCABULARY = {word: i for i, word in enumerate(WORDS)}
MAX_TOKENS = 16


def words_to_ids(text: str) -> list[int]:
    """Token ids of the words of ``text``, unknown words as ``<unk>``, without start, end and padding."""
    text = text.lower().replace(",", " ").replace(".", " ")
    return [VOCABULARY.get(word, UNKNOWN) for word in text.split()]


def tokenize(text: str) -> list[int]:
    """``[start] words [end] [pad] ...``, always ``MAX_TOKENS`` long; words that do not fit are dropped."""
    ids = [START, *words_to_ids(text)[: MAX_TOKENS - 2], END]
    return ids + [PAD] * (MAX_TOKENS - len(ids))


def caption(attributes: dict[str, int], mention: set[str] | frozenset[str] = frozenset(ATTRIBUTES)) -> str:
    """The sentence for one picture. Colour and shape are always said, the other attributes if in ``mention``."""
    word = {name: ATTRIBUTES[name][attributes[name]] for name in ATTRIBUTES}
    text = "a "
    if "size" in mention:
        text += word["size"] + " "
    text += f"{word['colour']} {word['shape']}"
    if "place" in mention:
        text += " " + word["place"]
    if "background" in mention:
        text += f" on a {word['background']} background"
    return text


# Signed distances in units of the picture width, negative inside; y grows downwards.
def _circle(x, y, r):
    return torch.hypot(x, y) - r * 0.95


def _square(x, y, r):
    return torch.maximum(x.abs(), y.abs()) - r * 0.84


def _triangle(x, y, r):
    # Equilateral: the largest of the distances to its three sides, sharp corners on the outside are good enough here.
    y = y - r * 0.18
    side = torch.maximum(y, 0.5 * (math.sqrt(3.0) * x.abs() - y))
    return side - r * 0.58


def _cross(x, y, r):
    a, b = x.abs(), y.abs()
    long, thin = r * 1.05, r * 0.36
    return torch.minimum(torch.maximum(a - long, b - thin), torch.maximum(a - thin, b - long))


def _ring(x, y, r):
    return (torch.hypot(x, y) - r * 0.76).abs() - r * 0.25


_DISTANCE = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross, "ring": _ring}


def draw(attributes: dict[str, torch.Tensor], generator: torch.Generator, size: int = SIZE) -> torch.Tensor:
    """Draw pictures with the given attributes.

    attributes: ``{name: int64 (n,)}``, indices into ``ATTRIBUTES[name]``.
    Returns float32 ``(n, 3, size, size)`` in ``[0, 1]``, anti-aliased over one pixel.
    """
    n = len(attributes["shape"])

    def uniform(*shape):  # in (-1, 1)
        return torch.rand(*shape, generator=generator) * 2 - 1

    fill = torch.tensor(list(COLOURS.values()))[attributes["colour"]] + uniform(n, 3) * 0.04
    ground = torch.tensor(list(BACKGROUNDS.values()))[attributes["background"]] + uniform(n, 3) * 0.025
    radius = torch.tensor(list(SIZES.values()))[attributes["size"]] * (1 + uniform(n) * 0.12)
    centre = torch.tensor(list(PLACES.values()))[attributes["place"]] + uniform(n, 2) * 0.04
    angle = uniform(n) * 0.2

    grid = (torch.arange(size) + 0.5) / size
    dx = grid[None, None, :] - centre[:, 0, None, None]
    dy = grid[None, :, None] - centre[:, 1, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    x, y = cos * dx + sin * dy, cos * dy - sin * dx
    r = radius[:, None, None].expand_as(x)
    distance = torch.empty_like(x)
    for index, shape in enumerate(SHAPES):
        rows = attributes["shape"] == index
        distance[rows] = _DISTANCE[shape](x[rows], y[rows], r[rows])
    cover = (0.5 - distance * size).clamp(0, 1)[:, None]
    return (ground[:, :, None, None] * (1 - cover) + fill[:, :, None, None] * cover).clamp(0, 1)


def sample_attributes(n: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Independent uniform attributes, ``{name: int64 (n,)}``."""
    return {name: torch.randint(len(words), (n,), generator=generator) for name, words in ATTRIBUTES.items()}


def sample(n: int, generator: torch.Generator, drop: float = 0.0):
    """``n`` pictures with their attributes and captions.

    Size, place and background are each left out of the sentence with probability 0.3; the whole sentence is empty
    with probability ``drop`` (for classifier-free guidance).
    Returns ``(pictures (n, 3, 32, 32) in [0, 1], attributes {name: (n,)}, captions [str])``.
    """
    attributes = sample_attributes(n, generator)
    pictures = draw(attributes, generator)
    told = torch.rand(n, 3, generator=generator) > 0.3
    empty = torch.rand(n, generator=generator) < drop
    captions = []
    for i in range(n):
        mention = {name for name, on in zip(("size", "place", "background"), told[i].tolist(), strict=True) if on}
        one = {name: int(index[i]) for name, index in attributes.items()}
        captions.append("" if empty[i] else caption(one, mention))
    return pictures, attributes, captions
