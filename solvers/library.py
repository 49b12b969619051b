"""All solvers, in the order of the menu, the wrappers that build on one, and what changes the network any sampler sees."""

from __future__ import annotations

from .adaptive import DPMSolverAdaptive
from .black_box import AdaptiveRK
from .calibration.decoupled import DecoupledTimes
from .calibration.fitted import FittedSolver
from .churn import Churn
from .consistency import ConsistencySampler
from .dc_solver import DCSolver
from .deis import DEIS
from .dpm_solver_v3 import DPMSolverV3
from .er_sde import ERSDE
from .exponential import DDIM, DPMSolverPP, SDEDPMSolverPP
from .exposure_bias import EpsilonScaling
from .gradient_estimation import GradientEstimation
from .lml import LML
from .ml_sde import MLSDE
from .momentum import GHVB, HB
from .pndm import IPNDM, PNDM
from .restart import Restart
from .rho_rk import RhoRK
from .sa import SASolver
from .score_sde import ScoreSDE
from .seeds import SEEDS
from .singlestep import DPMSolverSinglestep
from .sit import SiTSDE
from .solver import Solver, Wrapper
from .switch import Switch
from .thresholding import DynamicThresholding
from .time_shift import TimeShift
from .transform import Transform
from .unipc import UniPC
from .usf import USF

FAMILIES: dict[str, tuple[type[Solver], ...]] = {
    "multistep": (
        DDIM,
        DPMSolverPP,
        UniPC,
        DEIS,
        IPNDM,
        PNDM,
        GHVB,
        GradientEstimation,
        DPMSolverV3,
        USF,
        FittedSolver,
    ),
    "single-step": (DPMSolverSinglestep, RhoRK, DPMSolverAdaptive, AdaptiveRK),
    "stochastic": (SDEDPMSolverPP, SASolver, ERSDE, SEEDS, MLSDE, SiTSDE, ScoreSDE, ConsistencySampler),
}
"""Where the menu has them: *Quickstep/samplers/<family>*."""

SOLVERS: tuple[type[Solver], ...] = tuple(solver for family in FAMILIES.values() for solver in family)
WRAPPERS: tuple[type[Wrapper], ...] = (HB, LML, DCSolver, Churn, Restart, Switch)
TRANSFORMS: tuple[type[Transform], ...] = (EpsilonScaling, DynamicThresholding, TimeShift, DecoupledTimes)
