"""The accelerators under the laws of ``tests/comfy/test_accelerators.py``, one module per family, each with ``VARIANTS``."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass

from quickstep_under_test.solvers.caching.accelerator import Accelerator


@dataclass(frozen=True)
class Variant:
    """One accelerator under the laws.

    active: settings that save something, or change the result, in 12 steps of a small network.
    neutral: settings of the same class that leave the result as it is, in every bit.
    models: networks of ``tests/comfy/models.py`` that it works on: "unet", "sdxl", "sd3", "flux", "flow" and "eps" (the last
        two are ``gaussian``).
    cfg: guidance scales the laws are tried at.
    exempt: law -> why it does not hold by construction.
    """

    active: Accelerator
    neutral: Accelerator
    models: tuple[str, ...] = ("unet", "sd3")
    cfg: tuple[float, ...] = (1.0, 7.0)
    exempt: tuple[tuple[str, str], ...] = ()
    name: str = ""

    def __str__(self) -> str:
        return f"{self.active.id}-{self.name}" if self.name else self.active.id

    def holds(self, law: str) -> bool:
        return law not in dict(self.exempt)


def variants() -> list[Variant]:
    """Of all families."""
    modules = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    return [variant for module in modules for variant in module.VARIANTS]
