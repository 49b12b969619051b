"""Step Forecast: whole network calls forecast from the derivative's past, where that costs least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method import param
from .accelerator import Plan, Run
from .declared import END, START, TAIL, WARMUP
from .derivative import DerivativeSession, WholeCalls, mean_square
from .forecast import Gain, Weights, bounded, chebyshev, lagrange, taylor
from .skipping import Planned, Policy, Spaced, Verified

MODES = ("verify", "budget", "interval", "growing", "schedule")
FORECASTS = ("polynomial", "taylor", "chebyshev")


@dataclass(frozen=True)
class StepForecast(WholeCalls):
    """Leaves out whole network calls where the sampler's next direction can be forecast well enough, and forecasts it there.

    For every model, with samplers that add no noise, from about ten steps on. What is forecast is d = (x - D) / sigma, the
    derivative that such samplers integrate, over the half log-SNR lambda of their times:

        d^(lambda) = d_0 + gamma (P(lambda) - d_0),     P the polynomial of degree ``order`` through the newest d's.

    Every full call shows which gamma in [0, 1] would have been best for each picture; gamma is the mean of these (older ones count
    half) and of ``gain`` (counting twice). ``verify`` decides where. A full call also shows how wrong its own forecast would have
    been, e = |d^ - d| / (|x| |lambda - lambda_0|), of the worst picture of the batch; e, times what it grew by since the full
    call before, is taken for the next calls. A forecast at t, for the step to t', costs

        e |lambda - lambda_0| (t - t'),

    an error of the state in parts of it; calls are forecast until the sum since the last full one would reach ``tol``, at most one
    more than in the gap before. This reads two numbers per picture back from the device in every full call; the other modes none.

    ``budget`` computes the share ``share`` of all steps: half of these at once at the beginning, where the picture is decided,
    the rest evenly. ``interval`` computes one call in ``interval``, ``growing`` makes the interval longer by ``flex`` each time,
    ``schedule`` says it for every step. budget and schedule count steps, the others calls of the network.

    Measured on the demo networks, 4 pictures, CFG 4, dpmpp_2m, RMS distance to the same run without it; in brackets as many
    plain steps instead, and ComfyUI's LazyCache. UNet, 20 steps: 13 calls 0.008 (0.030, 0.12), 11 calls 0.013, budget 0.5 0.018
    (0.051); 30 steps: 14 calls 0.011 (0.022 at 15), 10 calls 0.026 (0.054). DiT, 20 steps: 12 calls 0.014 (0.077 at 13),
    9 calls 0.030 (0.092 at 10); 30 steps: 14 calls 0.015 (0.080 at 15). Below half the calls the gain over fewer steps
    shrinks, to 1.3 to 2 times at a third. At CFG 7.5 (UNet 12 calls 0.036, ten steps 0.074; DiT 12 calls 0.026, ten steps 0.38)
    and with heun and uni_pc it is alike. Without guidance (CFG 1) the problem is easy for a multistep sampler, and it loses on the
    UNet (10 calls 0.022, ten steps 0.011) and gains little on the DiT: take fewer steps there.

    What did not help: order 2 (7 to 10 times worse: networks are rougher than their ODE), whole lines (1.5 to 2 times worse on
    networks, best on exact denoisers; hence the measured gamma), repeating, forecasts of D, other coordinates than lambda, the mean
    instead of the worst picture, and paying back the error of earlier forecasts in the next full call (multistep samplers spread
    it over their history). Nothing protects the other modes from a sampler that adds noise without its name saying so.

    Presets: TaylorSeer-lite is interval 5, taylor, order 2, gain 1, adapt off, coordinate step. Spectrum is growing, chebyshev,
    order 4, gain 1, adapt off, warmup 5. SpeCa's sample-wise check is verify; CacheDiT's skipping is interval, order 0.

    Off: with samplers that add noise, that compare calls (adaptive), or that read the unconditional prediction (CFG++). Functions
    after guidance are not run in a call that is left out; their effect at full calls is forecast with the rest. Restarts and
    churn begin anew. ``tol`` 0, ``interval`` 1 or ``share`` 1 gives exactly the unaccelerated result.

    Source: ours; the parts are known. Liu et al. (2025), arXiv:2503.06923 (forecasts); Liu et al. (2025), arXiv:2509.11628 (SpeCa);
    Han et al. (2026), arXiv:2603.01623 (Chebyshev, growing intervals).
    """

    id: ClassVar[str] = "StepForecast"
    title: ClassVar[str] = "Step Forecast"
    paper: ClassVar[str] = "Ours, after Liu et al. (2025), arXiv:2503.06923"

    mode: str = param(
        "verify",
        "How calls to leave out are chosen: by their measured error; a fixed share of the steps; one in so many; ever fewer; "
        "or as written in schedule.",
        options=MODES,
    )
    tol: float = param(
        0.05, "How far the picture may stray between two full calls, for verify; more is faster.",
        min=0.0, max=1.0, step=0.001,
    )  # fmt: skip
    share: float = param(0.5, "The share of the steps that is computed, for budget.", min=0.05, max=1.0, step=0.01)
    interval: int = param(
        2, "One call in this many is computed, for interval; the first gap of growing.", min=1, max=20
    )
    order: int = param(1, "Degree of the forecast; 0 repeats the last value. Higher helps only very smooth networks.",
                       min=0, max=6, advanced=True)  # fmt: skip
    gain: float = param(
        0.6,
        "How far to follow the forecast at first; less is safer, 0 repeats the last value.",
        min=0.0,
        max=1.0,
        step=0.05,
        advanced=True,
    )
    adapt: bool = param(
        True, "Measure on the way how far to follow the forecast; off: gain stays as it is.", advanced=True
    )
    forecast: str = param(
        "polynomial", "The kind of forecast. taylor and chebyshev are there to compare with TaylorSeer and Spectrum.",
        options=FORECASTS, advanced=True,
    )  # fmt: skip
    max_skip: int = param(4, "The most calls left out in a row, for verify.", min=1, max=20, advanced=True)
    flex: float = param(0.75, "How much longer each gap is than the one before, for growing.", min=0.0, max=10.0, step=0.05,
                        advanced=True)  # fmt: skip
    schedule: str = param(
        "",
        "For schedule: 1 for a step to compute, 0 to forecast, such as 1110101001; steps beyond it are computed.",
        advanced=True,
    )
    domain: str = param(
        "d", "What is forecast: the derivative d or the clean picture x0.", options=("d", "x0"), advanced=True
    )
    coordinate: str = param(
        "log-snr",
        "Along what it is forecast: the log-SNR or the number of the step.",
        options=("log-snr", "step"),
        advanced=True,
    )
    start_percent: float = START()
    end_percent: float = END()
    warmup: int = WARMUP()
    tail: int = TAIL()

    def __post_init__(self):
        super().__post_init__()
        if set(self.schedule) - set("01, "):
            raise ValueError(
                f"Step Forecast: schedule = {self.schedule!r} may hold only 1 and 0 (and commas and spaces)."
            )
        if self.mode == "schedule" and not self.full_steps(1):
            raise ValueError(
                "Step Forecast: the schedule's first step must be 1: there is nothing to forecast from before it."
            )

    @property
    def percents(self) -> tuple[float, float]:
        return self.start_percent, self.end_percent

    def full_steps(self, steps: int) -> set[int]:
        """The steps that ``schedule`` or ``budget`` computes."""
        if self.mode == "schedule":
            marks = [c for c in self.schedule if c in "01"]
            return {i for i in range(steps) if i >= len(marks) or marks[i] == "1"}
        wanted = min(steps, max(round(self.share * steps), self.warmup + self.tail, 1))
        first = max(self.warmup, (wanted + 1) // 2)
        rest = wanted - first - self.tail
        gap = (steps - self.tail - first + 1) / (rest + 1) if rest >= 0 else math.inf
        evenly = {round(first - 1 + gap * (k + 1)) for k in range(rest)}
        return {*range(first), *evenly, *range(steps - self.tail, steps)}

    def weights(self, run: Run) -> Weights:
        """The forecast of a run."""
        kinds = {
            "polynomial": lambda: lagrange(self.order),
            "taylor": lambda: taylor(self.order),
            "chebyshev": lambda: chebyshev(self.order, self.ends(run)),
        }
        return kinds[self.forecast]()

    def ends(self, run: Run) -> tuple[float, float]:
        """The coordinates of the first and the last call of a run with one per step."""
        if self.coordinate == "step":
            return 0.0, run.steps - 1.0
        return run.coordinate(run.times[0]), run.coordinate(run.times[-2])

    def start(self, run: Run) -> StepForecastSession:
        return StepForecastSession(self, run)


class StepForecastSession(DerivativeSession):
    """Asks its policy before every call, and tells it after every full one what a forecast would have been worth."""

    def __init__(self, settings: StepForecast, run: Run):
        super().__init__(
            run, anchors=20 if settings.forecast == "chebyshev" else settings.order + 1, domain=settings.domain
        )
        self.settings = settings
        if settings.mode == "verify":
            self.policy: Policy = Verified(settings.tol, settings.max_skip)
        elif settings.mode in ("interval", "growing"):
            self.policy = Spaced(
                settings.interval, settings.flex if settings.mode == "growing" else 0.0, settings.warmup
            )
        else:
            self.policy = Planned(settings.full_steps(run.steps))
        self.gain = Gain(settings.gain, settings.adapt)
        self.weights = settings.weights(run) if run.steps else lagrange(0)

    def coordinate(self, t: float) -> float:
        if self.settings.coordinate == "log-snr":
            return super().coordinate(t)
        times, i = self.tracker.times, min(self.position.step, max(self.tracker.steps - 1, 0))
        return i + (times[i] - t) / (times[i] - times[i + 1])

    def plan_at(self, t: float) -> Plan:
        if not self.age or self.guarded_now(self.settings.warmup, self.settings.tail) or self.policy.full(self, t):
            return Plan.FULL
        return Plan.SKIP

    def answer(self, x: torch.Tensor, t: float) -> torch.Tensor | None:
        seen = self.foreseen(x, t, self.weights)
        if seen is None:
            return None
        self.skipped += 1
        return self.denoised(x, t, self.value_of(*seen))

    def value_of(self, newest: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Part of the step from the newest value; none for samples where it would grow beyond reason."""
        return bounded(newest + self.gain.scale(step), newest)

    def learn(self, x: torch.Tensor, t: float, x0: torch.Tensor) -> None:
        value, seen = self.value(x, t, x0), self.foreseen(x, t, self.weights)
        if seen is not None and self.policy.learns:
            off = self.value_of(*seen) - value
            wrong, size = mean_square(off if self.domain == "d" else off / t, x)
            errors = [(e / max(s, 1e-20)) ** 0.5 for e, s in zip(wrong, size, strict=True)]
            # max() would pass over a NaN that does not come first.
            self.policy.learn(math.nan if any(map(math.isnan, errors)) else max(errors), self.distance(t))
        if seen is not None and self.store.has(self.key(x), 2):
            self.gain.learn(seen[1], value - seen[0])
        super().learn(x, t, x0)

    def distance(self, t: float) -> float:
        """From the last full call to t, at least half a step: two calls at one time differ too."""
        i = min(max(self.position.step, 1), max(self.tracker.steps - 1, 1))
        a, b = (self.run.coordinate(v) for v in self.tracker.times[i - 1 : i + 1])
        return max(abs(self.run.coordinate(t) - self.run.coordinate(self.latest)), 0.5 * abs(a - b))

    def ending(self) -> float:
        """The end of the step that the current call is in."""
        return self.tracker.times[self.position.step + 1]

    def flush(self) -> None:
        super().flush()
        self.policy.forget()
        self.gain.clear()
