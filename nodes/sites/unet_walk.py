"""A walk through some of the blocks of ComfyUI's UNet.

ComfyUI offers no way to leave out blocks, so this repeats its walk over the ones that stay, with its own functions for a block
and a control residual and the same patch points.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import (
    UNetModel,
    apply_control,
    forward_timestep_embed,
    timestep_embedding,
)
from comfy.patcher_extension import WrapperExecutor

from ...solvers.caching.work import Share


def unet_of(model, needed_by: str) -> UNetModel:
    """The UNet of a MODEL.

    Raises ``ValueError`` for any other network, and for a subclass with a block loop of its own: that loop may do more
    between the blocks than is known here. Subclasses that only wrap ``forward`` are welcome.
    """
    network = model.get_model_object("diffusion_model")
    parts = ("input_blocks", "middle_block", "output_blocks", "out", "time_embed")
    known = getattr(type(network), "_forward", None) is UNetModel._forward and all(hasattr(network, p) for p in parts)
    if not known or network.predict_codebook_ids or len(network.output_blocks) < 2:
        raise ValueError(
            f"{needed_by}: this model is a {type(network).__name__} ({type(model.model).__name__}), which has no UNet "
            "blocks to reuse; give it a UNet model (SD 1.x, SD 2.x, SDXL, SVD and their like)."
        )
    return network


def record_share(options: dict, forward_key: str, share: float) -> None:
    """Tell the meter, if there is one, which share of the network's work this pass is."""
    if forward_key in options:
        options[forward_key].share = share


def wrapped_further(executor: WrapperExecutor) -> bool:
    """Whether wrappers of other packs come between the one that has ``executor`` and the network."""
    return executor.idx + 1 < len(executor.wrappers)


def with_end(executor: WrapperExecutor, forward: Callable) -> WrapperExecutor:
    """``executor`` with ``forward`` in place of the network: wrappers further in still see the pass."""
    return WrapperExecutor.new_class_executor(forward, executor.class_obj, executor.wrappers, executor.idx)


def capturing(options: dict, capture) -> dict:
    """A copy of ``options`` with ``capture`` first among the output block patches.

    First, so that what is kept is what entered the block: FreeU and the like run again on it.
    """
    patches = dict(options.get("patches", {}))
    patches["output_block_patch"] = [capture, *patches.get("output_block_patch", [])]
    return {**options, "patches": patches}


class Walk:
    """One pass over a batch ``x``: the embedding of time and class, then whichever blocks are asked for, in order.

    kwargs: what else the network was called with.
    """

    def __init__(self, network: UNetModel, x, timesteps, context, y, options: dict, **kwargs):
        self.network, self.context, self.options, self.dtype = network, context, options, x.dtype
        options["original_shape"] = list(x.shape)
        options["transformer_index"] = 0
        self.patches = options.get("patches", {})
        self.times = {
            "time_context": kwargs.get("time_context"),
            "num_video_frames": kwargs.get("num_video_frames", network.default_num_video_frames),
            "image_only_indicator": kwargs.get("image_only_indicator"),
        }
        emb = network.time_embed(timestep_embedding(timesteps, network.model_channels).to(x.dtype))
        for patch in self.patches.get("emb_patch", ()):
            emb = patch(emb, network.model_channels, options)
        self.emb = emb if network.num_classes is None else emb + network.label_emb(y)

    def inputs(self, h: torch.Tensor, blocks: int, control: dict) -> list[torch.Tensor]:
        """The skips of the first ``blocks`` input blocks, the first of which ``h`` enters."""
        skips = []
        for i in range(blocks):
            self.options["block"] = ("input", i)
            h = forward_timestep_embed(
                self.network.input_blocks[i], h, self.emb, self.context, self.options, **self.times
            )
            h = apply_control(h, control, "input")
            for patch in self.patches.get("input_block_patch", ()):
                h = patch(h, self.options)
            skips.append(h)
            for patch in self.patches.get("input_block_patch_after_skip", ()):
                h = patch(h, self.options)
        return skips

    def pass_over(self, blocks) -> None:
        """Leave out ``blocks``, of which patches must not notice more than that: attention layers keep their numbers."""
        self.options["transformer_index"] += sum(isinstance(layer, SpatialTransformer) for b in blocks for layer in b)

    def outputs(self, h: torch.Tensor, skips: Sequence[torch.Tensor], control: dict) -> torch.Tensor:
        """The network's output where ``h`` enters the first of the last ``len(skips)`` output blocks.

        skips: in the order of ``inputs``, so the last is used first.
        """
        network, first = self.network, len(self.network.output_blocks) - len(skips)
        left = list(skips)
        for i in range(first, len(network.output_blocks)):
            self.options["block"] = ("output", i)
            skip = apply_control(left.pop(), control, "output")
            for patch in self.patches.get("output_block_patch", ()):
                h, skip = patch(h, skip, self.options)
            h = h if skip is None else torch.cat([h, skip], dim=1)
            shape = left[-1].shape if left else None
            h = forward_timestep_embed(
                network.output_blocks[i], h, self.emb, self.context, self.options, shape, **self.times
            )
        return network.out(h.type(self.dtype))


class Shares:
    """The share of the work that is left without some blocks, computed once for each shape of the input."""

    def __init__(self, share: Share):
        self.share = share
        self._known: dict[Hashable, float] = {}

    def __call__(self, network: UNetModel, x: torch.Tensor, context: torch.Tensor | None) -> float:
        tokens = 0 if context is None else context.shape[1]
        shape = (tuple(x.shape[1:]), tokens)
        if shape not in self._known:
            self._known[shape] = self.share(network, x.shape, tokens)
        return self._known[shape]
