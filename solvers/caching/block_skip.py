"""BlockSkip: leave out the parts of a network that matter least, as measured on that very network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..artifact import Artifact
from ..method import param, part
from .accelerator import Accelerator, Plan, Run, Session, Windowed
from .declared import END, START

KIND = "block-sensitivity"
PROBED = (0.2, 0.5, 0.8)
"""At which part of a run each of a unit's scores is measured."""


@dataclass(frozen=True)
class Unit:
    """A part of a network that can be left out, its input passing on as if it were not there.

    name: path of the module. whole: a transformer block, else a layer whose output is added to its input. work: its
    share of the network's. scores: what its absence changes, at several noise levels.
    """

    name: str
    whole: bool
    work: float
    scores: tuple[float, ...]

    @property
    def score(self) -> float:
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True)
class LeavesOut(Accelerator):
    """Abstract: leaves units of the network out; its sessions (``LeavingOut``) say which ones in each call.

    ``calibration`` is the file that knows the units; ``made``: what is in it, and the node that makes it.
    """

    site: ClassVar[str] = "tuning"
    made: ClassVar[tuple[str, str]]

    calibration: Artifact | None = None

    @abstractmethod
    def left_out(self) -> list[Unit]:
        """All units that any call leaves out; ValueError where a file is needed for that."""


class LeavingOut(Session):
    """Abstract: ``left_out`` holds the names of the units that the current call leaves out."""

    left_out: Collection[str] = ()


def units_in(rows: Any) -> list[Unit]:
    """Of a file's rows; TypeError, KeyError or ValueError where they are damaged."""
    return [Unit(r["name"], bool(r["whole"]), float(r["work"]), tuple(map(float, r["scores"]))) for r in rows]


@dataclass(frozen=True)
class BlockSkip(LeavesOut):
    """Leaves out the layers or blocks of a network that change its result least, in the middle part of sampling.

    Needs scores made once for the model with Block Sensitivity. For UNets (attention and feed-forward layers of their
    transformers) and diffusion transformers (whole blocks). Keeps nothing between calls, so it works with every sampler
    and with few steps; a cache saves more for the same loss where it can be used.

    A unit's score is the relative squared change of the prediction without it, |d - d_u|^2 / |d|^2 with d = (x - D) /
    sigma, the mean over three noise levels of a run. Units are left out in the order of score per work, as long as they
    come to no more than ``budget`` of the network's work together; that the sum of scores predicts the change of all is
    the additivity that LAPTOP-Diff relies on. It holds for a few units, not for many: the original methods train
    afterwards, this one does not, so keep the budget small. First and last blocks, and what changes the number of
    channels, always stay.

    Measured as FORA was. Demo UNet: leaving out 4 % of the work costs 0.019 from the whole network's picture (0.055
    from the converged one instead of 0.047; 19 plain steps about 0.05), 8 % 0.137. Demo DiT: one block of five costs
    0.245, far more than fewer steps. So do not take it where steps can be fewer or a cache works.

    ``budget`` 0 gives exactly the plain result. Parts that a cache on the same model takes care of (FORA, block
    caches), and layers that another pack replaces, are not left out.

    Raises ValueError without scores, or for those of another network.

    Source: after Zhang et al. (2024), arXiv:2404.11098 (LAPTOP-Diff) and Castells et al. (2024), arXiv:2404.11936
    (LD-Pruner).
    """

    id: ClassVar[str] = "BlockSkip"
    title: ClassVar[str] = "Block Skip"
    paper: ClassVar[str] = "after Zhang et al. (2024), arXiv:2404.11098"
    made: ClassVar[tuple[str, str]] = ("scores", "Block Sensitivity")

    calibration: Artifact | None = part(KIND, "Scores that Block Sensitivity saved for this model.", None)  # noqa: RUF009
    budget: float = param(
        0.05, "The share of the network's work to leave out at most; 0 switches it off.", min=0.0, max=0.9, step=0.01
    )
    start_percent: float = START(0.1)
    end_percent: float = END(0.9)

    def __post_init__(self):
        super().__post_init__()
        if self.calibration is not None:
            self.units()  # refuses a bad file

    @property
    def percents(self) -> tuple[float, float]:
        return self.start_percent, self.end_percent

    def off(self, run: Run) -> str | None:
        return None

    def units(self) -> list[Unit]:
        """Everything that has a score."""
        if self.calibration is None:
            return []
        if self.calibration.kind != KIND:
            raise ValueError(f"{self.title}: the file holds {self.calibration.kind}, but {KIND} is needed here.")
        try:
            return units_in(self.calibration.table["units"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{self.title}: the file of scores is damaged; run Block Sensitivity again.") from None

    def left_out(self) -> list[Unit]:
        if self.calibration is None and self.budget > 0.0:
            raise ValueError(f"{self.title}: choose scores; Block Sensitivity makes them, once for each model.")
        return choose(self.units(), self.budget)

    def start(self, run: Run) -> BlockSkipSession:
        return BlockSkipSession(self, run)


class BlockSkipSession(LeavingOut, Windowed):
    def __init__(self, settings: BlockSkip, run: Run):
        super().__init__(run)
        self.left_out = frozenset(unit.name for unit in settings.left_out())

    def decide(self, t, position):
        return super().decide(t, position) if self.left_out else Plan.PLAIN


def choose(units: Sequence[Unit], budget: float) -> list[Unit]:
    """Units of small score per work that come to at most ``budget`` together."""
    chosen, spent = [], 0.0
    for unit in sorted(units, key=lambda u: u.score / max(u.work, 1e-12)):
        if unit.work > 0.0 and spent + unit.work <= budget + 1e-9:
            chosen.append(unit)
            spent += unit.work
    return chosen


def change(x: torch.Tensor, denoised: torch.Tensor, without: torch.Tensor) -> float:
    """|d - d_u|^2 / |d|^2: noise level and parametrisation drop out. Not for use in a step: it waits for the device."""
    return float((denoised.float() - without.float()).square().sum() / (x.float() - denoised.float()).square().sum())
