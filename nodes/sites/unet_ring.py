"""DeepCache inside ComfyUI's UNet: compute the outer ring of blocks, take what comes from inside from earlier calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from comfy.ldm.modules.attention import SpatialTransformer
from comfy.patcher_extension import WrappersMP

from ...solvers.caching.accelerator import Plan
from ...solvers.caching.deepcache import DeepCache, DeepCacheSession
from ...solvers.caching.work import ring_share
from .branches import branch_names, with_hooks
from .unet_walk import Shares, Walk, capturing, record_share, unet_of, with_end


def hooked(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
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
    shares = Shares(partial(ring_share, depth))

    def forward(executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs):
        options = transformer_options if transformer_options is not None else {}
        session: DeepCacheSession | None = options.get(key)
        names = branch_names(x, options)
        if session is None or session.plan in (None, Plan.PLAIN) or not names:
            return executor(x, timesteps, context, y, control, options, **kwargs)
        branches = session.branches(names)
        if session.plan is Plan.PARTIAL:
            kept = session.kept(branches, x.device)
            if kept is not None:
                record_share(options, forward_key, shares(executor.class_obj, x, context))
                ring = partial(_ring, executor.class_obj, depth, kept)
                return with_end(executor, ring)(x, timesteps, context, y, control, options, **kwargs)

        def capture(h, skip, at):
            if at["block"] == ("output", first):
                session.keep(branches, h)
            return h, skip

        return executor(x, timesteps, context, y, control, capturing(options, capture), **kwargs)

    return {WrappersMP.APPLY_MODEL: hooked, WrappersMP.DIFFUSION_MODEL: forward}


def _ring(network, depth, h, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs):
    """The network's output where ``h`` enters output block ``first = n - 1 - depth`` and only the ring is computed."""
    first = len(network.output_blocks) - 1 - depth
    walk = Walk(network, x, timesteps, context, y, transformer_options, **kwargs)
    # Residuals are taken from the end of the list, so the last ones belong to the first output blocks, left out here.
    control = {site: list(residuals) for site, residuals in (control or {}).items()}
    if control.get("output"):
        control["output"] = control["output"][: max(len(control["output"]) - first, 0)]
    skips = walk.inputs(x, depth + 1, control)
    walk.pass_over([*network.input_blocks[depth + 1 :], network.middle_block or (), *network.output_blocks[:first]])
    return walk.outputs(h, skips, control)
