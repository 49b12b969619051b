"""How much of a UNet's arithmetic one pass through some of its blocks is, counted from the shapes of its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from torch import nn

Share = Callable[..., float]
"""``(network, shape of its input, tokens of its conditioning) -> share`` of the work of a whole pass."""


def inner_work(blocks: Iterable[Iterable[nn.Module]], places: float, tokens: int) -> list[list[dict[str, float]]]:
    """Multiply-adds per image of every module in every layer of the consecutive ``blocks``, by its name in the layer.

    places: positions (height x width) of what enters the first block; ``Downsample`` quarters and ``Upsample``
        quadruples them for itself and what comes after.
    tokens: length of the conditioning that ``attn2`` attends to.

    A convolution costs k k c_in c_out per position, a linear layer c_in c_out; ``emb_layers`` run once, ``attn2``'s
    keys and values once per token. Attention of n positions to m costs 2 n m c on top. Norms and activations are left
    out. A module's number does not contain those of the modules inside it.
    """
    found = []
    for block in blocks:
        layers = []
        for layer in block:
            places *= {"Downsample": 0.25, "Upsample": 4.0}.get(type(layer).__name__, 1.0)
            layers.append({name: _layer_work(name, module, places, tokens) for name, module in layer.named_modules()})
        found.append(layers)
    return found


def block_work(blocks: Iterable[Iterable[nn.Module]], places: float, tokens: int) -> list[float]:
    """Multiply-adds of each of the consecutive ``blocks``, per image, and nothing of what follows them."""
    return [sum(sum(layer.values()) for layer in block) for block in inner_work(blocks, places, tokens)]


def part_work(layer: dict[str, float], part: str) -> float:
    """Multiply-adds of the module ``part`` of a layer, with everything inside it; the whole layer for ''."""
    return sum(work for name, work in layer.items() if not part or name == part or name.startswith(f"{part}."))


def _layer_work(name: str, module: nn.Module, places: float, tokens: int) -> float:
    end = name.rsplit(".", 1)[-1]
    if isinstance(module, nn.Conv2d):
        return places * math.prod(module.kernel_size) * module.in_channels * module.out_channels / module.groups
    if isinstance(module, nn.Linear):
        times = 1 if "emb_layers" in name else tokens if end in ("to_k", "to_v") and "attn2" in name else places
        return times * module.in_features * module.out_features
    if end in ("attn1", "attn2"):
        query = getattr(module, "to_q", None)
        return 2 * places * (places if end == "attn1" else tokens) * getattr(query, "out_features", 0)
    return 0.0


def _shares(network, shape: Sequence[int], tokens: int) -> list[float]:
    """Each block's share of a UNet's work: input blocks, middle block (if any), output blocks, ``out``.

    shape: of the network's input, ``(batch, channels, height, width)``.
    """
    middle = [] if network.middle_block is None else [network.middle_block]
    blocks = [*network.input_blocks, *middle, *network.output_blocks, [network.out]]
    work = block_work(blocks, float(math.prod(shape[2:])), tokens)
    return [each / sum(work) for each in work]


def ring_share(depth: int, network, shape: Sequence[int], tokens: int) -> float:
    """The share of a UNet's work that is left when only the ring of branch ``depth`` is computed."""
    shares = _shares(network, shape, tokens)
    return sum(shares[: depth + 1]) + sum(shares[-2 - depth :])


def decoder_share(network, shape: Sequence[int], tokens: int) -> float:
    """The share of a UNet's work that is left when only its output blocks are computed."""
    return sum(_shares(network, shape, tokens)[-1 - len(network.output_blocks) :])
