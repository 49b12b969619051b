"""One SAMPLER node per solver."""

from __future__ import annotations

from comfy_api.latest import io

from ..solvers.library import SOLVERS, WRAPPERS
from .bridge import sampler
from .derive import node

NODES = [
    node(solver, "samplers", lambda s: (sampler(s),), [io.Sampler.Output(display_name="sampler")]) for solver in (*SOLVERS, *WRAPPERS)
]
