"""Accelerators that change how a network is evaluated: nothing is kept between calls."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Sequence

import torch
from comfy.patcher_extension import WrappersMP
from torch import nn

from ...solvers.artifact import mismatches
from ...solvers.caching.accelerator import Plan
from ...solvers.caching.block_skip import BlockSkip, LeavesOut, LeavingOut, Unit
from ...solvers.caching.layers import CROSS
from ...solvers.caching.pladis import PLADIS, sparse_attention
from ...solvers.caching.skip_tuning import SkipTuning, SkipTuningSession
from ..fingerprint import fingerprint
from .families import chain
from .layers import blocks_of, once_per_network
from .modules import OVERRIDE
from .scoped import scoped
from .unet_walk import unet_of

log = logging.getLogger(__name__)


def tuning(model, settings, key: str, forward_key: str) -> dict[str, Callable]:
    """The wrappers that carry out ``SkipTuning``, ``PLADIS`` and what leaves units out."""
    makers = {SkipTuning: _skip_tuning, PLADIS: _pladis}
    change = makers.get(type(settings), _leaving_out)(model, settings)

    def forward(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        options = transformer_options or {}
        session = options.get(key)
        if session is None or session.plan in (None, Plan.PLAIN):
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        changed, overrides, saved = change(executor.class_obj.diffusion_model, session, options)
        with scoped(overrides):
            out = executor(x, t, c_concat, c_crossattn, control, changed, **kwargs)
        record = options.get(forward_key)
        if record is not None and record.share is not None:
            record.share *= 1.0 - saved
        return out

    return {WrappersMP.APPLY_MODEL: forward}


def _skip_tuning(model, settings: SkipTuning):
    """Scales what each output block gets from its input block, out of place: the same tensor may go elsewhere too."""
    blocks = len(unet_of(model, settings.title).output_blocks)

    def change(network, session: SkipTuningSession, options):
        def scale(h, skip, extra):
            rho = session.rho(extra["block"][1], blocks)
            return h, skip if skip is None or rho == 1.0 else skip * rho

        patches = dict(options.get("patches", {}))
        patches["output_block_patch"] = [*patches.get("output_block_patch", []), scale]
        return {**options, "patches": patches}, {}, 0.0

    return change


def _cross_attentions(network: nn.Module) -> list[nn.Module]:
    """The cross-attentions that tell their attention function the options, where it can be replaced."""
    layers = (pair for block in blocks_of(network) for pair in block.layers)
    found = [module for layer, module in layers if layer.kind == CROSS]
    return [module for module in found if "transformer_options" in inspect.signature(type(module).forward).parameters]


def _pladis(model, settings: PLADIS):
    network = model.get_model_object("diffusion_model")
    if not _cross_attentions(network):
        raise ValueError(
            f"{settings.title}: this model is a {type(network).__name__} ({type(model.model).__name__}), which has no separate "
            "attention to the prompt that could be changed; it works on UNets, Wan, LTX-Video and Cosmos-Predict2."
        )

    found = once_per_network(_cross_attentions)

    def sharpened(outer):
        def attention(func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False,
                      **kwargs):  # fmt: skip
            given = dict(mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape,
                         skip_output_reshape=skip_output_reshape, **kwargs)  # fmt: skip
            dense = func(q, k, v, heads, **given) if outer is None else outer(func, q, k, v, heads, **given)
            if not skip_reshape:
                q, k, v = (x.view(*x.shape[:2], -1, q.shape[-1] // heads).transpose(1, 2) for x in (q, k, v))
            repeat = q.shape[1] // k.shape[1]
            if repeat > 1:  # several heads of queries share one of keys
                k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
            sparse = sparse_attention(q, k, v, settings.alpha, mask, kwargs.get("scale"))
            if not skip_output_reshape:
                sparse = sparse.transpose(1, 2).flatten(2)
            return torch.lerp(dense, sparse.to(dense.dtype), settings.lam)

        return attention

    def crossed(module: nn.Module) -> Callable:
        original = module.forward

        def forward(*args, transformer_options=None, **kwargs):
            options = transformer_options or {}
            if kwargs.get("context", args[1] if len(args) > 1 else None) is not None:
                options = {**options, OVERRIDE: sharpened(options.get(OVERRIDE))}
            return original(*args, transformer_options=options, **kwargs)

        return forward

    def change(network, session, options):
        return options, {module: crossed(module) for module in found(network)}, 0.0

    return change


Parts = list[tuple[Unit, nn.Module, Callable]]
"""(unit, its module, what the module does instead)."""


def without(network: nn.Module, units: Sequence[Unit], needed_by: str, made: tuple[str, str] = BlockSkip.made) -> Parts:
    """What leaving out these units takes; raises ``ValueError`` where the network has no such part. made: of ``LeavesOut``."""
    modules = dict(network.named_modules())
    missing = [unit.name for unit in units if unit.name not in modules]
    if missing:
        raise ValueError(
            f"{needed_by}: this model has no part {missing[0]!r}; the {made[0]} were made for another model, make them for "
            f"this one with {made[1]}."
        )
    layouts = {}
    if any(unit.whole for unit in units):
        found = chain(network, "", needed_by)
        layouts = dict(zip(found.blocks, found.layouts, strict=True))
    found = [(unit, modules[unit.name]) for unit in units]
    return [(unit, module, _passing(layouts[module]) if unit.whole else _nothing) for unit, module in found]


def _nothing(*args, **kwargs):
    """A layer's output that changes nothing when it is added."""
    x = args[0] if args else next(iter(kwargs.values()))
    return torch.zeros_like(x)


def _passing(layout) -> Callable:
    def forward(*args, **kwargs):
        return layout.pack(layout.streams(args, kwargs))

    return forward


def _leaving_out(model, settings: LeavesOut):
    network = model.get_model_object("diffusion_model")
    units = settings.left_out()
    without(network, units, settings.title, settings.made)
    if settings.calibration is not None:
        for sentence in mismatches(settings.calibration, model=fingerprint(model)):
            log.warning("%s: the %s may not fit. %s", settings.title, settings.made[0], sentence)
    parts = once_per_network(lambda network: without(network, units, settings.title, settings.made))

    def change(network, session: LeavingOut, options):
        # A part that has another forward already is a cache's, which counts on being asked.
        named = [part for part in parts(network) if part[0].name in session.left_out]
        free = [part for part in named if "forward" not in vars(part[1])]
        return options, {module: instead for _, module, instead in free}, sum(unit.work for unit, _, _ in free)

    return change


def held(model, units: Sequence[Unit], names: Callable[[], Collection[str]], needed_by: str, key: str):
    """A clone of ``model`` whose every network call leaves out those of the units that ``names()`` has at that moment.

    For searches, which try many sets within one run; nothing of the network is changed between calls.
    """
    without(model.get_model_object("diffusion_model"), units, needed_by)
    parts = once_per_network(lambda network: without(network, units, needed_by))

    def forward(executor, *args, **kwargs):
        left = names()
        found = parts(executor.class_obj.diffusion_model) if left else []
        with scoped({module: instead for unit, module, instead in found if unit.name in left}):
            return executor(*args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, forward)
    return clone
