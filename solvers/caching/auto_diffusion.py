"""AutoDiffusion's result carried out: in each step of a run, its own set of network parts is left out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

from ..artifact import Artifact
from ..method import part
from .accelerator import Plan, Run
from .block_skip import LeavesOut, LeavingOut, Unit, units_in

KIND = "step-skips"
"""Of files: ``sigmas``, n + 1 of them, ``left_out``, a list of names of units for each step, and ``units`` with their work."""

TOLERANCE = 1e-4
"""Relative: sigmas pass through float32."""


class Skips(NamedTuple):
    """What is left out in the step that begins at each sigma but the last."""

    sigmas: tuple[float, ...]
    left_out: tuple[frozenset[str], ...]
    units: tuple[Unit, ...]

    @property
    def kept(self) -> float:
        """The mean share of the network's work that a run costs."""
        work = {unit.name: unit.work for unit in self.units}
        return 1.0 - sum(work[name] for names in self.left_out for name in names) / len(self.left_out)


@dataclass(frozen=True)
class AutoDiffusion(LeavesOut):
    """Leaves out, in each step of sampling, the parts of the network that Search AutoDiffusion found to matter least there.

    Use it with the sigmas of the same file (Search AutoDiffusion gives both; later, Found Schedule) and with the sampler it was
    searched with. A call at one of the file's sigmas leaves out what the file says for that step; a call at any other sigma is
    computed whole, and the report of the run says so. So a second pass, or a run of other steps, is not spoilt, but saves
    nothing.

    Without a file the result is exactly the plain one. Nothing is kept between calls. Parts that a cache on the same model
    takes care of (FORA, block caches), and layers that another pack replaces, are not left out.

    Compare with fewer whole steps before you use it: on both demo networks these were much nearer to the whole network's picture
    at the same work (DiT, 80 % of the work of 8 steps: 0.180 with parts left out, 0.104 with 6 whole steps; UNet, 90 %: 0.118,
    and 0.051 with 7). The report of the search says which it is for your model.

    Raises ValueError for files of another kind and those of another network.

    Source: Li et al. (2023), arXiv:2309.10438 (AutoDiffusion).
    """

    id: ClassVar[str] = "AutoDiffusion"
    title: ClassVar[str] = "AutoDiffusion, found plan"
    paper: ClassVar[str] = "Li et al. (2023), arXiv:2309.10438"
    made: ClassVar[tuple[str, str]] = ("sets of parts", "Search AutoDiffusion")

    calibration: Artifact | None = part(KIND, "A file of Search AutoDiffusion; none: the model as it is.", None)  # noqa: RUF009

    def __post_init__(self):
        super().__post_init__()
        self.skips()  # refuses a bad file

    @property
    def percents(self) -> tuple[float, float]:
        return 0.0, 1.0

    def skips(self) -> Skips | None:
        """What the file holds; None without one."""
        return None if self.calibration is None else skips_of(self.calibration)

    def left_out(self) -> list[Unit]:
        found = self.skips()
        if found is None:
            return []
        used = frozenset().union(*found.left_out)
        return [unit for unit in found.units if unit.name in used]

    def start(self, run: Run) -> AutoDiffusionSession:
        return AutoDiffusionSession(self, run)


class AutoDiffusionSession(LeavingOut):
    def __init__(self, settings: AutoDiffusion, run: Run):
        super().__init__(run)
        self.skips = settings.skips()

    def decide(self, t, position):
        self.left_out = frozenset()
        if self.skips is None:
            return Plan.PLAIN
        starts = self.skips.sigmas[:-1]
        i = min(range(len(starts)), key=lambda i: abs(starts[i] - t))
        if abs(starts[i] - t) <= TOLERANCE * starts[i]:
            self.left_out = self.skips.left_out[i]
        elif not self.notes:
            self.notes.append(
                f"AutoDiffusion: calls at other sigmas than those of its file, such as {t:.4g}, were computed whole; connect the "
                "sigmas of the same file"
            )
        return Plan.FULL if self.left_out else Plan.PLAIN


def skips_of(found: Artifact) -> Skips:
    """What a file holds; ValueError, in one sentence, where it is another kind or damaged."""
    title = AutoDiffusion.title
    if found.kind != KIND:
        raise ValueError(f"{title}: the file holds {found.kind}, but {KIND} is needed here.")
    try:
        sigmas, rows = tuple(map(float, found.table["sigmas"])), found.table["left_out"]
        units = tuple(units_in(found.table["units"]))
        left_out = tuple(frozenset(row) for row in rows if isinstance(row, list))
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{title}: the file is damaged; run Search AutoDiffusion again.") from None
    known = {unit.name for unit in units}
    falling = all(a > b for a, b in pairwise(sigmas)) and sigmas[-1:] >= (0.0,)
    if not rows or len(left_out) != len(sigmas) - 1 or not falling or any(names - known for names in left_out):
        raise ValueError(f"{title}: the file's sigmas, sets of parts and units do not belong together.")
    return Skips(sigmas, left_out, units)


def table_of(skips: Skips) -> dict[str, Any]:
    """For a file; without ``sigmas``."""
    order = [unit.name for unit in skips.units]
    return {
        "left_out": [sorted(names, key=order.index) for names in skips.left_out],
        "units": [{"name": u.name, "whole": u.whole, "work": u.work, "scores": list(u.scores)} for u in skips.units],
        "kept": skips.kept,
    }
