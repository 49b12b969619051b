"""Encoder propagation inside ComfyUI's UNet: the decoder alone, on skips of an earlier call, for one step or for several."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from comfy.patcher_extension import WrappersMP

from ...solvers.caching.accelerator import Plan
from ...solvers.caching.faster_diffusion import FasterDiffusion, FasterDiffusionSession
from ...solvers.caching.work import decoder_share
from .branches import branch_names, with_hooks
from .unet_walk import Shares, Walk, capturing, record_share, unet_of, with_end, wrapped_further

BASE = "quickstep.base"


def faster_diffusion(model, settings: FasterDiffusion, key: str, forward_key: str) -> dict[str, Callable]:
    """The wrappers that carry out a ``FasterDiffusionSession``'s plans.

    key, forward_key: where ``transformer_options`` has the session and the record of the current network pass.
    """
    blocks = len(unet_of(model, settings.title).output_blocks)
    shares = Shares(decoder_share)

    def run(executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
        session = session_in(extra_args.get("model_options", {}))
        if session is not None:
            session.noise = noise
        return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)

    def call(executor, x, timestep, model_options, *args, **kwargs):
        session = session_in(model_options)
        if session is None or session.plan is not None:
            return executor(x, timestep, model_options, *args, **kwargs)
        with session.call(float(timestep.max())):
            return session.inject(executor(x, timestep, model_options, *args, **kwargs))

    def conditionings(executor, model, conds, x, timestep, model_options):
        """What the decoder reuses has the ControlNets' residuals in it, so they need not be run."""
        session = session_in(model_options)
        controlled = any("control" in each for c in conds if c is not None for each in c)
        if session is None or session.plan is not Plan.PARTIAL or not session.store.nbytes or not controlled:
            return executor(model, conds, x, timestep, model_options)
        bare = [c and [{k: v for k, v in each.items() if k != "control"} for each in c] for c in conds]
        with session.trial():
            made = executor(model, bare, x, timestep, model_options)
        return executor(model, conds, x, timestep, model_options) if session.missed else made

    def apply(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        options = with_hooks(transformer_options or {}, executor.class_obj)
        options[BASE] = executor.class_obj
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def forward(executor, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs):
        options = transformer_options if transformer_options is not None else {}
        session: FasterDiffusionSession | None = options.get(key)
        names = branch_names(x, options)
        if session is None or session.plan in (None, Plan.PLAIN) or not names:
            return executor(x, timesteps, context, y, control, options, **kwargs)
        branches = session.branches(names)
        if session.plan is Plan.PARTIAL:
            made = session.foreseen(branches, x.device)
            if made is not None:
                record_share(options, forward_key, 0.0)
                return made
            kept = session.kept(branches, blocks + 1, x.device)
            if kept is not None:
                steps = (
                    session.ahead()[:1] if wrapped_further(executor) else _fitting(session.ahead(), x, options, kwargs)
                )
                record_share(options, forward_key, len(steps) * shares(executor.class_obj, x, context))
                later = [_network_time(options[BASE], session, i, timesteps) for i in steps[1:]]
                decoder = partial(_decoder, executor.class_obj, kept, later)
                out = with_end(executor, decoder)(x, timesteps, context, y, control, options, **kwargs)
                now, *outputs = out.chunk(len(steps))
                for step, output in zip(steps[1:], outputs, strict=True):
                    session.foresee(branches, step, output)
                return now
            if session.bare:
                session.missed = True
                return executor(x, timesteps, context, y, control, options, **kwargs)

        def capture(h, skip, at):
            i = at["block"][1]
            if i == 0:
                session.keep(branches, 0, h)
            session.keep(branches, 1 + i, skip)
            return h, skip

        return executor(x, timesteps, context, y, control, capturing(options, capture), **kwargs)

    def session_in(model_options: dict) -> FasterDiffusionSession | None:
        return model_options.get("transformer_options", {}).get(key)

    return {
        WrappersMP.SAMPLER_SAMPLE: run,
        WrappersMP.PREDICT_NOISE: call,
        WrappersMP.CALC_COND_BATCH: conditionings,
        WrappersMP.APPLY_MODEL: apply,
        WrappersMP.DIFFUSION_MODEL: forward,
    }


def _fitting(steps: list[int], x: torch.Tensor, options: dict, more: dict) -> list[int]:
    """As many of ``steps`` as may be computed in one batch.

    One, where something inside might look at the time, which patches find in the options, or at the rows; for the rest memory
    is asked for as ComfyUI does before it joins conditionings.
    """
    patched = any(options.get("patches", {}).values()) or any(options.get("patches_replace", {}).values())
    video = x.ndim != 4 or any(value is not None for value in more.values())
    if len(steps) == 1 or patched or video or options.get("optimized_attention_override") is not None:
        return steps[:1]
    base = options[BASE]
    free = base.current_patcher.get_free_memory(x.device)
    while len(steps) > 1 and base.memory_required([len(steps) * len(x), *x.shape[1:]]) * 1.5 >= free:
        steps = steps[:-1]
    return steps


def _network_time(base, session: FasterDiffusionSession, step: int, like: torch.Tensor) -> torch.Tensor:
    """What the network is told instead of ``like`` in a later step."""
    sigma = torch.tensor([session.tracker.times[step]], dtype=torch.float32, device=like.device)
    return base.model_sampling.timestep(sigma).float().expand(len(like)).to(like)


def _decoder(
    network, kept, later, x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs
) -> torch.Tensor:
    """The output now and at the times ``later``, one batch, where ``kept`` is what enters the decoder and its skips.

    What ControlNets add is in ``kept``.
    """
    n = 1 + len(later)

    def repeated(value):
        return value if value is None or n == 1 else value.repeat(n, *[1] * (value.ndim - 1))

    x, context, y = map(repeated, (x, context, y))
    h, *skips = map(repeated, kept)
    walk = Walk(network, x, torch.cat([timesteps, *later]), context, y, transformer_options, **kwargs)
    walk.pass_over([*network.input_blocks, network.middle_block or ()])
    return walk.outputs(h, skips[::-1], {})
