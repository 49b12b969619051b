"""The mean-reverting wrapper. The laws are about processes that end at zero, so mu is 0 here; tests/test_mean_reverting.py
has the other ones."""

import torch
from quickstep_under_test.solvers.exponential import DPMSolverPP, SDEDPMSolverPP
from quickstep_under_test.solvers.mean_reverting import MeanReverting

from . import Variant

ZERO = torch.zeros(1, dtype=torch.float64)

VARIANTS = [
    Variant(MeanReverting(DPMSolverPP(lower_order_final="never"), ZERO), name="2M"),
    Variant(MeanReverting(SDEDPMSolverPP(lower_order_final="never"), ZERO), name="SDE"),
]
