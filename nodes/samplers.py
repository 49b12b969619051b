"""One SAMPLER node per solver, and the nodes that build a sampler from others."""

from __future__ import annotations

from comfy_api.latest import io

from ..solvers.library import FAMILIES, WRAPPERS
from .bridge import sampler
from .derive import node

MENU = {f"samplers/{family}": members for family, members in FAMILIES.items()} | {"samplers/around a sampler": WRAPPERS}

NODES = [
    node(solver, category, lambda s: (sampler(s),), [io.Sampler.Output(display_name="sampler")])
    for category, members in MENU.items()
    for solver in members
]
