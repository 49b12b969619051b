"""FORA: outputs of all attention and feed-forward layers are computed every N calls and reused in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..method import param
from .accelerator import Run
from .declared import CACHE_DEVICE, CACHE_MB, END, START, TAIL, WARMUP
from .layers import Broadcast, LayerReuse


@dataclass(frozen=True)
class FORA(LayerReuse):
    """Computes attention and feed-forward layers only every few calls and reuses their outputs in between.

    For diffusion transformers (SD3, Flux, Chroma, HunyuanVideo, Qwen-Image, Lumina 2, Z-Image, Wan, LTX-Video,
    Cosmos-Predict2, PixArt) and, for their transformer layers only, UNets. Where DeepCache or a block cache works on
    the model, those are cheaper in memory: this one keeps two or three tensors per block.

    With F_l the output of layer l before its gate g_l(t), a full call keeps F_l, and the next ``interval`` - 1 calls
    use

    h <- h + g_l(t) F_l(kept),

    with fresh gates, modulations, embeddings, patches and ControlNet residuals. ``order`` 1 puts a straight line in
    half log-SNR through the last two outputs instead. In UNets all convolutions stay.

    ``interval`` 1 gives exactly the unaccelerated result. Calls are counted, not steps, so solvers of several calls
    per step keep one call in ``interval`` full. After noise is added in the middle of a run the next call is full.
    Works with every guider, ControlNet and LoRA; layers that another pack replaces altogether (perturbed attention,
    IP-Adapter on its cross-attention), and a UNet's attention that another pack patches (token merging), are computed,
    not reused. Not together with other caches inside the network, token reduction or torch.compile.

    Measured with DPM-Solver++(2M), 20 steps, CFG 4, as RMS distance to the converged picture. Demo DiT: 0.142 uncached;
    at interval 2, the work of 12.6 calls, 0.142 (12 plain steps 0.190); at 3, 9.9 calls, 0.149 (10 steps 0.204); at 5,
    8 calls, 0.176 (8 steps 0.235). Demo UNet, whose transformers are an eighth of the work: 0.078 at interval 3 for
    17.9 calls, where 18 plain steps have 0.053, so take DeepCache there. The straight line was worse than reuse on both
    (0.192 on the DiT at 3).

    Source: Selvaraju et al. (2024), arXiv:2407.01425. The straight line is ours, after TaylorSeer (arXiv:2503.06923).
    """

    id: ClassVar[str] = "FORA"
    title: ClassVar[str] = "FORA"
    paper: ClassVar[str] = "Selvaraju et al. (2024), arXiv:2407.01425"
    site: ClassVar[str] = "modules"

    interval: int = param(3, "One call of the network in this many is full; 1 switches the cache off.", min=1, max=20)
    order: int = param(0, "0 reuses outputs as they are, 1 continues their trend in a straight line.", min=0, max=1)
    start_percent: float = START()
    end_percent: float = END()
    warmup: int = WARMUP()
    tail: int = TAIL()
    max_cache_mb: int = CACHE_MB()
    cache_device: str = CACHE_DEVICE()

    @property
    def percents(self) -> tuple[float, float]:
        return self.start_percent, self.end_percent

    def every(self, kind: str) -> int:
        return self.interval

    def start(self, run: Run) -> Broadcast:
        return Broadcast(self, run, self.order)
