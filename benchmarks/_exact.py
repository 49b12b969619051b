"""ComfyUI's own samplers on exactly solvable problems, without a network: shared by the benchmarks.

``ExactModel`` is what ComfyUI hands to a SAMPLER (a guider) around a known denoiser; it counts its calls. ``orders`` and
``bias`` measure a sampler function of ComfyUI with it, in float64. Whoever imports this makes ComfyUI and the pack
importable before (``_pack``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import comfy.model_sampling
import comfy.samplers
import torch
from quickstep.solvers.exact import GaussianMixture
from quickstep.solvers.process import ForwardProcess
from quickstep.solvers.verify import FLOW, VE, graded, measuring_range, start


class _Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    pass


class _Eps(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    pass


def model_sampling(flow: bool, shift: float = 1.0):
    """ComfyUI's sampling of a flow model, or that of SD 1.5."""
    sampling = _Flow() if flow else _Eps()
    if flow:
        sampling.set_parameters(shift=shift)
    return sampling


class ExactModel:
    """A guider whose prediction is ``negative + cfg (positive - negative)``, both known functions ``(x, t) -> x0``.

    With ``negative`` None, or cfg 1, it is ``positive``. ``calls`` counts predictions, ``seen`` the sigmas asked for.
    """

    def __init__(self, positive: Callable, sampling, negative: Callable | None = None, cfg: float = 1.0):
        self.positive, self.negative, self.cfg = positive, negative or positive, cfg
        self.seen: list[float] = []
        self.inner_model = SimpleNamespace(model_sampling=sampling)
        self.model_patcher = SimpleNamespace(get_model_object=lambda name: sampling, model=self.inner_model)

    @property
    def calls(self) -> int:
        return len(self.seen)

    def __call__(self, x, sigma, model_options=None, seed=None, **unused):
        times = [float(t) for t in sigma.reshape(-1)]
        t = times[0] if len(set(times)) == 1 else times
        self.seen.append(times[0])
        after = (model_options or {}).get("sampler_post_cfg_function", [])
        x64 = x.double()
        positive = self.positive(x64, t).to(x)
        negative = positive if self.cfg == 1.0 and not after else self.negative(x64, t).to(x)
        denoised = positive if self.cfg == 1.0 else negative + self.cfg * (positive - negative)
        for function in after:
            denoised = function(
                {"denoised": denoised, "uncond_denoised": negative, "cond_denoised": positive, "input": x}
            )
        return denoised

    def sample(self, sampler, noise, sigmas, seed: int = 0):
        """What ComfyUI's KSampler does from unit noise: scaling, the SAMPLER, scaling back."""
        extra = {"model_options": {}, "seed": seed}
        return sampler.sample(self, sigmas, extra, None, noise, torch.zeros_like(noise), None, disable_pbar=True)

    def run(self, function, x, times: Sequence[float] | torch.Tensor, seed: int = 0, **options):
        """A sampler function of ComfyUI from x at ``times[0]``; numbers become float64 sigmas."""
        sigmas = times if isinstance(times, torch.Tensor) else torch.tensor(list(times), dtype=torch.float64)
        model = comfy.samplers.KSamplerX0Inpaint(self, sigmas)
        extra = {"model_options": {}, "seed": seed, "denoise_mask": None}
        return function(model, x, sigmas, extra_args=extra, callback=None, disable=True, **options)


def moments(run: Callable[[torch.Tensor, Callable], torch.Tensor], mean: float, variance: float) -> tuple[float, float]:
    """Exact mean and variance of a run that is affine in its start and its noise, without Monte Carlo.

    run: ``(x, noise) -> result``, both of shape (rows, 1), rows independent; noise(s, t) is a unit increment of one
    Brownian path between two times, as core's Brownian tree gives it (disjoint intervals are independent).
    mean, variance: of the start.
    """
    asked: list[tuple[float, float]] = []

    def quiet(s, t):
        asked.append((float(s), float(t)))
        return torch.zeros(1, 1, dtype=torch.float64)

    run(torch.zeros(1, 1, dtype=torch.float64), quiet)
    edges = torch.tensor(sorted({t for interval in asked for t in interval}), dtype=torch.float64)
    low, high = edges[:-1], edges[1:]

    def one_at_a_time(s, t):
        """Row 2 + k: the path moves by its standard deviation between edges k and k + 1 only; rows 0 and 1: never."""
        s, t = float(s), float(t)
        moved = (high - low).sqrt() / math.sqrt(s - t) * ((low >= t) & (high <= s))
        return torch.cat([torch.zeros(2, dtype=torch.float64), moved])[:, None]

    x = torch.zeros(2 + len(low), 1, dtype=torch.float64)
    x[1] = 1.0
    result = run(x, one_at_a_time)[:, 0]
    offset, gain, effects = result[0], result[1] - result[0], result[2:] - result[0]
    return float(offset + gain * mean), float(gain**2 * variance + (effects**2).sum())


def independent(noise: Callable) -> Callable:
    """A noise source for plain random draws: each is independent, whatever its interval."""
    drawn = iter(range(1_000_000))

    def fresh(s=None, t=None):
        at = 2.0 * next(drawn)
        return noise(at + 1.0, at)

    return fresh


def graded_ends(process: ForwardProcess, t_max: float, t_min: float, n: int, levels: int = 12) -> list[float]:
    """``verify.graded`` with the last interval halved as well: for methods that lower their order at the end."""
    times = graded(process, t_max, t_min, n, levels)
    end = process.lam(t_min)
    h = (end - process.lam(t_max)) / n
    return [*times[:-1], *(process.t_of_lam(end - h * 2.0**-j) for j in range(1, levels + 1)), times[-1]]


def errors(function, process: ForwardProcess, steps: Sequence[int], **options) -> list[float]:
    """Largest error of a sampler function of ComfyUI on the Gaussian mixture, on graded grids."""
    t_max, t_min = measuring_range(process)
    data, x = GaussianMixture.random(), start(process, t_max)
    exact = data.solve_ode(process, x, t_max, t_min)
    model = ExactModel(data.denoiser(process), model_sampling(process is FLOW))
    found = (model.run(function, x, graded_ends(process, t_max, t_min, n), **options) for n in steps)
    return [(made - exact).abs().max().item() for made in found]


def orders(function, **options) -> dict[str, float]:
    """Measured order from 80 to 160 steps, VE and flow."""
    found = {name: errors(function, process, (80, 160), **options) for name, process in (("ve", VE), ("flow", FLOW))}
    return {name: math.log2(coarse / fine) for name, (coarse, fine) in found.items()}


def bias(function, process: ForwardProcess, n: int = 80, draws: bool = False, **options) -> dict[str, float]:
    """What is wrong with the moments of the result on data N(0.5, 0.4): ``mean`` as a difference, ``variance`` relative.

    draws: the function has no noise_sampler but calls ``torch.randn_like``.
    """
    mean, variance = 0.5, 0.4
    t_max, t_min = measuring_range(process)
    times = graded_ends(process, t_max, t_min, n)
    model = ExactModel(GaussianMixture.gaussian(mean, variance, d=1).denoiser(process), model_sampling(process is FLOW))

    def run(x: torch.Tensor, noise: Callable) -> torch.Tensor:
        if not draws:
            return model.run(function, x, times, noise_sampler=noise, **options)
        fresh, kept = independent(noise), torch.randn_like
        torch.randn_like = lambda like: fresh()
        try:
            return model.run(function, x, times, **options)
        finally:
            torch.randn_like = kept

    alpha, end = process.alpha(t_max), process.alpha(t_min)
    got_mean, got_variance = moments(run, alpha * mean, alpha**2 * variance + t_max**2)
    return {"mean": got_mean - end * mean, "variance": got_variance / (end**2 * variance + t_min**2) - 1.0}


def weak_order(function, process: ForwardProcess, **options) -> float:
    """Order at which the variance of the result converges, from 40 to 80 steps."""
    coarse, fine = (abs(bias(function, process, n, **options)["variance"]) for n in (40, 80))
    return math.log2(coarse / fine)


def constant(value: float = 2.0, flow: bool = False) -> ExactModel:
    """A model of one picture only, ``value`` everywhere: every consistent solver returns it exactly."""
    return ExactModel(lambda x, t: torch.full_like(x, value), model_sampling(flow))


def mixture(process: ForwardProcess = VE, cfg: float = 1.0) -> tuple[ExactModel, torch.Tensor]:
    """The standard mixture, and its start; with another cfg, guided from the mixture towards its first component."""
    data = GaussianMixture.random()
    part = GaussianMixture(torch.ones(1, dtype=torch.float64), data.m[:1], data.v[:1], data.Q[:1])
    full, sampling = data.denoiser(process), model_sampling(process is FLOW)
    model = ExactModel(full if cfg == 1.0 else part.denoiser(process), sampling, full, cfg)
    return model, start(process, measuring_range(process)[0])


def noise(seed: int = 0) -> torch.Tensor:
    """Unit noise for 16 pictures, float32."""
    return torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
