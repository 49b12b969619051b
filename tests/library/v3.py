"""DPM-Solver-v3, with statistics that are smooth (linear in lambda) and with those of data prediction."""

import torch
from quickstep_under_test.solvers.dpm_solver_v3 import DPMSolverV3
from quickstep_under_test.solvers.ems import ModelStatistics

from . import Variant

SMOOTH = ModelStatistics(*(torch.tensor(v) for v in ([-6.0, 6.0], [0.9, 0.3], [-0.2, -0.8], [0.3, -0.4])))
NEVER = {"lower_order_final": "never"}
POINT = (("point mass", "statistics that do not fit a point mass leave an error of the method's order"),)
VARIANTS = [
    Variant(DPMSolverV3(order=3, use_corrector="never", **NEVER)),
    Variant(DPMSolverV3(order=1, use_corrector="never", statistics=SMOOTH), exempt=POINT),
    Variant(DPMSolverV3(order=2, use_corrector="early", statistics=SMOOTH, **NEVER), exempt=POINT),
    Variant(DPMSolverV3(order=3, use_corrector="never", statistics=SMOOTH, **NEVER), exempt=POINT),
    Variant(DPMSolverV3(order=3, statistics=SMOOTH, **NEVER), exempt=POINT),
]
