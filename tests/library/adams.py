"""DEIS, PNDM and its like, gradient estimation; momentum and LML on multistep solvers."""

from quickstep_under_test.solvers.deis import DEIS
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP, SDEDPMSolverPP
from quickstep_under_test.solvers.gradient_estimation import GradientEstimation
from quickstep_under_test.solvers.lml import LML
from quickstep_under_test.solvers.momentum import GHVB, HB
from quickstep_under_test.solvers.pndm import IPNDM, PNDM

from . import Variant

MIDPOINT = DPMSolverPP(lower_order_final="never")
VARIANTS = [
    Variant(DEIS(points=2)),
    Variant(DEIS(points=4)),
    Variant(DEIS(points=3, frame="snr")),
    Variant(DEIS(points=3, variable="rho", frame="snr")),
    Variant(DEIS(points=3, variable="lambda", frame="snr")),
    Variant(DEIS(points=3, variable="vp")),
    Variant(IPNDM()),
    Variant(IPNDM(points=4, coefficients="exact")),
    Variant(PNDM()),
    Variant(PNDM(method="s-pndm")),
    Variant(PNDM(method="f-pndm")),
    Variant(GHVB()),
    Variant(GHVB(order=4.7)),
    Variant(GradientEstimation()),
    Variant(GradientEstimation(gamma=1.5)),
    Variant(GradientEstimation(second_order=True)),
    Variant(HB(MIDPOINT)),
    Variant(HB(IPNDM())),
    Variant(HB(GHVB(order=2.5), nesterov=True)),
    Variant(HB(SDEDPMSolverPP(lower_order_final="never"))),
    Variant(LML(DDIM())),
    Variant(LML(DEIS(points=1))),
    Variant(LML(MIDPOINT)),
]
