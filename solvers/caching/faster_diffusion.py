"""Encoder propagation: the encoder of a UNet changes slowly between steps, so keep what it gave and run the decoder alone.

Li, Hu, Khan, Li, Yang, Wang, Cheng, Yang (2023), arXiv:2312.09608. In key steps the whole network runs, and the skips E_i and the
middle block's output h, ControlNet's residuals included, are kept. In the others only the decoder does,

    eps(x_t, t, c)  ->  decoder(h, E_0 ... E_{n-1}, t, c),

with the time embedding of t. x_t has no part in it, so the steps between two key steps do not wait for each other.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method import param
from .accelerator import Accelerator, Plan, Run, Session
from .declared import CACHE_DEVICE, CACHE_MB, END, START, place, room
from .store import BranchStore
from .tracker import Position

PAPER = (0, 1, 2, 3, 5, 10, 15, 25, 35)
"""The authors' key steps, of 50."""
FEW = 10
REACH = 10.0
"""The most by which injected noise is enlarged to survive the step after it."""


@dataclass(frozen=True)
class FasterDiffusion(Accelerator):
    """Runs the encoder of a UNet only in key steps, and the decoder alone in the others.

    For SD 1.x, SD 2.x, SDXL and other UNets, with samplers that add no noise. A step without encoder costs the
    decoder's share of the network, 0.67 for SD 1.5 and 0.57 for SDXL, and no ControlNet: those are not run at all. So
    the paper's key steps, 9 of 50, save 27 % of SD 1.5's arithmetic and 36 % of SDXL's; the paper's 41 % of the time
    (1.8 times as fast) need a GPU that several decoder passes in one call (``parallel_batch``) use better than one.

    The sampler's x has no part in a step without encoder, so nothing corrects an error before the next key step. On this
    pack's demo UNet (25 steps, Karras) the median relative error against the uncached picture was 0.029 with dpmpp_2m and
    0.037 with Euler for interval 2, and 0.15 for the paper's key steps; 20 plain steps, no more work than either, had
    0.003 and 0.009. So for the picture take fewer steps or DeepCache; take this one where a ControlNet is expensive.

    ``parallel_batch`` gives the same result as one after the other, up to rounding. It wants a sampler that calls the
    network once per step and at the given times, room for the larger batch, and no patches inside the network, which
    may depend on the time; else the passes are made one by one. ``interval`` 1 gives exactly the unaccelerated result.
    With several calls per step (Heun, DPM-Solver-2) all calls in a key step are full.

    ``noise_injection`` a returns texture that is lost: after a step from t to s it adds a n_0 to x, n_0 being the noise
    of the start and x in variance preserving units, if s is below the fraction ``inject_below`` of the model's times:

        x_s  +=  a (alpha_s^2 + sigma_s^2)^{1/2} n_0.

    The sampler's x is out of reach, so the prediction is moved by that much over 1 - sigma_s / sigma_t, which a step of
    first order turns into it; with multistep samplers that is approximate. Nothing is added in the last step, nor with
    several calls per step.
    """

    id: ClassVar[str] = "FasterDiffusion"
    title: ClassVar[str] = "Faster Diffusion"
    paper: ClassVar[str] = "Li, Hu, Khan et al. (2023), arXiv:2312.09608"
    site: ClassVar[str] = "unet"

    key_steps: str = param(
        "auto",
        "Which steps run the whole network. auto: the paper's, spread to the number of steps; uniform: one in "
        "interval; list: those in steps.",
        options=("auto", "uniform", "list"),
    )
    interval: int = param(
        2, "For uniform: one step in this many runs the whole network; 1 switches it off.", min=1, max=20
    )
    steps: str = param("0, 1, 2, 3, 5, 10, 15, 25, 35", "For list: the key steps, counted from 0.")
    parallel_batch: int = param(
        1,
        "The most steps without encoder that are computed in one network call. More is faster on a GPU that one "
        "picture does not fill, and takes more memory.",
        min=1,
        max=16,
    )
    noise_injection: float = param(
        0.0,
        "How much of the noise of the start is added again in late steps, to bring back texture. The paper takes 0.003; 0 is off.",
        min=0.0,
        max=0.1,
        step=0.001,
    )
    inject_below: float = param(
        0.5,
        "Noise is added where the model's time is below this fraction of its range.",
        min=0.0,
        max=1.0,
        step=0.01,
        advanced=True,
    )
    start_percent: float = START()
    end_percent: float = END()
    max_cache_mb: int = CACHE_MB()
    cache_device: str = CACHE_DEVICE()

    def __post_init__(self):
        super().__post_init__()
        if re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", self.steps) is None:
            raise ValueError(f"{self.title}: steps = {self.steps!r} must be numbers of steps such as '0, 1, 2, 5, 10'.")

    @property
    def percents(self) -> tuple[float, float]:
        return self.start_percent, self.end_percent

    def keys(self, steps: int) -> frozenset[int]:
        """The key steps of a run; the first one always is."""
        if self.key_steps == "uniform":
            return frozenset(range(0, steps, self.interval))
        if self.key_steps == "list":
            return frozenset({0, *map(int, self.steps.split(","))})
        return frozenset(i * steps // 50 for i in PAPER)

    def off(self, run: Run) -> str | None:
        if run.stochastic:
            return "the sampler adds noise, which steps without encoder would never see"
        if self.key_steps == "auto" and run.steps < FEW:
            return (
                f"with fewer than {FEW} steps the encoder changes too much in each; choose key steps to have it anyway"
            )
        return super().off(run)

    def start(self, run: Run) -> FasterDiffusionSession:
        return FasterDiffusionSession(self, run)


class FasterDiffusionSession(Session):
    """All calls in a key step are full, and the next one where the sampler never made them (what answers whole calls came
    first, or the window began later). All others are made by the decoder alone.
    """

    def __init__(self, settings: FasterDiffusion, run: Run):
        super().__init__(run)
        self.settings = settings
        self.store = BranchStore(1, room(settings.max_cache_mb), place(settings.cache_device))
        self.keys = settings.keys(self.tracker.steps)
        self.key = -1
        """The key step that what is kept stands for."""
        self.position = Position(0, 0, False, False)
        self.single = True
        """Whether the sampler has made one call per step so far, at the time of the schedule."""
        self.noise: torch.Tensor | None = None
        """n_0, set by the host where it is asked for."""
        self.below = settings.inject_below if run.process is None else float(run.process.t_of_u(settings.inject_below))
        self.bare = self.missed = False

    def decide(self, t: float, position: Position) -> Plan:
        self.position = position
        self.single = self.single and position.on_grid and position.call == position.step
        step = position.step
        if not self.active(t) or len(self.keys) >= self.tracker.steps:
            self.flush()
            return Plan.PLAIN
        key = max(k for k in self.keys if k <= step)
        if step != key == self.key:
            return Plan.PARTIAL
        self.flush()
        self.key = key
        return Plan.PLAIN if step + 1 in self.keys else Plan.FULL

    def flush(self) -> None:
        self.key = -1
        super().flush()

    def keep(self, branches: Sequence[Hashable], part: int, value: torch.Tensor) -> None:
        """Keep h (part 0) or a skip (1 ...) of this call."""
        self.store.put([(branch, part) for branch in branches], value)

    def kept(self, branches: Sequence[Hashable], parts: int, device: torch.device) -> list[torch.Tensor] | None:
        """h and the skips, ``parts`` of them altogether; None unless all are kept."""
        found = []
        for part in range(parts):
            value = self.store.get([(branch, part) for branch in branches], device)
            if value is None:
                return None
            found.append(value)
        return found

    def ahead(self) -> list[int]:
        """The steps whose decoder passes can be made now: this one and those up to the next key step."""
        step, times = self.position.step, self.tracker.times
        limit = self.settings.parallel_batch if self.single else 1
        found = [step]
        for i in range(step + 1, min(step + limit, self.tracker.steps)):
            if i in self.keys or not self.active(times[i]) or times[i] >= times[i - 1]:
                break
            found.append(i)
        return found

    def foresee(self, branches: Sequence[Hashable], step: int, output: torch.Tensor) -> None:
        """Keep the network's output for a later step."""
        self.store.put([(branch, "step", step) for branch in branches], output)

    def foreseen(self, branches: Sequence[Hashable], device: torch.device) -> torch.Tensor | None:
        """The network's output for this call, if it was computed with an earlier one."""
        if not self.position.on_grid:
            return None
        return self.store.get([(branch, "step", self.position.step) for branch in branches], device)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """The body runs without ControlNet; ``missed`` says that it needed one and has to be run again, with."""
        seen = Counter(self._seen)
        self.bare, self.missed = True, False
        try:
            yield
        finally:
            self.bare = False
            if self.missed:
                self._seen = seen

    def inject(self, x0: torch.Tensor) -> torch.Tensor:
        """The prediction from which a first-order step ends where noise was added to x after it."""
        a, t = self.settings.noise_injection, self.t
        s = self.tracker.times[self.position.step + 1] if self.tracker.steps else 0.0
        fits = self.noise is not None and self.noise.shape == x0.shape
        if a == 0.0 or not fits or not self.single or not 0.0 < s < min(t, self.below):
            return x0
        alpha = 1.0 if self.run.process is None else self.run.process.alpha(s)
        self.noise = self.noise.to(x0)
        return x0 + self.noise * (a * math.hypot(alpha, s) * min(1.0 / (1.0 - s / t), REACH))

    def close(self) -> None:
        self.noise = None
        super().close()
