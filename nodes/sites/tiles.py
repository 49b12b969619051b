"""Large pictures in tiles: a wrapper around one network call, which makes a call for each tile of it.

Inside the batch of conditionings: areas, masks and hooks are ComfyUI's as always, and ControlNets have seen the whole
picture. What comes with the picture and has its size is cut with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ...solvers.caching.accelerator import Plan
from ...solvers.caching.guiding import column, direction
from ...solvers.caching.seamless_tiles import PREVIOUS, WRAP, Box, SeamlessTiles, SeamlessTilesSession, joined
from .branches import branch_names, with_hooks

CONTROL_UNIT = 8
"""Residuals of ControlNets lie on grids up to this much coarser, so tiles are moved by multiples of it."""


def tiles(model, settings: SeamlessTiles, key: str, forward_key: str) -> dict[str, Callable]:
    """The wrapper that carries out the moves of a ``SeamlessTilesSession``."""

    def forward(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        options = transformer_options or {}
        session: SeamlessTilesSession | None = options.get(key)
        given = (c_concat, c_crossattn, control, options)
        if session is None or session.plan in (None, Plan.PLAIN) or x.ndim < 4 or max(x.shape[-2:]) <= settings.tile:
            return executor(x, t, *given, **kwargs)
        if options.get("patches", {}).get("middle_patch"):
            raise ValueError(f"{settings.title}: GLIGEN's boxes cannot be cut into tiles; leave one of the two out.")
        height, width = x.shape[-2:]
        move = session.move(height, width, CONTROL_UNIT if control else 1)
        keys = session.branches(branch_names(x, with_hooks(options, executor.class_obj)))
        d = session.store.get(keys, x.device) if settings.fill == PREVIOUS and keys else None
        wrapped = settings.fill == WRAP
        if wrapped:
            x, c_concat, kwargs, control = (
                _moved(value, (height, width), move) for value in (x, c_concat, kwargs, control)
            )
        boxes = session.boxes(height, width, move, whole=d is None)
        record = options.get(forward_key)
        if record is not None:
            record.share = sum((b[0].stop - b[0].start) * (b[1].stop - b[1].start) for b in boxes) / (height * width)
        parts = []
        for box in boxes:
            cut = {name: _cut(name, value, (height, width), box) for name, value in kwargs.items()}
            concat = _cut("c_concat", c_concat, (height, width), box)
            part = executor(
                x[(..., *box)],
                t,
                concat,
                c_crossattn,
                _cut_control(control, (height, width), box),
                dict(options),
                **cut,
            )
            parts.append((box, part))
        before = x if d is None else (x - column(t, x) * d).to(x.dtype)
        D = joined(parts, before)
        if wrapped:
            D = D.roll(move, (-2, -1))
        elif settings.fill == PREVIOUS and keys:
            session.store.put(keys, direction(x, t, D))
        return D

    return {WrappersMP.APPLY_MODEL: forward}


def _moved(value: Any, size: tuple[int, int], move: tuple[int, int]) -> Any:
    """The picture, and all that has its size, rolled up and left; residuals of ControlNets by as much of theirs."""
    if isinstance(value, dict):
        return {name: _moved(inner, size, move) for name, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, size, move) for inner in value]
    if not isinstance(value, torch.Tensor) or value.ndim < 4:
        return value
    shifts = [-round(m * own / whole) for m, own, whole in zip(move, value.shape[-2:], size, strict=True)]
    return value.roll(shifts, (-2, -1))


def _cut(name: str, value: Any, size: tuple[int, int], box: Box) -> Any:
    """The part of an input inside ``box``; what is no picture stays."""
    pictures = [
        v for v in (value if isinstance(value, list | tuple) else [value]) if torch.is_tensor(v) and v.ndim >= 4
    ]
    if not pictures:
        return value
    if isinstance(value, list | tuple) or tuple(value.shape[-2:]) != size:
        raise ValueError(
            f"Seamless Tiles: this model gets a second picture ({name}) that does not lie pixel on pixel on the first, so "
            "it cannot be cut into tiles; sample without tiles."
        )
    return value[(..., *box)]


def _cut_control(control: dict | None, size: tuple[int, int], box: Box) -> dict | None:
    """The residuals of a ControlNet inside ``box``, each on its own grid."""
    if not control:
        return control
    return {site: [_cut_residual(r, size, box) for r in residuals] for site, residuals in control.items()}


def _cut_residual(residual: torch.Tensor | None, size: tuple[int, int], box: Box) -> torch.Tensor | None:
    if residual is None:
        return None
    if residual.ndim != 4:
        raise ValueError(
            "Seamless Tiles: this ControlNet works on tokens, which cannot be cut into tiles; leave one of the two out."
        )
    own = []
    for part, whole, side in zip(box, size, residual.shape[-2:], strict=True):
        length = -(-(part.stop - part.start) * side // whole)
        start = min(round(part.start * side / whole), side - length)
        own.append(slice(start, start + length))
    return residual[(..., *own)].clone()  # ComfyUI takes them apart and networks add to them
