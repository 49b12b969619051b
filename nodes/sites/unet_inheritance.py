"""Feature inheritance inside ComfyUI's UNet: blocks, layers or units get another ``forward`` while a call runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from comfy.patcher_extension import WrappersMP
from torch import nn

from ...solvers.caching.accelerator import Plan
from ...solvers.caching.feature_inheritance import FeatureInheritance, InheritanceSession
from ...solvers.caching.work import inner_work, part_work
from .branches import branch_names, with_hooks
from .layers import PATCHES
from .scoped import scoped
from .unet_walk import record_share, unet_of

COMPUTED = ("in_layers", "emb_layers", "out_layers")
"""The parts of a ResBlock that are left out where it inherits: all but the skip."""
ATTENTION = ("attn1", "attn2")


@dataclass(frozen=True)
class Place:
    """A part of a network: the module ``name`` in layer ``layer`` of block ``block``; the whole layer for ''.

    kind: of ``feature_inheritance.LEVELS``; a part of kind "block" is every layer of its block.
    """

    kind: str
    block: int
    layer: int = 0
    name: str = ""


def blocks_of(network: UNetModel) -> list[nn.Module]:
    middle = [] if network.middle_block is None else [network.middle_block]
    return [*network.input_blocks, *middle, *network.output_blocks]


def places(network: UNetModel, settings: FeatureInheritance) -> Iterator[Place]:
    """The parts that inherit, in the order in which they run."""
    blocks = blocks_of(network)
    for b in range(settings.fresh, len(blocks) - settings.fresh):
        if "block" in settings.kinds:
            yield Place("block", b)
        for i, layer in enumerate(blocks[b]):
            if isinstance(layer, ResBlock) and not layer.updown and "resnet" in settings.kinds:
                yield Place("resnet", b, i)
            if not isinstance(layer, SpatialTransformer):
                continue
            if "transformer" in settings.kinds:
                yield Place("transformer", b, i)
            for name, module in layer.named_modules():
                if isinstance(module, BasicTransformerBlock):
                    units = [u for u in ("attn1", "attn2", "ff") if u in settings.kinds and getattr(module, u, None)]
                    yield from (Place(unit, b, i, f"{name}.{unit}") for unit in units)


def feature_inheritance(model, settings: FeatureInheritance, key: str, forward_key: str) -> dict[str, Callable]:
    """The wrappers that carry out an ``InheritanceSession``'s plans."""
    unet_of(model, settings.title)
    found: WeakKeyDictionary[nn.Module, list[Place]] = WeakKeyDictionary()  # every GPU has a network of its own
    shares: dict = {}

    def shares_of(network, shape, tokens) -> list[float]:
        if (shape, tokens) not in shares:
            work = inner_work([*blocks_of(network), [network.out]], float(shape[0] * shape[1]), tokens)
            whole = sum(part_work(layer, "") for block in work for layer in block)
            shares[shape, tokens] = [_work(place, work) / whole for place in found[network]]
        return shares[shape, tokens]

    def forward(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        options = with_hooks(transformer_options or {}, executor.class_obj)
        session: InheritanceSession | None = options.get(key)
        names = branch_names(x, options)
        if session is None or session.plan in (None, Plan.PLAIN) or not names:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        network = executor.class_obj.diffusion_model
        if network not in found:
            found[network] = list(places(network, settings))
        one = _Pass(session, session.branches(names), network)
        patched = any(options.get("patches", {}).get(name) for name in PATCHES)
        used = {n: place for n, place in enumerate(found[network]) if not (patched and place.kind in ATTENTION)}
        with scoped(one.overrides(used)):
            out = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        if one.inherited and one.shape is not None:
            tokens = 0 if c_crossattn is None else c_crossattn.shape[1]
            each = shares_of(network, one.shape, tokens)
            record_share(options, forward_key, 1.0 - sum(each[n] for n in one.inherited))
        return out

    return {WrappersMP.APPLY_MODEL: forward}


def _work(place: Place, work: list[list[dict[str, float]]]) -> float:
    if place.kind == "block":
        return sum(part_work(layer, "") for layer in work[place.block])
    layer = work[place.block][place.layer]
    return sum(part_work(layer, name) for name in (COMPUTED if place.kind == "resnet" else (place.name,)))


class _Pass:
    """One pass of the network."""

    def __init__(self, session: InheritanceSession, branches, network: UNetModel):
        self.session, self.branches, self.blocks = session, branches, blocks_of(network)
        self.inherited: list[int] = []
        """The parts that were not computed, by number."""
        self.shape: tuple[int, int] | None = None
        """Height and width of what enters the first block."""

    def overrides(self, parts: dict[int, Place]) -> dict[nn.Module, Callable]:
        made: dict[nn.Module, Callable] = {self.blocks[0][0]: self.watched(self.blocks[0][0].forward)}
        for n, place in parts.items():
            block = self.blocks[place.block]
            layer = block[place.layer]
            if place.kind == "block":
                made.update(self.block(n, list(block)))
            elif place.kind == "resnet":
                made[layer] = self.part(n, layer.forward, layer.skip_connection)
            elif place.kind == "transformer":
                made[layer] = self.part(n, layer.forward, lambda x: x)
            else:
                unit = layer.get_submodule(place.name)
                made[unit] = self.part(n, unit.forward, None)
        return made

    def watched(self, original: Callable) -> Callable:
        def forward(x, *args, **kwargs):
            self.shape = tuple(x.shape[-2:])
            return original(x, *args, **kwargs)

        return forward

    def kept(self, n: int, device: torch.device) -> torch.Tensor | None:
        found = self.session.kept(n, self.branches, device)
        if found is not None:
            self.inherited.append(n)
        return found

    def part(self, n: int, original: Callable, skip: Callable | None) -> Callable:
        """A layer or a unit; ``skip``: what is added to what it inherits, as a function of its input."""

        def forward(x, *args, **kwargs):
            kept = self.kept(n, x.device)
            if kept is not None:
                return kept if skip is None else skip(x) + kept
            out = original(x, *args, **kwargs)
            self.session.keep(n, self.branches, out if skip is None else out - skip(x))
            return out

        return forward

    def block(self, n: int, layers: list[nn.Module]) -> dict[nn.Module, Callable]:
        """ComfyUI calls the layers of a block, not the block: the first finds what is kept, the last gives it out."""
        kept: list[torch.Tensor | None] = []

        def layer(i: int, original: Callable) -> Callable:
            def forward(h, *args, **kwargs):
                if i == 0:
                    kept[:] = [self.kept(n, h.device)]
                if kept[0] is not None:
                    return kept[0] if i == len(layers) - 1 else h
                out = original(h, *args, **kwargs)
                if i == len(layers) - 1:
                    self.session.keep(n, self.branches, out)
                return out

            return forward

        return {module: layer(i, module.forward) for i, module in enumerate(layers)}
