"""The solvers under the laws of ``tests/test_library.py``, one module per family, each with ``VARIANTS``."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass

from quickstep_under_test.solvers.solver import Solver


@dataclass(frozen=True)
class Variant:
    """One solver with its settings, and which laws it is exempt from, with the reason.

    order: expected global order (weak order if stochastic); None: ``solver.convergence_order``.
    exempt: law -> why it does not hold by construction.
    name: what the test is called; empty: the solver and its settings.
    """

    solver: Solver
    order: float | None = None
    exempt: tuple[tuple[str, str], ...] = ()
    name: str = ""

    def __str__(self) -> str:
        if self.name:
            return f"{self.solver.id}-{self.name}"
        settings = "-".join(str(v) for v in vars(self.solver).values() if not isinstance(v, Solver))
        return f"{self.solver.id}-{settings}"

    def holds(self, law: str) -> bool:
        return law not in dict(self.exempt)


def variants() -> list[Variant]:
    """Of all families."""
    modules = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    return [variant for module in modules for variant in module.VARIANTS]
