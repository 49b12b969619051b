"""Solvers that add noise again: consistency sampling, churn, restarts, mixed windows."""

from quickstep_under_test.solvers.churn import Churn
from quickstep_under_test.solvers.consistency import ConsistencySampler
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP, SDEDPMSolverPP
from quickstep_under_test.solvers.restart import Restart
from quickstep_under_test.solvers.rho_rk import RhoRK
from quickstep_under_test.solvers.switch import Switch

from . import Variant

FEW = (
    ("order", "redraws a share of the noise that does not shrink with the steps, so an ordinary model is left behind"),
)
RESTARTS = (
    ("order", "the sigmas within a restart do not become more with the steps; tests/test_restart.py refines both"),
    ("calls", "which restarts are made depends on the sigmas; tests/test_restart.py counts them"),
)
BORDER = (
    ("order", "the border lies somewhere within a step, so the error jumps; tests/test_renoise.py puts it on a sigma"),
)
PLAIN, NOISY = DPMSolverPP(lower_order_final="never"), SDEDPMSolverPP(lower_order_final="never")

VARIANTS = [
    Variant(ConsistencySampler(), exempt=FEW),
    Variant(ConsistencySampler("TCD"), exempt=FEW),
    Variant(ConsistencySampler("CTM"), exempt=FEW),
    Variant(ConsistencySampler("Lightning")),
    Variant(Churn(RhoRK())),
    Variant(Churn(DDIM())),
    Variant(Churn(PLAIN)),
    Variant(Churn(PLAIN, S_churn=0.0)),
    Variant(Restart(RhoRK()), exempt=RESTARTS),
    Variant(Restart(PLAIN, "custom", "0.3, 2, 5, 2\n1, 2, 3, 1"), exempt=RESTARTS),
    Variant(Restart(PLAIN, "custom", "")),
    Variant(Switch(PLAIN, NOISY), exempt=BORDER),
    Variant(Switch(PLAIN, DDIM())),
]
