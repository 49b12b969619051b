"""Pyramid attention broadcast: each kind of attention has its own interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..method import param
from .accelerator import Run
from .declared import CACHE_DEVICE, CACHE_MB, END, START, TAIL, WARMUP
from .layers import CROSS, FUSED, MLP, SELF, TEMPORAL, Broadcast, LayerReuse


@dataclass(frozen=True)
class PAB(LayerReuse):
    """Reuses attention outputs for some calls: spatial attention briefly, cross-attention longest.

    For video and image transformers (Wan, LTX-Video, Cosmos-Predict2, HunyuanVideo, Flux, SD3, Qwen-Image, Lumina 2
    ...) and UNets, in the middle part of sampling, where attention changes least. The more of the work is attention
    (long videos), the more it saves.

    Attention outputs, after the projection and before the gate, are computed in one of n calls and reused in the
    others; n is ``spatial`` for self-attention and for the joint attention of text and image, ``temporal`` for
    attention along frames only (SVD), ``cross`` for attention to the prompt, ``mlp`` for feed-forward layers. The
    paper's PAB246 is 2, 4, 6; PAB357 and PAB579 are faster. It broadcasts feed-forward outputs in chosen blocks only;
    ``mlp`` here is for all of them. ``order`` 1 continues the trend of the last two outputs in a straight line, which
    the paper does not.

    All intervals 1 give exactly the unaccelerated result. Works with and refuses what FORA does. Flux's single blocks
    have one projection for attention and feed-forward; with ``mlp`` 1 their attention alone is reused.

    Measured as FORA was: on the demo DiT, whose attention is a third of the work, the defaults save 11 % (17.7 calls,
    0.141 from the converged picture; 18 plain steps 0.146), which hardly repays the memory. On the demo UNet 3 %, 0.057
    (0.042 with ``order`` 1; 0.047 uncached). Long videos, where attention is most of the work, are what it is for; they
    were not measured.

    Source: Zhao et al. (2024), arXiv:2408.12588; windows as in VideoSys (t from 930 down to 100-450 of 1000).
    """

    id: ClassVar[str] = "PAB"
    title: ClassVar[str] = "Pyramid Attention Broadcast"
    paper: ClassVar[str] = "Zhao et al. (2024), arXiv:2408.12588"
    site: ClassVar[str] = "modules"

    spatial: int = param(2, "Self-attention is computed in one of this many calls; 1: always.", min=1, max=20)
    cross: int = param(6, "Attention to the prompt is computed in one of this many calls; 1: always.", min=1, max=20)
    temporal: int = param(
        4, "Attention along frames, where it is separate, is computed in one of this many calls.", min=1, max=20
    )
    mlp: int = param(1, "Feed-forward layers are computed in one of this many calls; 1: always.", min=1, max=20)
    order: int = param(0, "0 reuses outputs as they are, 1 continues their trend in a straight line.", min=0, max=1)
    start_percent: float = START(0.1)
    end_percent: float = END(0.85)
    warmup: int = WARMUP(2)
    tail: int = TAIL()
    max_cache_mb: int = CACHE_MB()
    cache_device: str = CACHE_DEVICE()

    @property
    def percents(self) -> tuple[float, float]:
        return self.start_percent, self.end_percent

    def every(self, kind: str) -> int:
        intervals = {SELF: self.spatial, CROSS: self.cross, TEMPORAL: self.temporal, MLP: self.mlp}
        return {**intervals, FUSED: min(self.spatial, self.mlp)}[kind]

    def start(self, run: Run) -> Broadcast:
        return Broadcast(self, run, self.order)
