"""Parity with Hugging Face diffusers' ScoreSdeVeScheduler, an independent predictor-corrector sampler."""

from __future__ import annotations

import pytest
import torch
from diffusers import ScoreSdeVeScheduler
from diffusers.schedulers import scheduling_sde_ve
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.process import VarianceExploding
from quickstep_under_test.solvers.score_sde import ScoreSDE
from quickstep_under_test.solvers.solver import Problem, sample

VE = VarianceExploding()
DENOISE = GaussianMixture.random(d=64).denoiser(VE)


@pytest.mark.parametrize("n_steps", [0, 1, 2])
def test_predictor_corrector(n_steps, monkeypatch):
    theirs = ScoreSdeVeScheduler(snr=0.17, sigma_min=0.03, sigma_max=14.6)
    theirs.set_timesteps(12)
    theirs.set_sigmas(12)
    sigmas = [*theirs.discrete_sigmas.double().flip(0).tolist(), 0.0]
    g = torch.Generator().manual_seed(5)
    x = sigmas[0] * torch.randn(1, 1, 8, 8, generator=g, dtype=torch.float64)  # they average norms over the batch
    noises = [torch.randn(x.shape, generator=g, dtype=x.dtype) for _ in range(12 * (n_steps + 1))]

    drawn = iter(noises)
    solver = ScoreSDE("reverse_diffusion", n_steps=n_steps, snr=0.17)
    got = sample(Problem(DENOISE, VE, lambda s, t: next(drawn)), solver, x, sigmas)

    again = iter(noises)
    monkeypatch.setattr(scheduling_sde_ve, "randn_tensor", lambda *args, **kwargs: next(again))
    y = x
    for t, sigma in zip(theirs.timesteps, sigmas, strict=False):
        for _ in range(n_steps):
            y = theirs.step_correct((DENOISE(y, sigma) - y) / sigma**2, y).prev_sample
        made = theirs.step_pred((DENOISE(y, sigma) - y) / sigma**2, t, y)
        y = made.prev_sample
    assert (got - made.prev_sample_mean).abs().max() < 2e-5  # diffusers computes its coefficients in float32
