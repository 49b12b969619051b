"""Reuse inside ComfyUI's UNet: compute the outer ring of blocks, take what comes from inside from an earlier call."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import (
    UNetModel,
    apply_control,
    forward_timestep_embed,
    timestep_embedding,
)
from comfy.patcher_extension import WrappersMP

from ...solvers.caching.accelerator import Plan, Session
from ...solvers.caching.deepcache import DeepCache
from ...solvers.caching.work import ring_share
from .branches import branch_names, with_hooks


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


def _with_hooks(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    options = with_hooks(transformer_options or {}, executor.class_obj)
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def deepcache(model, settings: DeepCache, key: str, forward_key: str) -> dict[str, Callable]:
    """The wrappers that carry out a DeepCache session's plans.

    key, forward_key: where ``transformer_options`` has the session and the record of the current network pass.
    """
    network = unet_of(model, settings.title)
    depth = settings.branch_depth(
        len(network.output_blocks), any(isinstance(layer, SpatialTransformer) for layer in network.input_blocks[1])
    )
    first = len(network.output_blocks) - 1 - depth
    shares: dict[Hashable, float] = {}

    def forward(executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs):
        options = transformer_options if transformer_options is not None else {}
        session: Session | None = options.get(key)
        names = branch_names(x, options)
        if session is None or session.plan in (None, Plan.PLAIN) or not names:
            return executor(x, timesteps, context, y, control, options, **kwargs)
        branches = session.branches(names)
        if session.plan is Plan.PARTIAL:
            kept = session.store.get(branches)
            if kept is not None:
                record = options.get(forward_key)
                if record is not None:
                    tokens = 0 if context is None else context.shape[1]
                    shape = (tuple(x.shape[1:]), tokens)
                    if shape not in shares:
                        shares[shape] = ring_share(executor.class_obj, depth, x.shape, tokens)
                    record.share = shares[shape]
                return _ring(executor.class_obj, depth, kept, x, timesteps, context, y, control, options, **kwargs)

        def capture(h, skip, at):
            if at["block"] == ("output", first):
                session.store.put(branches, h)
            return h, skip

        # First in the list, so that what is kept is what entered the block: FreeU and the like run again on it.
        patches = dict(options.get("patches", {}))
        patches["output_block_patch"] = [capture, *patches.get("output_block_patch", [])]
        return executor(x, timesteps, context, y, control, {**options, "patches": patches}, **kwargs)

    return {WrappersMP.APPLY_MODEL: _with_hooks, WrappersMP.DIFFUSION_MODEL: forward}


def _ring(network, depth, h, x, timesteps, context, y, control, options, **kwargs):
    """The network's output where ``h`` enters output block ``first = n - 1 - depth`` and only the ring is computed.

    ComfyUI offers no way to leave out blocks, so this repeats its walk over the ones that stay, with its own functions
    for a block and a control residual and the same patch points.
    """
    first = len(network.output_blocks) - 1 - depth
    options["original_shape"] = list(x.shape)
    options["transformer_index"] = 0
    patches = options.get("patches", {})
    times = {
        "time_context": kwargs.get("time_context"),
        "num_video_frames": kwargs.get("num_video_frames", network.default_num_video_frames),
        "image_only_indicator": kwargs.get("image_only_indicator"),
    }
    # Residuals are taken from the end of the list, so the last ones belong to the first output blocks, left out here.
    control = {site: list(residuals) for site, residuals in (control or {}).items()}
    if control.get("output"):
        control["output"] = control["output"][: max(len(control["output"]) - first, 0)]

    emb = network.time_embed(timestep_embedding(timesteps, network.model_channels).to(x.dtype))
    for patch in patches.get("emb_patch", ()):
        emb = patch(emb, network.model_channels, options)
    if network.num_classes is not None:
        emb = emb + network.label_emb(y)

    inside, skips = x, []
    for i in range(depth + 1):
        options["block"] = ("input", i)
        inside = forward_timestep_embed(network.input_blocks[i], inside, emb, context, options, **times)
        inside = apply_control(inside, control, "input")
        for patch in patches.get("input_block_patch", ()):
            inside = patch(inside, options)
        skips.append(inside)
        for patch in patches.get("input_block_patch_after_skip", ()):
            inside = patch(inside, options)

    left_out = [*network.input_blocks[depth + 1 :], network.middle_block or (), *network.output_blocks[:first]]
    options["transformer_index"] += sum(isinstance(layer, SpatialTransformer) for block in left_out for layer in block)

    for i in range(first, len(network.output_blocks)):
        options["block"] = ("output", i)
        skip = apply_control(skips.pop(), control, "output")
        for patch in patches.get("output_block_patch", ()):
            h, skip = patch(h, skip, options)
        h = h if skip is None else torch.cat([h, skip], dim=1)
        shape = skips[-1].shape if skips else None
        h = forward_timestep_embed(network.output_blocks[i], h, emb, context, options, shape, **times)
    return network.out(h.type(x.dtype))
