"""Translation between ComfyUI's vocabulary and ours: model_sampling -> ForwardProcess, Solver -> SAMPLER."""

from __future__ import annotations

import comfy.model_sampling
import comfy.samplers
import comfy.utils
import torch

from ..solvers.noise import SOURCES
from ..solvers.process import ForwardProcess, RectifiedFlow, VarianceExploding
from ..solvers.solver import Problem, Solver, check_times, solve


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


def sampler(solver: Solver) -> comfy.samplers.KSAMPLER:
    """A SAMPLER that runs ``solver``. It keeps no state between runs: ComfyUI caches and shares it."""

    @torch.no_grad()
    def sample_quickstep(model, x, sigmas, extra_args=None, callback=None, disable=None):
        extra_args = extra_args or {}
        times = distinct(sigmas.tolist())
        process = process_from(model.inner_model.model_patcher.get_model_object("model_sampling"))
        check_times(times, process)

        def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
            return model(x, x.new_full((x.shape[0],), t), **extra_args)

        if solver.draws is None or len(times) < 2:
            problem = Problem(denoise, process)
        else:
            problem = Problem(denoise, process, SOURCES[solver.draws](x, extra_args.get("seed") or 0, times))
        steps = solve(problem, solver, x, times)
        for i in comfy.utils.model_trange(len(times) - 1, disable=disable):
            step = next(steps)
            if callback is not None:
                callback({"x": x, "i": i, "sigma": times[i], "sigma_hat": times[i], "denoised": step.x0})
            x = step.x
        return x

    sample_quickstep.__name__ = f"sample_{solver.id}"  # what reports and comparisons call it
    return comfy.samplers.KSAMPLER(sample_quickstep)


def distinct(times: list[float]) -> list[float]:
    """``times`` without immediate repetitions: a step of length zero is no step."""
    return [t for i, t in enumerate(times) if i == 0 or t != times[i - 1]]
