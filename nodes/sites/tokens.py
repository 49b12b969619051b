"""Fewer tokens in the transformers of a UNet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample
from comfy.patcher_extension import WrappersMP
from torch import nn

from ...solvers.caching.accelerator import Plan
from ...solvers.caching.at_edm import ATEDM, Pruned, importance, prune
from ...solvers.caching.layers import CROSS, MLP, SELF, Tally, layer_work
from ...solvers.caching.token_merge import ToDo, fewer
from .layers import once_per_network
from .modules import OVERRIDE, unet_work
from .scoped import scoped

GEOMETRY = ("attn1_patch", "attn1_output_patch", "middle_patch", "attn2_patch", "attn2_output_patch")
"""Patches inside transformers that may know the tokens by their place."""


@dataclass(frozen=True)
class Place:
    """A transformer of a UNet. scale: how much smaller than the UNet's input it is. block: its name in
    ``transformer_options``."""

    module: SpatialTransformer
    scale: int
    block: tuple[str, int]


def places_of(network: nn.Module, levels: int) -> list[Place]:
    """The transformers at the ``levels`` largest resolutions that have any; 0: all."""
    found, scale = [], 1
    middle = [] if network.middle_block is None else [network.middle_block]
    for side, blocks in (("input", network.input_blocks), ("middle", middle), ("output", network.output_blocks)):
        for i, block in enumerate(blocks):
            for layer in block:
                if isinstance(layer, Downsample):
                    scale *= 2
                elif isinstance(layer, Upsample):
                    scale //= 2
                elif isinstance(layer, SpatialTransformer):
                    found.append(Place(layer, scale, (side, i)))
    scales = sorted({place.scale for place in found})[: levels or None]
    return [place for place in found if place.scale in scales]


def _unet(model, needed_by: str, still: bool) -> nn.Module:
    network = model.get_model_object("diffusion_model")
    parts = ("input_blocks", "middle_block", "output_blocks")
    if not isinstance(network, UNetModel) or not all(hasattr(network, p) for p in parts) or not places_of(network, 0):
        raise ValueError(
            f"{needed_by}: this model is a {type(network).__name__} ({type(model.model).__name__}), which has no UNet "
            "transformers; give it a UNet model (SD 1.x, SD 2.x, SDXL and their like)."
        )
    if still and any(isinstance(m, SpatialVideoTransformer) for m in network.modules()):
        raise ValueError(
            f"{needed_by}: the frames of a video UNet must keep the same tokens; use it on a picture model."
        )
    return network


def tokens(model, settings, key: str, forward_key: str) -> dict[str, Callable]:
    """The wrappers that carry out ``ToDo`` and ``ATEDM``."""
    make = {ToDo: _ToDo, ATEDM: _ATEDM}[type(settings)]
    _unet(model, settings.title, still=isinstance(settings, ATEDM))
    given = model.model_options.get("transformer_options", {})
    if isinstance(settings, ATEDM) and _patched(given):
        raise ValueError(
            f"{settings.title}: another node patches attention inside this model and may know the tokens by their place, which "
            "leaving out tokens would break; use one of the two."
        )
    places = once_per_network(lambda network: places_of(network, settings.levels))

    def forward(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        options = transformer_options or {}
        session = options.get(key)
        network = executor.class_obj.diffusion_model
        refused = isinstance(settings, ATEDM) and _patched(options)
        if session is None or session.plan in (None, Plan.PLAIN) or refused:
            if refused and session is not None and session.plan is Plan.FULL:
                said = f"{settings.title} left alone what another node's attention patches work on"
                if said not in session.notes:
                    session.notes.append(said)
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        context = c_crossattn.shape[1] if torch.is_tensor(c_crossattn) and c_crossattn.ndim > 1 else 0
        one = make(settings, session, network, places(network), context)
        with scoped(one.overrides):
            out = executor(x, t, c_concat, c_crossattn, control, one.options(options), **kwargs)
        record = options.get(forward_key)
        if record is not None:
            record.share = one.tally.share
        return out

    return {WrappersMP.APPLY_MODEL: forward}


def _patched(options: dict) -> bool:
    patches, replaced = options.get("patches", {}), options.get("patches_replace", {})
    return any(patches.get(name) for name in GEOMETRY) or any(replaced.get(name) for name in ("attn1", "attn2"))


class _Pass:
    """One pass of a UNet in which some of its transformers see fewer tokens."""

    def __init__(self, settings, session, network, places: list[Place], context: int):
        self.settings, self.session, self.network, self.places = settings, session, network, places
        self.context = context
        self.tally = Tally()
        first = network.input_blocks[0][0]
        enter = first.forward

        def entered(x, *args, **kwargs):
            self.tally.whole = unet_work(network, x.shape, context)
            return enter(x, *args, **kwargs)

        self.overrides: dict[nn.Module, Callable] = {first: entered}


class _ToDo(_Pass):
    """Keys and values on a coarser grid."""

    def options(self, options: dict) -> dict:
        chosen = {place.block: place.module for place in self.places}
        replaced = options.get("patches_replace", {}).get("attn1", {})

        def patch(n, context, value, extra):
            block = extra.get("block")
            _, _, height, width = extra["activations_shape"]
            elsewhere = block in replaced or (*(block or ()), extra.get("block_index")) in replaced
            if block not in chosen or elsewhere or not context.shape[1] == value.shape[1] == height * width:
                return n, context, value
            s = self.settings
            less = fewer(context, height, width, s.factor, s.keep)
            same = value is context
            self.count(n, context, less, chosen[block])
            return n, less, less if same else fewer(value, height, width, s.factor, s.keep)

        patches = dict(options.get("patches", {}))
        patches["attn1_patch"] = [*patches.get("attn1_patch", []), patch]  # after those that change queries
        return {**options, "patches": patches}

    def count(self, n, context, less, transformer) -> None:
        """Attention to fewer keys, and their projections; what choosing them costs is taken off."""
        attention = transformer.transformer_blocks[0].attn1
        width, gone = attention.to_k.out_features, context.shape[1] - less.shape[1]
        saved = 2 * n.shape[1] * gone * width + 2 * gone * context.shape[-1] * width
        if self.settings.keep == "similar":
            saved -= gone * less.shape[1] * context.shape[-1]
        self.tally.count(len(n) * saved, 0.0)


class _ATEDM(_Pass):
    """Transformers without their least important tokens, from the first self-attention on."""

    def __init__(self, settings, session, network, places, context):
        super().__init__(settings, session, network, places, context)
        self.scores: torch.Tensor | None = None
        self.watching = False
        self.pruned: Pruned | None = None
        self.place: Place | None = None
        for place in places:
            blocks = list(place.module.transformer_blocks)
            self.overrides[place.module] = self.inside(place)
            self.overrides[blocks[0]] = self.first(blocks[0], place)
            self.overrides[blocks[-1]] = self.last(blocks[-1], self.overrides.get(blocks[-1], blocks[-1].forward))

    def inside(self, place: Place) -> Callable:
        original = place.module.forward

        def forward(*args, **kwargs):
            self.scores, self.pruned, self.place = None, None, place
            return original(*args, **kwargs)

        return forward

    def first(self, block: nn.Module, place: Place) -> Callable:
        original = block.forward

        def forward(*args, **kwargs):
            self.watching = True
            try:
                return original(*args, **kwargs)
            finally:
                self.watching = False

        return forward

    def last(self, block: nn.Module, original: Callable) -> Callable:
        def forward(*args, **kwargs):
            out = original(*args, **kwargs)
            if self.pruned is None:
                return out
            pruned, self.pruned = self.pruned, None
            return pruned.restore(out)

        return forward

    def options(self, options: dict) -> dict:
        outer = options.get(OVERRIDE)

        def attention(func, q, k, v, heads, *args, **kwargs):
            if self.watching and self.scores is None:
                split = (t.view(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k))
                self.scores = importance(*split, self.settings.samples)
            if outer is None:
                return func(q, k, v, heads, *args, **kwargs)
            return outer(func, q, k, v, heads, *args, **kwargs)

        def leave(x, extra):
            if self.scores is None or not self.watching:
                return x
            self.watching = False
            kept, self.pruned = prune(x, self.scores, self.session.left)
            self.count(x, kept)
            return kept

        patches = {**options.get("patches", {}), "middle_patch": [leave]}
        return {**options, "patches": patches, OVERRIDE: attention}

    def count(self, x: torch.Tensor, kept: torch.Tensor) -> None:
        rows, n, width = x.shape
        m = kept.shape[1]
        blocks = list(self.place.module.transformer_blocks)

        def work(size: int) -> float:
            first, later = blocks[0], blocks[1:]
            total = layer_work(first.attn2, CROSS, size, self.context) + layer_work(first.ff, MLP, size)
            for block in later:
                total += layer_work(block.attn1, SELF, size) + layer_work(block.attn2, CROSS, size, self.context)
                total += layer_work(block.ff, MLP, size)
            return total

        extra = min(self.settings.samples, n) * n * width + (n - m) * m * width  # ranking and matching
        self.tally.count(rows * (work(n) - work(m) - extra), 0.0)
