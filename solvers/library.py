"""All solvers, in the order of the menu."""

from __future__ import annotations

from .exponential import DDIM, DPMSolverPP, SDEDPMSolverPP
from .solver import Solver

SOLVERS: tuple[type[Solver], ...] = (DDIM, DPMSolverPP, SDEDPMSolverPP)
