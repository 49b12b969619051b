"""Translation between ComfyUI's vocabulary and ours: model_sampling -> ForwardProcess, Solver -> SAMPLER."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import torch

from ..solvers.noise import SOURCES
from ..solvers.process import ForwardProcess, RectifiedFlow, VarianceExploding
from ..solvers.solver import Denoise, Problem, Solver, check_times, no_noise, solve
from ..solvers.transform import Transform, Transformed
from . import artifacts


def process_from(model_sampling) -> ForwardProcess:
    """The forward process of a ComfyUI ``model_sampling`` object.

    CONST models see ``(1 - sigma) x0 + sigma eps``; all others, COSMOS_RFLOW included, see ``x0 + sigma eps``.
    """
    flow = isinstance(model_sampling, comfy.model_sampling.CONST)
    kind = RectifiedFlow if flow else VarianceExploding
    sigmas = model_sampling.sigmas.detach().double().cpu().numpy()
    return kind(
        t_min=float(model_sampling.sigma_min),
        t_max=float(model_sampling.sigma_max),
        noise_scale=float(getattr(model_sampling, "noise_scale", 1.0)),  # ComfyUI >= 0.21.1, few models
        training_sigmas=sigmas[sigmas > 0.0],
    )


def process_of(model) -> ForwardProcess:
    """The forward process of a MODEL, sampling patches (shift, zero-terminal SNR, ...) included."""
    return process_from(model.get_model_object("model_sampling"))


def latent_in(model, latent: dict) -> torch.Tensor:
    """The samples of a LATENT in the units samplers see."""
    return model.model.process_latent_in(latent["samples"])


def empty_as_model_wants(model, latent: dict) -> dict:
    """The latent, an empty one resized to the model's channels and scale as ComfyUI's own samplers do."""
    latent = dict(latent)
    # Which of these an empty latent carries, and which the function takes, grew with ComfyUI's releases, together.
    names = ("downscale_ratio_spacial", "downscale_ratio_temporal")
    noted = {name: latent.pop(name) for name in names if name in latent}
    latent["samples"] = comfy.sample.fix_empty_latent_channels(model, latent["samples"], **noted)
    return latent


class Sampler(comfy.samplers.KSAMPLER):
    """A SAMPLER that runs ``solver``. It keeps no state between runs: ComfyUI caches and shares it."""

    def __init__(self, solver: Solver):
        super().__init__(_function(solver))
        self.solver = solver


sampler = Sampler


def solver_in(given, taker: str) -> Solver:
    """The solver of one of this pack's SAMPLERs; ``taker`` is the node that wants to build on it."""
    if not isinstance(given, Sampler):
        name = getattr(getattr(given, "sampler_function", None), "__name__", type(given).__name__)
        raise ValueError(
            f"{taker}: sampler is {name}, which is not one of Quickstep's; connect a Quickstep sampler node."
        )
    return given.solver


def transformed(given, transform: Transform):
    """A SAMPLER like ``given``, of this pack or any other, whose network is seen through ``transform``."""
    if isinstance(given, Sampler):
        return Sampler(Transformed(given.solver, transform))
    if not isinstance(given, comfy.samplers.KSAMPLER):
        raise ValueError(
            f"{transform.title}: sampler is a {type(given).__name__}, which has no step function to work on."
        )
    inner = given.sampler_function

    @torch.no_grad()
    def sample_transformed(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        problem = _problem(model, extra_args or {})
        times = distinct(sigmas.tolist())
        artifacts.warn(transform, problem.process, len(times) - 1, problem.cfg, tuple(x.shape[1:]))
        seen = _Seen(model, transform.around(problem, times))
        return inner(seen, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, **options)

    sample_transformed.__name__ = f"{getattr(inner, '__name__', 'sample')}_{transform.id}"
    return comfy.samplers.KSAMPLER(sample_transformed, given.extra_options, given.inpaint_options)


class _Seen:
    """ComfyUI's model as a sampler function sees it, with another denoiser in its place."""

    def __init__(self, model, denoise: Denoise):
        self._model, self._denoise = model, denoise

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, x, sigma, **unused):
        times = sigma.flatten().tolist()  # other packs' samplers know sigma on the device only: one sync per call
        return self._denoise(x, times[0] if len(set(times)) == 1 else times)


def _problem(model, extra_args: dict, noise=no_noise) -> Problem:
    """The problem ComfyUI poses to a sampler function."""
    process = process_from(model.inner_model.model_patcher.get_model_object("model_sampling"))

    def denoise(x: torch.Tensor, t: float | Sequence[float]) -> torch.Tensor:
        sigma = x.new_full((x.shape[0],), t) if isinstance(t, float) else x.new_tensor(t)
        return model(x, sigma, **extra_args)

    cfg = getattr(model.inner_model, "cfg", None)  # guiders with one scale have it
    return Problem(denoise, process, noise, extra_args.get("denoise_mask"), cfg)


def _function(solver: Solver):
    @torch.no_grad()
    def sample_quickstep(model, x, sigmas, extra_args=None, callback=None, disable=None):
        extra_args = extra_args or {}
        times = distinct(sigmas.tolist())
        problem = _problem(model, extra_args)
        check_times(times, problem.process)
        artifacts.warn(solver, problem.process, len(times) - 1, problem.cfg, tuple(x.shape[1:]))
        if solver.draws is not None and len(times) > 1:
            problem = replace(problem, noise=SOURCES[solver.draws](x, extra_args.get("seed") or 0, times))
        steps = solve(problem, solver, x, times)
        for i in comfy.utils.model_trange(len(times) - 1, disable=disable):
            step = next(steps)
            if callback is not None:
                callback({"x": x, "i": i, "sigma": times[i], "sigma_hat": times[i], "denoised": step.x0})
            x = step.x
        return x

    sample_quickstep.__name__ = f"sample_{solver.id}"  # what reports and comparisons call it
    return sample_quickstep


def distinct(times: list[float]) -> list[float]:
    """``times`` without immediate repetitions: a step of length zero is no step."""
    return [t for i, t in enumerate(times) if i == 0 or t != times[i - 1]]


def visitor(visit: Callable[[Problem, torch.Tensor], None]):
    """A SAMPLER that takes no step: it hands ``visit`` the problem ComfyUI poses and the noised start, and returns that.

    For what runs many solvers on one problem, such as calibrations.
    """

    @torch.no_grad()
    def sample_visit(model, x, sigmas, extra_args=None, callback=None, disable=None):
        visit(_problem(model, extra_args or {}), x)
        return x

    return comfy.samplers.KSAMPLER(sample_visit)
