"""One SAMPLER node per solver."""

from __future__ import annotations

from comfy_api.latest import io

from ..solvers.exponential import DDIM, DPMSolverPP, SDEDPMSolverPP
from ..solvers.solver import Solver
from .bridge import sampler
from .derive import node

SOLVERS: tuple[type[Solver], ...] = (DDIM, DPMSolverPP, SDEDPMSolverPP)

NODES = [
    node(solver, "samplers", lambda s: (sampler(s),), [io.Sampler.Output(display_name="sampler")]) for solver in SOLVERS
]
