"""Single-step solvers: DPM-Solver(++) singlestep, rhoRK-DEIS, SEEDS, and those with adaptive step sizes."""

from quickstep_under_test.solvers.adaptive import DPMSolverAdaptive
from quickstep_under_test.solvers.black_box import AdaptiveRK
from quickstep_under_test.solvers.rho_rk import TABLEAUS, RhoRK
from quickstep_under_test.solvers.seeds import SEEDS
from quickstep_under_test.solvers.singlestep import DPMSolverSinglestep

from . import Variant

TAIL = (("order", "the plan ends with steps of lower order; tests/test_singlestep.py measures its third-order steps"),)
HIDDEN = (
    ("order", "its third-order part hides weak order 2 up to 100 steps; tests/test_singlestep.py measures it at 240"),
)
ADAPTIVE = (
    ("order", "the tolerance decides about the error, not the steps; see tests/test_adaptive.py"),
    ("calls", "the tolerance decides about the calls; tests/test_adaptive.py counts them"),
    ("meta", "a step size cannot be chosen without the error's value: one read-back per trial step"),
)
INEXACT = (
    *ADAPTIVE,
    ("point mass", "integrates x - D in log sigma as any other function: exact to the tolerance only"),
)

VARIANTS = [
    Variant(DPMSolverSinglestep()),
    Variant(DPMSolverSinglestep(correction="taylor", r1=1.0)),
    Variant(DPMSolverSinglestep(order=3)),
    Variant(DPMSolverSinglestep(order=3, correction="taylor", frame="vef")),
    Variant(DPMSolverSinglestep(order=2, algorithm="noise")),
    Variant(DPMSolverSinglestep(order=3, algorithm="noise")),
    Variant(DPMSolverSinglestep(order=2, plan="budget")),
    Variant(DPMSolverSinglestep(order=3, plan="budget"), exempt=TAIL),
    Variant(DPMSolverSinglestep(order=3, plan="budget", algorithm="noise", correction="taylor"), exempt=TAIL),
    # First the one the matrix in ComfyUI can take: methods that evaluate at the end of the step cannot go from sigma 4500
    # to 0.9 at once, as its two steps on a zero-terminal-SNR model do; the docstring says so.
    *(Variant(RhoRK(method)) for method in sorted(TABLEAUS, key="3heun".__ne__)),
    Variant(SEEDS(order=1)),
    Variant(SEEDS(order=2)),
    Variant(SEEDS(order=2, eta=0.5, correction="taylor", c2=1.0)),
    Variant(SEEDS(order=3), exempt=HIDDEN),
    Variant(SEEDS(order=3, eta=0.0)),
    Variant(DPMSolverAdaptive(), exempt=ADAPTIVE),
    Variant(DPMSolverAdaptive(order=2, algorithm="noise", controller_type="pid"), exempt=ADAPTIVE),
    Variant(DPMSolverAdaptive(max_calls=9), exempt=ADAPTIVE),
    Variant(AdaptiveRK("RK23", variable="sigma"), exempt=ADAPTIVE),
    Variant(AdaptiveRK("RK45"), exempt=INEXACT),
    Variant(AdaptiveRK("DOP853", max_calls=20), exempt=INEXACT),
]
