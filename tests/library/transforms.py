"""Samplers that see the network through a transform."""

from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP
from quickstep_under_test.solvers.exposure_bias import EpsilonScaling
from quickstep_under_test.solvers.thresholding import DynamicThresholding
from quickstep_under_test.solvers.time_shift import TimeShift
from quickstep_under_test.solvers.transform import Transformed

from . import Variant

CHANGED = (
    ("order", "the network is changed on purpose, so the solution of its own equation is not approached"),
    ("point mass", "the network is changed on purpose, so its constant prediction does not stay one"),
)
READS = (
    ("meta", "a time of its own for each row needs the variance of each row: one read-back per call"),
    ("calls", "it asks with a time for each row, which the law cannot compare; tests/test_transforms.py counts"),
)

VARIANTS = [
    Variant(Transformed(DPMSolverPP(), EpsilonScaling(b=1.05, k=0.02)), exempt=CHANGED),
    Variant(Transformed(DPMSolverPP(), DynamicThresholding(M=0.5)), exempt=CHANGED),
    Variant(Transformed(DDIM(), TimeShift(window=100, cutoff=0)), exempt=(*CHANGED, *READS)),
]
