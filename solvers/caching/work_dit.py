"""How much of a DiT's arithmetic is left when some of its blocks are left out, counted from the shapes of its layers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from torch import nn

ONCE = re.compile(r"mod|adaln|time|(?<![a-z])[ty]_|vec|guidance|pool|extra_emb|distilled", re.IGNORECASE)
"""In names of layers that see one token per picture: embeddings of time and the modulation made of them."""
TEXT = re.compile(r"txt|text|caption|cond_seq|add_[qkv]|to_add|mlpC")
"""In names of layers that see the text's tokens."""


class Work:
    """Multiply-adds per picture of the blocks and of what surrounds them.

    A linear layer costs c_in c_out per token that it sees, a convolution k k c_in c_out per patch. Attention among T tokens of
    width c costs 2 T T c on top. Norms and activations are left out.
    """

    def __init__(self, network: nn.Module, blocks: Sequence[nn.Module]):
        self.network, self.blocks = network, list(blocks)

    def share(self, span: tuple[int, int], shapes: Sequence[Sequence[int]]) -> float:
        """Of the whole network's work, without the blocks of ``span``.

        shapes: of the hidden states that enter the span, without the batch, text before picture.
        """
        places = [math.prod(shape[:-1]) for shape in shapes]
        text, picture = (places[0], places[-1]) if len(places) > 1 else (places[0], places[0])
        total, width = sum(places), shapes[-1][-1]
        each = [self._block(block, text, picture, total, width) for block in self.blocks]
        inside = {id(m) for block in self.blocks for m in block.modules()}
        rest = sum(
            _layer(name, module, text, picture)
            for name, module in self.network.named_modules()
            if id(module) not in inside
        )
        return 1.0 - sum(each[slice(*span)]) / (sum(each) + rest)

    @staticmethod
    def _block(block: nn.Module, text: int, picture: int, total: int, width: int) -> float:
        layers = [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        both = any(TEXT.search(name) for name, _ in layers)
        seen = (text, picture) if both else (total, total)
        return sum(_layer(name, module, *seen) for name, module in layers) + 2.0 * total * total * width


def _layer(name: str, module: nn.Module, text: int, picture: int) -> float:
    if isinstance(module, nn.Linear):
        times = 1 if ONCE.search(name) else text if TEXT.search(name) else picture
        return float(times * module.in_features * module.out_features)
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return float(picture * module.weight[0].numel() * module.out_channels)
    return 0.0
