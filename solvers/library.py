"""All solvers, in the order of the menu, and the wrappers that build on one."""

from __future__ import annotations

from .dc_solver import DCSolver
from .deis import DEIS
from .exponential import DDIM, DPMSolverPP, SDEDPMSolverPP
from .gradient_estimation import GradientEstimation
from .lml import LML
from .momentum import GHVB, HB
from .pndm import IPNDM, PNDM
from .sa import SASolver
from .solver import Solver, Wrapper
from .unipc import UniPC

SOLVERS: tuple[type[Solver], ...] = (
    DDIM,
    DPMSolverPP,
    UniPC,
    DEIS,
    IPNDM,
    PNDM,
    GHVB,
    GradientEstimation,
    SDEDPMSolverPP,
    SASolver,
)
WRAPPERS: tuple[type[Wrapper], ...] = (HB, LML, DCSolver)
