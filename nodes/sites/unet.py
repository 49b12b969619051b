"""Reuse inside ComfyUI's UNet: which way of leaving out blocks an accelerator asks for."""

from __future__ import annotations

from collections.abc import Callable

from ...solvers.caching.deepcache import DeepCache
from ...solvers.caching.faster_diffusion import FasterDiffusion
from .unet_decoder import faster_diffusion
from .unet_ring import deepcache

MOUNTS = {DeepCache: deepcache, FasterDiffusion: faster_diffusion}


def unet(model, settings, key: str, forward_key: str) -> dict[str, Callable]:
    """The wrappers of an accelerator that computes a part of a UNet."""
    return MOUNTS[type(settings)](model, settings, key, forward_key)
