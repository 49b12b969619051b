"""Transforms around ComfyUI's own samplers and around ours, in real sampling runs; core's Epsilon Scaling node."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.k_diffusion import sampling as core
from comfy_extras.nodes_eps import EpsilonScaling as CoreEpsilonScaling
from quickstep_under_test.nodes.bridge import sampler, transformed
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP
from quickstep_under_test.solvers.exposure_bias import EpsilonScaling
from quickstep_under_test.solvers.thresholding import DynamicThresholding
from quickstep_under_test.solvers.time_shift import TimeShift

from . import models
from .test_solvers_comfy import FLOW, VE, Denoiser

TRANSFORMS = pytest.mark.parametrize(
    "transform", [EpsilonScaling(1.05), DynamicThresholding(M=0.4), TimeShift(60, 0)], ids=lambda t: t.id
)
KINDS = pytest.mark.parametrize("kind", ["eps", "flow"])


def run(model, sampling, kind, seed=0, mask=None, latent=None, shape=(2, 4, 8, 8)):
    x = torch.zeros(shape) if latent is None else latent
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    condition = models.conditioning(1)
    sigmas = torch.tensor(FLOW if kind == "flow" else VE)
    return comfy.sample.sample_custom(
        model, noise, 1.0, sampling, sigmas, condition, condition, x, noise_mask=mask, disable_pbar=True, seed=seed
    )


@TRANSFORMS
@pytest.mark.parametrize(
    ("theirs", "mine", "flow"),
    [
        (core.sample_dpmpp_2m, DPMSolverPP(lower_order_final="never"), False),
        (core.sample_euler, DDIM(), False),
        (core.sample_euler, DDIM(), True),
    ],
)
def test_a_core_sampler_and_ours_see_the_same_network(transform, theirs, mine, flow):
    sigmas = torch.tensor(FLOW if flow else VE, dtype=torch.float64)
    x = sigmas[0] * torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = AnyTimes(flow)
    wrapped = (transformed(made, transform) for made in (comfy.samplers.KSAMPLER(theirs), sampler(mine)))
    got, expected = (w.sampler_function(model, x, sigmas, extra_args={}, disable=True) for w in wrapped)
    assert (got - expected).abs().max() < 1e-9
    assert (got - sampler(mine).sampler_function(model, x, sigmas, extra_args={}, disable=True)).abs().max() > 1e-4


class AnyTimes(Denoiser):
    """The exact mixture denoiser, asked with a time for each row."""

    def __call__(self, x, sigma, **unused):
        return self.exact(x, sigma.tolist())


@TRANSFORMS
@KINDS
@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 4, 3, 8, 8), (2, 4, 50)], ids=["image", "video", "audio"])
def test_real_runs_in_every_shape(transform, kind, shape):
    model = models.gaussian(kind)
    for plain in (comfy.samplers.sampler_object("dpmpp_2m"), sampler(DPMSolverPP())):
        out = run(model, transformed(plain, transform), kind, shape=shape)
        assert out.shape == shape and out.isfinite().all()
        assert not torch.equal(out, run(model, plain, kind, shape=shape))


@KINDS
def test_core_epsilon_scaling_node(kind):
    """The same on models that are not flow models; there it scales the velocity."""
    model = models.gaussian(kind)
    (patched,) = CoreEpsilonScaling.execute(model, 1.03).result
    euler = comfy.samplers.sampler_object("euler")
    difference = run(patched, euler, kind) - run(model, transformed(euler, EpsilonScaling(1.03)), kind)
    assert (difference.abs().max() < 2e-5) == (kind == "eps")


@TRANSFORMS
@KINDS
def test_inpaint_keeps_the_masked_part(transform, kind):
    model = models.gaussian(kind)
    latent = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(9))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1.0
    for plain in (comfy.samplers.sampler_object("dpmpp_2m"), sampler(DPMSolverPP())):
        out = run(model, transformed(plain, transform), kind, mask=mask, latent=latent)
        assert torch.allclose(out[..., 4:], latent[..., 4:], atol=1e-5)
        assert (out[..., :4] - latent[..., :4]).abs().mean() > 0.1
