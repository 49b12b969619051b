"""Several models in one sampling run: which of them computes a step, and how a state is handed from one to another.

A sampler only ever asks for the denoised picture D(x, sigma), so every step may ask another model, of another size, family or
parametrization, as long as all of them mean the same latents. Samplers that keep a history keep it across a switch.

Model A sees x_A = alpha_A z_A + c_A sigma_A eps (c: its noise scale). If B's latents are z_B = a z_A + b, B sees the same
picture with the same noise at

    rho = a c_A sigma_A / alpha_A       (noise-to-signal ratio in B's units),
    sigma_B = sigma with c_B sigma_B / alpha_B = rho,
    x_B = (c_B sigma_B) / (c_A sigma_A) x_A + alpha_B b,
    D_A = (D_B - b) / a.

From variance exploding to flow that is sigma_B = sigma_A / (c + sigma_A) and x_B = c x_A / (c + sigma_A). Where rho lies
above all B was trained on, B is given its largest sigma instead: the noise still fits, the picture in it is fainter than
it should be, by as much as rho was too large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar

import torch

from .method import Method, param
from .process import ForwardProcess

ROUNDING = 1e-4  # relative; sigmas pass through float32
Rule = Callable[[Sequence[float], Callable[[float], float]], list[int]]
"""(times, time at a fraction of sampling) -> the number of the model that computes each step."""


def by_steps(fractions: Sequence[float]) -> Rule:
    """Model k computes the k-th of the given shares of the steps, the last model what is left."""
    ends = list(accumulate(fractions))

    def assign(times: Sequence[float], time_at: Callable[[float], float]) -> list[int]:
        steps = len(times) - 1
        first = [math.floor(end * steps + 0.5 + 1e-9) for end in ends]
        return [sum(step >= begin for begin in first) for step in range(steps)]

    return assign


def by_percent(fractions: Sequence[float]) -> Rule:
    """The same of the model's own time: where sampling is cut does not depend on schedule and steps."""
    ends = list(accumulate(fractions))

    def assign(times: Sequence[float], time_at: Callable[[float], float]) -> list[int]:
        # time_at(0) may be less than the largest time (flow models whose noise was added to); 0 and 1 mean none and all.
        cuts = [math.inf if end <= 0.0 else -math.inf if end >= 1.0 - 1e-9 else time_at(end) for end in ends]
        return [sum(t <= cut * (1 + ROUNDING) for cut in cuts) for t in times[:-1]]

    return assign


def by_pattern(pattern: str, models: int) -> Rule:
    """Letter i of the pattern, which is repeated, names the model of step i: A is the first."""
    letters = "".join(pattern.split()).upper()
    last = chr(ord("A") + models - 1)
    if not letters or not all("A" <= letter <= last for letter in letters):
        raise ValueError(f"{Alternate.title}: pattern = {pattern!r}; with {models} models it is made of A to {last}.")
    turns = [ord(letter) - ord("A") for letter in letters]
    return lambda times, time_at: [turns[step % len(turns)] for step in range(len(times) - 1)]


class Stages:
    """Which model answers at time t.

    The time decides, not a count of calls: solvers call any number of times per step, and a stage at t_{i+1} belongs
    to step i + 1. Beyond the ends of the schedule (churn) the first and last step go on.
    """

    def __init__(self, times: Sequence[float], models: Sequence[int]):
        if len(models) and any(s < t for s, t in pairwise(times)):
            raise ValueError(f"{TStitch.title} needs sigmas that go down; these go up somewhere.")
        self.models = list(models)
        # Half a gap at most, or neighbours in a dense schedule could not be told apart.
        earlier = [math.inf, *times]
        self._starts = [t + min(ROUNDING * t, (s - t) / 2) for s, t in zip(earlier, times[: len(models)], strict=False)]

    def at(self, t: float) -> int:
        """The model's number."""
        return self.models[max(sum(t <= start for start in self._starts) - 1, 0)]


@dataclass(frozen=True, eq=False)
class Passage:
    """From the latents and times of model ``a`` to those of ``b``, whose latents are ``scale z + shift``.

    shift: broadcasts against a batch of latents; None is 0.
    """

    a: ForwardProcess
    b: ForwardProcess
    scale: float = 1.0
    shift: torch.Tensor | None = None

    @property
    def top(self) -> float:
        """The largest rho that ``b`` is given; infinite if it was trained on all that ``a`` was."""
        most = _rho(self.b, self.b.t_max)
        return most if most < self.scale * _rho(self.a, self.a.t_max) * (1 - ROUNDING) else math.inf

    @property
    def same(self) -> bool:
        """Whether both call the same state by the same numbers."""
        units = type(self.a) is type(self.b) and self.a.noise_scale == self.b.noise_scale
        return units and self.scale == 1.0 and self.shift is None

    def clamped(self, t: float) -> bool:
        """Whether ``b`` has to look at time t through its largest sigma."""
        return self.scale * _rho(self.a, t) > self.top

    def time(self, t: float) -> float:
        """b's time at a's time t."""
        if self.same and not self.clamped(t):
            return t
        return float(self.b.t_of_rho(min(self.scale * _rho(self.a, t), self.top) / self.b.noise_scale))

    def there(self, x: torch.Tensor, sigma: torch.Tensor, times: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """State and sigmas as ``b`` knows them; ``times``: the sigmas, one for each row."""
        if self.same and not any(map(self.clamped, times)):
            return x, sigma
        ours = [self.time(t) for t in times]
        gains = [
            self.b.noise_scale * s / (self.a.noise_scale * t) if t > 0.0 else self.scale
            for s, t in zip(ours, times, strict=True)
        ]
        moved = x * _rows(gains, x)
        if self.shift is not None:
            moved = moved + _rows([self.b.alpha(s) for s in ours], x) * self.shift.to(x)
        return moved, sigma.new_tensor(ours).view(sigma.shape)

    def bring(self, x0: torch.Tensor) -> torch.Tensor:
        """A picture of a's latents as one of b's."""
        x0 = x0 if self.scale == 1.0 else x0 * self.scale
        return x0 if self.shift is None else x0 + self.shift.to(x0)

    def back(self, x0: torch.Tensor) -> torch.Tensor:
        """A picture of b's latents as one of a's."""
        x0 = x0 if self.shift is None else x0 - self.shift.to(x0)
        return x0 if self.scale == 1.0 else x0 / self.scale


def _rho(process: ForwardProcess, t: float) -> float:
    alpha = process.alpha(t)
    return process.noise_scale * t / alpha if alpha > 0.0 else math.inf


def _rows(values: Sequence[float], x: torch.Tensor) -> torch.Tensor:
    return x.new_tensor(values).view(-1, *[1] * (x.ndim - 1))


FRACTION = "Share of sampling that the first model computes, from pure noise on; 0 is none, 1 all."
BY = "What the shares are of: the steps of this run, or the model's own time, whatever the schedule."
MEMORY = (
    "resident: all models are loaded at once and stay. swap: each is loaded when its turn comes. auto: resident if there is "
    "room for all."
)
PLACES = ("auto", "resident", "swap")


@dataclass(frozen=True)
class TStitch(Method):
    """Lets a small model compute the first, noisy part of sampling and a large one the rest.

    Early steps decide about the layout, on which small and large models trained on the same pictures agree. Make a guider
    for each model, with its own prompt and scale, and connect them in the order of use: the small one first, the large
    one last. Up to four. The schedule is made for the last one.

    Time is r times the small model's share plus 1 - r: with r = 0.4 and a small model at a tenth of the cost, 0.64 of the
    large model's alone. The models may differ in size, family and kind (eps, v, flow) as long as they share one latent space;
    sigma and state are converted to equal signal-to-noise ratio. What a model was not trained for (the first sigmas of a
    flow model are too large for Stable Diffusion) it is asked at its largest sigma.

    Share 0 and 1 give exactly the results of one model. Samplers that keep a history keep it across the switch; CFG++,
    masks, ControlNets and accelerators work, each for the model whose guider or model has them. An accelerator that counts
    steps sees only the calls of its own model. Schedules must go down. Models with different channels or VAEs are refused. One
    checkpoint with and without a LoRA is loaded twice, because the two would have to share its weights.

    Memory for weights: resident, of all models together (our UNet with our small one: 23.3 MB); swap, of the largest (18.6).

    Samples differ from the large model's: another early model is another layout. How small a model may be, only pictures
    tell.

    Source: Pan et al. (2024), arXiv:2402.14167.
    """

    id: ClassVar[str] = "TStitch"
    title: ClassVar[str] = "T-Stitch"
    paper: ClassVar[str] = "Pan et al. (2024), arXiv:2402.14167"

    fraction: float = param(0.4, FRACTION, min=0.0, max=1.0, step=0.01)
    by: str = param("steps", BY, options=("steps", "percent"))
    memory: str = param("auto", MEMORY, options=PLACES, advanced=True)
    fraction_2: float = param(
        0.2, "Share of the second of three or four models.", min=0.0, max=1.0, step=0.01, advanced=True
    )
    fraction_3: float = param(0.2, "Share of the third of four models.", min=0.0, max=1.0, step=0.01, advanced=True)

    def rule(self, models: int) -> Rule:
        """Which of the models computes which step."""
        fractions = (self.fraction, self.fraction_2, self.fraction_3)[: models - 1]
        if sum(fractions) > 1.0 + 1e-6:
            named = " + ".join(f"{fraction:g}" for fraction in fractions)
            raise ValueError(
                f"{self.title}: the shares {named} are more than 1; the last model gets what is left of 1."
            )
        return by_steps(fractions) if self.by == "steps" else by_percent(fractions)


@dataclass(frozen=True)
class TStitchModel(Method):
    """A model whose first, noisy part of sampling is computed by a smaller one: for the plain KSampler.

    The same as T-Stitch for two models that read the same prompts: the sampler's positive, negative, scale and ControlNets
    serve both. Models that read other text encoders are refused; give each a guider of its own in T-Stitch.

    The model comes out measured: Report says how many calls each of the two answered. Accelerators go on ``model``, before
    or after this node, or on ``small_model`` before it; each works in the calls of its own model.

    Source: Pan et al. (2024), arXiv:2402.14167.
    """

    id: ClassVar[str] = "TStitchModel"
    title: ClassVar[str] = "T-Stitch Model"
    paper: ClassVar[str] = TStitch.paper

    fraction: float = param(0.4, FRACTION, min=0.0, max=1.0, step=0.01)
    by: str = param("steps", BY, options=("steps", "percent"))
    memory: str = param("auto", MEMORY, options=PLACES, advanced=True)

    def rule(self, models: int) -> Rule:
        """Which of the models computes which step."""
        return TStitch(self.fraction, self.by).rule(models)


@dataclass(frozen=True)
class Alternate(Method):
    """Lets two or more models take turns step by step, as a pattern of letters says.

    AAB: two steps by the first guider's model, one by the second's, and again. A pattern as long as the steps is a whole
    model schedule, written by hand. The schedule of sigmas is made for the last model. Everything else is as in T-Stitch;
    with memory ``swap`` models would be loaded at nearly every step, so ``auto`` should find room for all.

    A multistep sampler averages over predictions of different models: use models that agree.

    Source: Liu et al. (2023), arXiv:2306.08860, who search such schedules; the pattern is ours.
    """

    id: ClassVar[str] = "Alternate"
    title: ClassVar[str] = "Alternate Models"
    paper: ClassVar[str] = "Liu et al. (2023), arXiv:2306.08860"

    pattern: str = param("AAB", "Which model computes each step, A the first; repeated to the end of the run.")
    memory: str = param("auto", MEMORY, options=PLACES, advanced=True)

    def rule(self, models: int) -> Rule:
        """Which of the models computes which step."""
        return by_pattern(self.pattern, models)
