"""DDIM, DPM-Solver++ multistep, SDE-DPM-Solver++."""

from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP, SDEDPMSolverPP

from . import Variant

NEVER = {"lower_order_final": "never"}
VARIANTS = [
    Variant(DDIM()),
    Variant(DDIM(eta=0.5)),
    Variant(DDIM(eta=1.0)),
    Variant(DPMSolverPP(order=1)),
    Variant(DPMSolverPP(order=2, **NEVER)),
    Variant(DPMSolverPP(order=2, frame="vef", **NEVER)),
    Variant(DPMSolverPP(order=2, correction="taylor", **NEVER)),
    Variant(DPMSolverPP(order=3, **NEVER)),
    Variant(DPMSolverPP(order=3, frame="vef", **NEVER)),
    Variant(DPMSolverPP(order=3, third_order="reference", **NEVER)),
    Variant(SDEDPMSolverPP(order=2, eta=0.0, **NEVER)),
    Variant(SDEDPMSolverPP(order=3, eta=0.0, **NEVER)),
    Variant(SDEDPMSolverPP(order=1)),
    Variant(SDEDPMSolverPP(order=2, **NEVER)),
    Variant(SDEDPMSolverPP(order=2, correction="taylor", **NEVER)),
    Variant(SDEDPMSolverPP(order=3, **NEVER)),
]
