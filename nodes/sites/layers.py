"""Where ComfyUI's networks have their attention and feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from ...solvers.caching.layers import CROSS, MLP, SELF, TEMPORAL, Layer

BLOCKS = {
    "comfy.ldm.modules.attention.BasicTransformerBlock": {"attn1": SELF, "attn2": CROSS, "ff": MLP},
    "comfy.ldm.lightricks.model.BasicTransformerBlock": {"attn1": SELF, "attn2": CROSS, "ff": MLP},
    "comfy.ldm.wan.model.WanAttentionBlock": {"self_attn": SELF, "cross_attn": CROSS, "ffn": MLP},
    "comfy.ldm.cosmos.predict2.Block": {"self_attn": SELF, "cross_attn": CROSS, "mlp": MLP},
    "comfy.ldm.pixart.pixartms.PixArtMSBlock": {"attn": SELF, "cross_attn": CROSS, "mlp": MLP},
    "comfy.ldm.lumina.model.JointTransformerBlock": {"attention": SELF, "feed_forward": MLP},
    "comfy.ldm.qwen_image.model.QwenImageTransformerBlock": {"attn": SELF, "img_mlp": MLP, "txt_mlp": MLP},
    "comfy.ldm.modules.diffusionmodules.mmdit.JointBlock": {"context_block.mlp": MLP, "x_block.mlp": MLP},
    "comfy.ldm.flux.layers.DoubleStreamBlock": {"img_mlp": MLP, "txt_mlp": MLP},
    "comfy.ldm.flux.layers.SingleStreamBlock": {},
}
"""Block -> its layers that are modules of their own. What each of them returns is added to the hidden state, with a
gate or without, so a zero in its place leaves the block's input as it is."""


PATCHES = ("attn1_patch", "attn1_output_patch", "attn2_patch", "attn2_output_patch")
"""What other packs change attention with: token merging hands a UNet's layers other tokens in every step."""


@dataclass(frozen=True)
class Joint:
    """The joint attentions of a block, which are no modules; for each, in order, the layers that only feed it, and
    those behind."""

    feeding: tuple[tuple[str, ...], ...]
    behind: tuple[tuple[str, ...], ...]
    fused: bool = False
    """Whether feed-forward and attention share ``linear1`` and ``linear2``, and nothing else is computed."""


JOINT = {
    "comfy.ldm.modules.diffusionmodules.mmdit.JointBlock": Joint(
        (("context_block.attn.qkv", "x_block.attn.qkv"), ("x_block.attn2.qkv",)),
        (("context_block.attn.proj", "x_block.attn.proj"), ("x_block.attn2.proj",)),
    ),
    "comfy.ldm.flux.layers.DoubleStreamBlock": Joint(
        (("img_attn.qkv", "txt_attn.qkv"),), (("img_attn.proj", "txt_attn.proj"),)
    ),
    "comfy.ldm.flux.layers.SingleStreamBlock": Joint((("linear1",),), (("linear2",),), fused=True),
}


@dataclass(frozen=True)
class Block:
    """A transformer block of a network, by its path."""

    name: str
    module: nn.Module
    layers: tuple[tuple[Layer, nn.Module], ...]
    joint: Joint | None


Found = TypeVar("Found")


def once_per_network(find: Callable[[nn.Module], Found]) -> Callable[[nn.Module], Found]:
    """``find``, looking through each network only once; with several GPUs each has its own."""
    found: WeakKeyDictionary[nn.Module, Found] = WeakKeyDictionary()

    def remembered(network: nn.Module) -> Found:
        if network not in found:
            found[network] = find(network)
        return found[network]

    return remembered


def at(module: nn.Module, path: str) -> nn.Module | None:
    """The submodule at a path; None where the network has none there."""
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


def blocks_of(network: nn.Module) -> list[Block]:
    """The transformer blocks of ``network`` that are known here, in the order of its modules; refiners of the prompt
    left out."""
    found = []
    for path, module in network.named_modules():
        names = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]
        known = next((name for name in names if name in BLOCKS), None)
        if known is None or "refiner" in path:
            continue
        layers = []
        for place, kind in BLOCKS[known].items():
            part = at(module, place)
            if part is not None:
                along_frames = ".time_stack." in path and kind == SELF
                layers.append((Layer(f"{path}.{place}", TEMPORAL if along_frames else kind), part))
        found.append(Block(path, module, tuple(layers), JOINT.get(known)))
    return found


def known_blocks(model, needed_by: str) -> list[Block]:
    """The same of a MODEL. Raises ``ValueError`` where there are none."""
    network = model.get_model_object("diffusion_model")
    found = blocks_of(network)
    if not found:
        raise ValueError(
            f"{needed_by}: this model is a {type(network).__name__} ({type(model.model).__name__}), whose layers are not known "
            "here; it works on UNets and on SD3, Flux, Chroma, HunyuanVideo, Qwen-Image, Lumina 2, Z-Image, Wan, LTX-Video, "
            "Cosmos-Predict2 and PixArt."
        )
    return found
