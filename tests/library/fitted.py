"""The fitted solver, with weights from a fit to the mixture of the laws."""

from quickstep_under_test.solvers.artifact import Artifact
from quickstep_under_test.solvers.calibration.cohort import Cohort, drained
from quickstep_under_test.solvers.calibration.fitted import KIND, FittedSolver
from quickstep_under_test.solvers.calibration.least_squares import sequential
from quickstep_under_test.solvers.calibration.teacher import Trajectories
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.solver import Problem
from quickstep_under_test.solvers.verify import FLOW, start

from . import Variant

SIGMAS = [1.0, 0.85, 0.6, 0.3, 0.1, 0.0]


def fit(memory: int) -> Artifact:
    """Weights for ``SIGMAS``."""
    problem, x = Problem(GaussianMixture.random().denoiser(FLOW), FLOW), start(FLOW, 1.0, n=24, seed=5)
    cohort = Cohort([lambda visit: visit(problem, x)])
    teacher = Trajectories(FLOW, 40, len(x), tuple(x.shape[1:]), "")
    drained(teacher.teach(cohort))
    rows = drained(sequential(cohort, FLOW, SIGMAS, memory, teacher.at))
    return Artifact(KIND, {"sigmas": SIGMAS, "weights": rows})


VARIANTS = [
    Variant(FittedSolver()),
    Variant(FittedSolver(fit(3), elsewhere="adapt"), name="memory 3"),
    Variant(FittedSolver(fit(5), elsewhere="adapt"), name="memory 5"),
]
