"""What wrappers share that start their solver anew within a run: churn, restarts, windows."""

from __future__ import annotations

from collections.abc import Sequence

from .multistep import Multistep
from .solver import Solver, Wrapper
from .step_size import Adaptive


def innermost(solver: Solver) -> Solver:
    """The solver inside all wrappers."""
    while isinstance(solver, Wrapper):
        solver = solver.solver
    return solver


def remembers(solver: Solver) -> bool:
    """Whether a step builds on the ones before, so that starting anew costs order."""
    return isinstance(innermost(solver), Multistep) or 1 == solver.calls < solver.convergence_order


def check_given_times(solver: Solver, owner: str) -> None:
    """Raise ``ValueError`` for a solver whose x after a step is not yet, or no longer, at that step's end."""
    if isinstance(innermost(solver), Adaptive):
        raise ValueError(
            f"{owner}: {solver.title} chooses its own steps; take a sampler that goes by the given sigmas, such as "
            "rhoRK-DEIS or DPM-Solver++."
        )


def check_starts_anew(solver: Solver, times: Sequence[float], owner: str) -> None:
    """Raise ``ValueError``, before a run over ``times``, for a solver that cannot start in the middle of it."""
    if len(times) > 2:
        try:
            solver.start(times[1:])
        except ValueError as refusal:
            raise ValueError(
                f"{owner} starts the sampler anew with fewer steps, which it refuses: {refusal}"
            ) from refusal
