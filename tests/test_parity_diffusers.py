"""Parity with Hugging Face diffusers' schedulers, an independent implementation of the same papers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP, SDEDPMSolverPP
from quickstep_under_test.solvers.process import VarianceExploding
from quickstep_under_test.solvers.solver import Problem, sample

VE = VarianceExploding()
DENOISE = GaussianMixture.random().denoiser(VE)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def start(sigma):
    return sigma * torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def alpha_vp(sigma):
    """diffusers keeps x in the variance-preserving frame: x_vp = alpha_vp x_ve."""
    return (1 + sigma**2) ** -0.5


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("correction", ["midpoint", "taylor"])
@pytest.mark.parametrize("lower_order_final", ["always", "never"])
def test_dpm_solver_pp(order, correction, lower_order_final):
    theirs = DPMSolverMultistepScheduler(
        **BETAS,
        prediction_type="sample",
        algorithm_type="dpmsolver++",
        solver_order=order,
        solver_type={"midpoint": "midpoint", "taylor": "heun"}[correction],
        lower_order_final=lower_order_final == "always",
        final_sigmas_type="zero",
        use_karras_sigmas=True,
    )
    steps = 9  # diffusers falls back to lower order below 15 steps, if at all
    theirs.set_timesteps(steps)
    sigmas = theirs.sigmas.double().tolist()
    x = start(sigmas[0])
    mine = DPMSolverPP(order=order, correction=correction, third_order="reference", lower_order_final=lower_order_final)
    got = sample(Problem(DENOISE, VE), mine, x, sigmas)

    v = x * alpha_vp(sigmas[0])
    for t, sigma in zip(theirs.timesteps, sigmas, strict=False):
        v = theirs.step(DENOISE(v / alpha_vp(sigma), sigma), t, v).prev_sample
    assert (got - v).abs().max() < 2e-5  # diffusers computes its coefficients in float32


@pytest.mark.parametrize("correction", ["midpoint", "taylor"])
def test_sde_dpm_solver_pp(correction):
    theirs = DPMSolverMultistepScheduler(
        **BETAS,
        prediction_type="sample",
        algorithm_type="sde-dpmsolver++",
        solver_order=2,
        solver_type={"midpoint": "midpoint", "taylor": "heun"}[correction],
        lower_order_final=False,
        final_sigmas_type="zero",
        use_karras_sigmas=True,
    )
    theirs.set_timesteps(9)
    sigmas = theirs.sigmas.double().tolist()
    x = start(sigmas[0])
    g = torch.Generator().manual_seed(5)
    noises = [torch.randn(x.shape, generator=g, dtype=x.dtype) for _ in sigmas]

    drawn = iter(noises)
    mine = SDEDPMSolverPP(order=2, eta=1.0, correction=correction, lower_order_final="never")
    got = sample(Problem(DENOISE, VE, lambda s, t: next(drawn)), mine, x, sigmas)

    v = x * alpha_vp(sigmas[0])
    for i, (t, sigma) in enumerate(zip(theirs.timesteps, sigmas, strict=False)):
        v = theirs.step(DENOISE(v / alpha_vp(sigma), sigma), t, v, variance_noise=noises[i]).prev_sample
    assert (got - v).abs().max() < 2e-5


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim(eta):
    theirs = DDIMScheduler(
        **BETAS, prediction_type="sample", clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    theirs.set_timesteps(10)
    bars = theirs.alphas_cumprod.double()[theirs.timesteps].tolist()
    sigmas = [((1 - a) / a) ** 0.5 for a in bars]
    x = start(sigmas[0])
    g = torch.Generator().manual_seed(5)
    noises = [torch.randn(x.shape, generator=g, dtype=x.dtype) for _ in sigmas]

    drawn = iter(noises)
    got = sample(Problem(DENOISE, VE, lambda s, t: next(drawn)), DDIM(eta=eta), x, [*sigmas, 0.0])

    v = x * alpha_vp(sigmas[0])
    for i, (t, sigma) in enumerate(zip(theirs.timesteps, sigmas, strict=True)):
        v = theirs.step(DENOISE(v / alpha_vp(sigma), sigma), t, v, eta=eta, variance_noise=noises[i]).prev_sample
    assert (got - v).abs().max() < 2e-5
