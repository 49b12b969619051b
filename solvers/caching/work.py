"""How much of a UNet's arithmetic one pass through some of its blocks is, counted from the shapes of its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from torch import nn

Share = Callable[..., float]
"""``(network, shape of its input, tokens of its conditioning) -> share`` of the work of a whole pass."""


def block_work(blocks: Iterable[Iterable[nn.Module]], places: float, tokens: int) -> list[float]:
    """Multiply-adds of each of the consecutive ``blocks``, per image, and nothing of what follows them.

    places: positions (height x width) of what enters the first block; ``Downsample`` quarters and ``Upsample``
        quadruples them for itself and what comes after.
    tokens: length of the conditioning that ``attn2`` attends to.

    A convolution costs k k c_in c_out per position, a linear layer c_in c_out; ``emb_layers`` run once, ``attn2``'s
    keys and values once per token. Attention of n positions to m costs 2 n m c on top. Norms and activations are left
    out.
    """
    work = []
    for block in blocks:
        total = 0.0
        for layer in block:
            kind = type(layer).__name__
            places *= {"Downsample": 0.25, "Upsample": 4.0}.get(kind, 1.0)
            total += sum(_layer_work(name, module, places, tokens) for name, module in layer.named_modules())
        work.append(total)
    return work


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
