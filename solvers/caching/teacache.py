"""TeaCache: add up how much the first block's input changes, and compute again when the sum is large."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from ..artifact import Artifact
from ..method import param, part
from .accelerator import Plan, Run
from .block_cache import BlockCache, BlockSession, change
from .declared import CACHE_DEVICE, CACHE_MB, END, START, TAIL, WARMUP
from .profile import KIND, BlockProfile, expected
from .tracker import Position

IDENTITY = "identity"
PUBLISHED: dict[str, tuple[str, tuple[float, ...]]] = {
    "Flux": ("Flux", (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)),
    "Flux Kontext": ("Flux", (-1046.55119, 312.563399, -16.9500694, 0.410995971, 0.0374537863)),
    "HunyuanVideo": ("HunyuanVideo", (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896)),
    "LTX-Video": ("LTX-Video", (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326)),
    "Lumina 2": (
        "Lumina 2 and Z-Image",
        (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344),
    ),
    "Wan 2.1 1.3B": ("Wan", (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664)),
    "Wan 2.1 14B": ("Wan", (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525)),
    "Wan 2.1 I2V 480p": ("Wan", (257151.496, -35422.9917, 1402.86849, -13.5890334, 0.132517977)),
    "Wan 2.1 I2V 720p": ("Wan", (8107.05460, 2133.93892, -372.934672, 16.6203073, -0.0417769401)),
}
"""The authors' polynomials, highest power first, with the family whose first block they were fitted on."""


@dataclass(frozen=True)
class TeaCache(BlockCache):
    """Skips all transformer blocks until their input has changed enough since they were computed.

    For DiTs with 20 steps or more. Best with a file of Calibrate Block Caches for this model; without one, or for one of the
    published models, choose ``polynomial``.

    Let m be the first block's modulated input: its first norm, scaled and shifted by the time embedding (the projected time
    embedding itself for Wan; the blocks' input where it is not known). At every call

        A <- A + max(0, p(mean |m - m'| / mean |m'|)),    m' of the call before;

    the call hits while A < threshold, else everything is computed and A = 0. A hit gives h_n = h_0 + R, with R of the last full
    call. p is a polynomial of degree 4. Published ones were fitted to the change of the network's output, calibrated ones to
    that of R, which is what gets old: p(...) = mean |R - R'| / mean |R'|. Thresholds of different p are not comparable: with
    a published one take the authors' (Flux 0.25 to 0.6, Wan 0.15 to 0.3, others 0.1 to 0.3).

    On the demo DiT (30 steps, CFG 4) with p = identity it is 0.012 off the full run at 0.44 of the work and 0.024 off at 0.31,
    where 13 and 9 plain Euler steps are 0.07 and 0.12 off. Calibration brought nothing there (0.025 at 0.37 of the work
    either way), as m changes in proportion to R. It fails where the time embedding hardly moves and the picture does: the
    sum then sees too little, and ``max_consecutive`` has to hold it.

    Works with every sampler but adaptive ones, ControlNet, LoRA, areas and context windows. Not with torch.compile, nor with
    other caches of blocks or layers. One decision for the conditional and the unconditional prediction.

    Raises ValueError for a published polynomial on another family, and for another model's file.

    Source: Liu et al. (2024), arXiv:2411.19108; polynomials from the authors' program, which reuses R as it is.
    """

    id: ClassVar[str] = "TeaCache"
    title: ClassVar[str] = "TeaCache"
    paper: ClassVar[str] = "Liu et al. (2024), arXiv:2411.19108"

    threshold: float = param(
        0.15, "How much change may add up before the blocks are computed again: more is faster. 0 switches it off.",
        min=0.0, max=5.0, step=0.01,
    )  # fmt: skip
    calibration: Artifact | None = part(  # noqa: RUF009
        KIND, "A file of Calibrate Block Caches for this model, in models/quickstep; none: the polynomial below.", None
    )
    polynomial: str = param(
        IDENTITY, "From the change of the input to that of the output, where there is no file: as it is, or the authors' for "
        "one of their models.", options=(IDENTITY, *PUBLISHED),
    )  # fmt: skip
    max_consecutive: int = param(6, "The most calls in a row that may be skipped.", min=1, max=100, advanced=True)
    forecast_order: int = param(
        1, "How the skipped blocks are continued from past calls: 0 reuses, 1 extrapolates a line, 2 a parabola.",
        min=0, max=2, advanced=True,
    )  # fmt: skip
    start_percent: float = START()
    end_percent: float = END()
    warmup: int = WARMUP()
    tail: int = TAIL()
    max_cache_mb: int = CACHE_MB()
    cache_device: str = CACHE_DEVICE()

    def __post_init__(self):
        super().__post_init__()
        if self.profile is not None and self.polynomial != IDENTITY:
            raise ValueError("TeaCache: give a polynomial or a calibration file, not both.")

    @property
    def profile(self) -> BlockProfile | None:
        return None if self.calibration is None else BlockProfile.of(self.calibration)

    @property
    def most(self) -> int:
        return self.max_consecutive if self.threshold > 0 else 0

    @property
    def degree(self) -> int:
        return self.forecast_order

    @property
    def made_for(self) -> str | None:
        return None if self.polynomial == IDENTITY else PUBLISHED[self.polynomial][0]

    def estimate(self) -> Callable[[float], float]:
        """From the change of the modulated input to the change to expect of it."""
        if self.profile is not None:
            return self.profile.change
        return partial(expected, (1.0, 0.0) if self.polynomial == IDENTITY else PUBLISHED[self.polynomial][1])

    def start(self, run: Run) -> TeaCacheSession:
        return TeaCacheSession(self, run)


class TeaCacheSession(BlockSession):
    """One sum for all branches of a call, moved by the first pass in it. One device sync per call, for the comparison."""

    watches: ClassVar[str] = "modulated"

    def __init__(self, settings: TeaCache, run: Run):
        super().__init__(settings, run)
        self.threshold, self.expected = settings.threshold, settings.estimate()
        self.sum = 0.0

    def decide(self, t: float, position: Position) -> Plan:
        plan = super().decide(t, position)
        if plan is not Plan.PARTIAL:
            self.sum = 0.0
        return plan

    def judge(self, keys: Sequence[Hashable], watched: torch.Tensor) -> bool:
        last = self.store.get(_before(keys), watched.device)
        if last is None:
            return False
        self.sum += self.expected(float(change(watched, last)))
        if self.sum < self.threshold:
            return True
        self.sum = 0.0
        return False

    def hit(self, keys: Sequence[Hashable], watched: torch.Tensor, device: torch.device) -> torch.Tensor | None:
        found = super().hit(keys, watched, device)
        if found is not None:
            self.store.put(_before(keys), watched)
        return found

    def keep(self, keys: Sequence[Hashable], residual: torch.Tensor, watched: torch.Tensor) -> None:
        super().keep(keys, residual, watched)
        self.store.put(_before(keys), watched)

    def flush(self) -> None:
        self.sum = 0.0
        super().flush()


def _before(keys: Sequence[Hashable]) -> list[Hashable]:
    return [("before", key) for key in keys]
