"""UniPC, SA-Solver, DC-Solver."""

from quickstep_under_test.solvers.artifact import Artifact, FoundFor
from quickstep_under_test.solvers.dc_solver import KIND, DCSolver
from quickstep_under_test.solvers.exponential import DPMSolverPP, SDEDPMSolverPP
from quickstep_under_test.solvers.sa import SASolver
from quickstep_under_test.solvers.unipc import UniPC

from . import Variant

NEVER = {"lower_order_final": "never"}
ALWAYS_ON = {"start_percent": 0.0, "end_percent": 1.0}
FLAT = [
    [[0.0] * 3, [0.0] * 3, [0.0, 0.0, rho]] for rho in (0.9, 0.0, 0.0, 0.0)
]  # 0.9 at any guidance scale and step count
COMPENSATION = Artifact(KIND, {"cascade": FLAT}, found_for=FoundFor(cfg=7.5))

VARIANTS = [
    Variant(UniPC(order=1, **NEVER)),
    Variant(UniPC(order=2, **NEVER)),
    Variant(UniPC(order=2, variant="bh1", algorithm="noise", **NEVER)),
    Variant(UniPC(order=2, variant="exact", from_step=2, frame="vef", **NEVER)),
    Variant(UniPC(order=3, **NEVER)),
    Variant(UniPC(order=3, corrector=False, algorithm="noise", **NEVER)),
    Variant(UniPC(order=5, **NEVER)),
    Variant(SASolver(simple_order_2=True, **NEVER)),
    Variant(SASolver(predictor_order=2, corrector_order=0, **ALWAYS_ON, **NEVER)),
    Variant(SASolver(predictor_order=1, corrector_order=0, **ALWAYS_ON)),
    Variant(SASolver(predictor_order=3, corrector_order=4, **ALWAYS_ON, **NEVER)),
    Variant(SASolver(mode="PECE", simple_order_2=True, **ALWAYS_ON, **NEVER)),
    Variant(SASolver(predictor_order=3, corrector_order=4, eta=0.0, mode="PECE", **NEVER)),
    Variant(DCSolver(UniPC(order=2, **NEVER))),
    Variant(DCSolver(UniPC(order=2, **NEVER), COMPENSATION)),
    Variant(DCSolver(DPMSolverPP(order=3, **NEVER), COMPENSATION, dc_order=1)),
    Variant(DCSolver(SDEDPMSolverPP(order=2, **NEVER), COMPENSATION)),
]
