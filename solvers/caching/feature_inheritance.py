"""Feature inheritance: parts of a UNet, large or small, take over what they gave in an earlier step.

Zhu, Wang, Pan, Wan, Zhang, Huang (2024), A-SDM, arXiv:2406.00210, the part that needs no training. It inherits at three levels:
whole blocks, layers in a block, units in a layer. Let f be what is inherited and k the last call in which it was computed:

    block:  output_t = output_k                        of a whole block
    layer:  output_t = skip(input_t) + f_k,            f = output - skip(input), of a ResBlock or a transformer
    unit:   input_t + f_k,                             f = attention or feed-forward inside a transformer
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method import param
from .accelerator import Accelerator, Plan, Run, Session
from .declared import CACHE_DEVICE, CACHE_MB, END, START, TAIL, WARMUP, place, room
from .store import BranchStore
from .tracker import Position

LEVELS: dict[str, tuple[str, ...]] = {
    "blocks": ("block",),
    "layers": ("resnet", "transformer"),
    "resnets": ("resnet",),
    "transformers": ("transformer",),
    "units": ("attn1", "attn2", "ff"),
    "self_attention": ("attn1",),
    "cross_attention": ("attn2",),
    "feed_forward": ("ff",),
}
"""What each choice of ``inherit`` makes inherit, by kind."""


@dataclass(frozen=True)
class FeatureInheritance(Accelerator):
    """Lets blocks, layers or single attentions of a UNet take over their result of an earlier step.

    For SD 1.x, SD 2.x, SDXL and other UNets. ``interval`` 1 gives exactly the unaccelerated result. Calls are counted, not
    steps. Inheriting whole blocks is DeepCache without forecast, ``fresh`` being its depth + 1; layers and units save less
    and are computed on the fresh input around them.

    On this pack's demo UNet (25 steps of dpmpp_2m, Karras, interval 2) the median relative error against the uncached
    picture was 0.012 for blocks, worth 18.7 calls, 0.012 for layers, worth 20.0, 0.010 for units, worth 22.9; 18 and 20
    plain steps had 0.006 and 0.003. With Euler layers had 0.013, 20 plain steps 0.009. So fewer steps are better there,
    and DeepCache is. ``mode`` "in turn" evens out the time that calls take, at two to five times the error.

    Only the paper's summary was at hand: the three levels are its own, and so is taking over from an adjacent step; which
    parts inherit, and the two modes, are choices of this pack. Its claim: 40 % faster.

    Units of attention are computed where another pack patches what goes into or comes out of attention (token merging);
    what another pack replaces (IP-Adapter) is not called and cannot inherit.
    """

    id: ClassVar[str] = "FeatureInheritance"
    title: ClassVar[str] = "Feature Inheritance"
    paper: ClassVar[str] = "Zhu, Wang, Pan et al. (2024), arXiv:2406.00210"
    site: ClassVar[str] = "modules"

    inherit: str = param(
        "layers",
        "What inherits: whole blocks; layers (ResBlocks, transformers or both); units inside the transformers "
        "(self-attention, cross-attention, feed-forward or all three).",
        options=tuple(LEVELS),
    )
    interval: int = param(2, "Every part is computed in one call of this many; 1 switches it off.", min=1, max=20)
    fresh: int = param(
        2,
        "Blocks at either end of the UNet that are always computed: more is slower and closer to the full result.",
        min=1,
        max=30,
    )
    mode: str = param(
        "together",
        "together: all parts are computed in the same calls. in turn: every call computes some and inherits the others; "
        "further off.",
        options=("together", "in turn"),
        advanced=True,
    )
    start_percent: float = START()
    end_percent: float = END()
    warmup: int = WARMUP()
    tail: int = TAIL()
    max_cache_mb: int = CACHE_MB()
    cache_device: str = CACHE_DEVICE()

    @property
    def percents(self) -> tuple[float, float]:
        return self.start_percent, self.end_percent

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the parts that inherit."""
        return LEVELS[self.inherit]

    def start(self, run: Run) -> InheritanceSession:
        return InheritanceSession(self, run)


class InheritanceSession(Session):
    """A part with number i is computed in calls with ``(phase + i) % interval == 0``; together, i counts as 0 for all.

    The phase is 0 in the last call of the warm-up. What is older than ``interval`` calls belongs to a branch that had no part in
    the calls since, and is not used.
    """

    def __init__(self, settings: FeatureInheritance, run: Run):
        super().__init__(run)
        self.settings = settings
        self.store = BranchStore(1, room(settings.max_cache_mb), place(settings.cache_device))
        self.recent: deque[float] = deque(maxlen=settings.interval)
        self.phase = -1

    def decide(self, t: float, position: Position) -> Plan:
        settings = self.settings
        warming = max(settings.warmup - 1, 0)
        if settings.interval == 1 or not self.active(t) or self.guarded(position, warming, settings.tail):
            self.flush()
            return Plan.PLAIN
        self.phase += 1
        self.recent.append(self.run.coordinate(t))
        self.store.forget(self.recent[0])
        everything = settings.mode == "together" and self.phase % settings.interval == 0
        return Plan.FULL if everything else Plan.PARTIAL

    def inherits(self, part: int) -> bool:
        """Whether part number ``part`` takes over its result in this call, if it is kept."""
        offset = part if self.settings.mode == "in turn" else 0
        return (self.phase + offset) % self.settings.interval != 0

    def kept(self, part: int, branches: Sequence[Hashable], device: torch.device) -> torch.Tensor | None:
        """What ``part`` inherits in this call; None where it is to be computed."""
        if not self.inherits(part):
            return None
        return self.store.get([(branch, part) for branch in branches], device)

    def keep(self, part: int, branches: Sequence[Hashable], value: torch.Tensor) -> None:
        self.store.put([(branch, part) for branch in branches], value, self.run.coordinate(self.t))

    def flush(self) -> None:
        self.phase = -1
        self.recent.clear()
        super().flush()
