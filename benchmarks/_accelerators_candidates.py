"""What ``accelerators.py`` compares: one row per accelerator and setting. A new accelerator only needs a row here.

QUALITY   on the demo networks, where errors mean something
COST      on networks of real size with random weights: settings whose schedule does not depend on the data, where there
          are such (what an adaptive one skips on random weights says nothing about pictures)

A row is ``sweep(id, setting=value or [values])``; ``together(row, row)`` puts several on one model, the first one first.
Ids that do not exist and settings that are refused are reported, not fatal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product

Part = tuple[str, tuple[tuple[str, object], ...]]


@dataclass(frozen=True)
class Candidate:
    """Accelerators by id with their settings, attached in this order. No parts: the plain model."""

    parts: tuple[Part, ...] = ()

    @property
    def label(self) -> str:
        return " + ".join(_label(*part) for part in self.parts) or "plain"

    @property
    def method(self) -> str:
        """The label without settings."""
        return " + ".join(name for name, _ in self.parts) or "plain"

    def make(self, classes: Mapping[str, type]) -> list:
        """The accelerators; ``LookupError`` for an id that is not there, the class's own error for bad settings."""
        missing = [name for name, _ in self.parts if name not in classes]
        if missing:
            raise LookupError(f"there is no accelerator {', '.join(missing)}")
        return [classes[name](**dict(settings)) for name, settings in self.parts]


def _label(name: str, settings: Iterable[tuple[str, object]]) -> str:
    shown = (f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in settings)
    return ", ".join((name, *shown))


def sweep(name: str, **settings) -> list[Candidate]:
    """A candidate for every combination of the listed values."""
    values = [value if isinstance(value, list) else [value] for value in settings.values()]
    return [Candidate(((name, tuple(zip(settings, chosen, strict=True))),)) for chosen in product(*values)]


def together(*rows: list[Candidate]) -> list[Candidate]:
    return [Candidate(tuple(part for c in chosen for part in c.parts)) for chosen in product(*rows)]


QUALITY = [
    # whole calls
    *sweep("StepForecast", tol=[0.01, 0.02, 0.05, 0.1]),
    *sweep("StepForecast", mode="budget", share=[0.65, 0.5, 0.35]),
    *sweep("StepForecast", mode="interval", interval=2),
    *sweep("SADA", coefficients=["corrected", "published"]),
    *sweep("EasyCachePaper", tau=[0.05, 0.1, 0.2]),
    *sweep("AdaptiveDiffusion"),
    # UNets
    *sweep("DeepCache", interval=[2, 3, 5]),
    *sweep("DeepCache", interval=[2, 3, 5], depth=0),
    *sweep("DeepCache", interval=3, forecast_order="0"),
    *sweep("FasterDiffusion"),
    *sweep("FasterDiffusion", key_steps="uniform", interval=[2, 3]),
    *sweep("FeatureInheritance"),
    # blocks of transformers
    *sweep("FirstBlockCache", threshold=[0.05, 0.1, 0.2, 0.4]),
    *sweep("FirstBlockCache", threshold=0.1, forecast_order=0),
    *sweep("DBCache", threshold=[0.08, 0.2], Fn=[1, 2]),
    *sweep("TeaCache", threshold=[0.1, 0.2, 0.4]),
    *sweep("MagCache"),
    *sweep("MagCache", threshold=0.12, K=4),
    *sweep("TaylorSeer", interval=[2, 3, 5]),
    *sweep("TaylorSeer", interval=3, order=1),
    *sweep("DeltaDiT", interval=[2, 3]),
    # layers and tokens
    *sweep("FORA", interval=[2, 3], order=[0, 1]),
    *sweep("PAB"),
    *sweep("TokenCache"),
    *sweep("ToDo"),
    *sweep("ATEDM"),
    # guidance
    *sweep("GuidanceCache", interval=[2, 3, 5]),
    *sweep("GuidanceCache", interval=3, policy="reuse"),
    *sweep("AdaptiveGuidance"),
    *sweep("AdaptiveGuidance", policy="reuse"),
    *sweep("FasterCFG"),
    *sweep("GuidanceWindow"),
    # several
    *together(sweep("DeepCache", interval=2), sweep("GuidanceCache", interval=3)),
    *together(sweep("TaylorSeer", interval=2), sweep("GuidanceCache", interval=3)),
    *together(sweep("StepForecast", tol=0.02), sweep("GuidanceCache", interval=3)),
]

COST = [
    *sweep("DeepCache", interval=[2, 3, 5], warmup=1),
    *sweep("DeepCache", interval=3, depth=0, warmup=1),
    *sweep("FasterDiffusion", key_steps="uniform", interval=2),
    *sweep("FasterDiffusion"),
    *sweep("FasterDiffusion", parallel_batch=8),
    *sweep("StepForecast", mode="interval", interval=2),
    *sweep("FirstBlockCache", threshold=0.4),
    *sweep("DBCache", threshold=0.4),
    *sweep("TeaCache", threshold=0.4),
    *sweep("TaylorSeer", interval=3),
    *sweep("DeltaDiT", interval=3),
    *sweep("FORA", interval=3),
    *sweep("PAB"),
    *sweep("TokenCache"),
    *sweep("ToDo"),
    *sweep("ATEDM"),
    *sweep("GuidanceCache", interval=3),
]


def usable(rows: Iterable[Candidate], classes: Mapping[str, type]) -> tuple[list[Candidate], dict[str, str]]:
    """The candidates that can be made, and for the labels of the others why not."""
    found, refused = [], {}
    for row in dict.fromkeys(rows):
        try:
            row.make(classes)
        except LookupError as error:
            refused[row.method] = str(error)
        except (TypeError, ValueError) as error:
            refused[row.label] = str(error)
        else:
            found.append(row)
    return found, refused
