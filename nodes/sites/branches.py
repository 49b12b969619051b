"""What tells the branches of a network call apart, read from ``transformer_options``."""

from __future__ import annotations

from collections.abc import Hashable

import torch

HOOKS = "quickstep.hooks"


def branch_names(x: torch.Tensor, options: dict) -> list[Hashable]:
    """One name for each branch in the batch ``x``, in its order; empty if the call does not say.

    ComfyUI puts positive and negative conditionings, areas and context windows in one network call or in several,
    depending on free memory. ``uuids`` names the conditioning; a copy made for an area keeps it, so the side
    (``cond_or_uncond``) counts too.
    """
    uuids = options.get("uuids") or []
    if not uuids or len(x) % len(uuids):
        return []
    window = getattr(options.get("context_window"), "index_list", None)
    shared = (tuple(window) if window else None, options.get(HOOKS), tuple(x.shape[1:]), len(x) // len(uuids))
    return [
        (uuid, side, *shared, str(x.device), x.dtype)
        for uuid, side in zip(uuids, options.get("cond_or_uncond", uuids), strict=False)
    ]


def with_hooks(options: dict, model) -> dict:
    """A copy of ``options`` that says which weight hooks are on, and how strongly, for ``branch_names``.

    What was kept under other weights must not be reused. model: the BaseModel of an APPLY_MODEL wrapper.
    """
    group = getattr(model.current_patcher, "current_hooks", None)
    hooks = tuple((id(hook), hook.strength) for hook in group.hooks) if group is not None else None
    return {**options, HOOKS: hooks}
