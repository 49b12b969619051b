"""The solvers inside the real ComfyUI: parity with its own, every kind of latent, masks, callbacks, interruption."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.k_diffusion import sampling as core
from quickstep_under_test.nodes.bridge import process_of, sampler
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP, SDEDPMSolverPP
from quickstep_under_test.solvers.library import SOLVERS
from quickstep_under_test.solvers.noise import SOURCES
from quickstep_under_test.solvers.process import RectifiedFlow, VarianceExploding

from . import models

VE = [14.0, 8.0, 4.5, 2.4, 1.2, 0.6, 0.25, 0.08, 0.0]
FLOW = [0.98, 0.9, 0.8, 0.66, 0.5, 0.33, 0.2, 0.07, 0.0]


class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    pass


class Eps(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    pass


class Denoiser:
    """What ComfyUI hands to a sampler function, around the exact mixture denoiser in float64."""

    def __init__(self, flow: bool, noise_scale: float = 1.0):
        process = RectifiedFlow() if flow else VarianceExploding()
        self.exact = GaussianMixture.random().denoiser(process)
        sampling = (Flow if flow else Eps)()
        sampling.noise_scale = noise_scale
        patcher = SimpleNamespace(get_model_object=lambda name: sampling)
        self.inner_model = SimpleNamespace(model_patcher=patcher, inner_model=SimpleNamespace(model_sampling=sampling))

    def __call__(self, x, sigma, **unused):
        return self.exact(x, float(sigma[0]))


def both(theirs, mine, flow, noise_scale=1.0, **options):
    """Results of a core sampler function and of one of ours on the same float64 problem and noise."""
    sigmas = torch.tensor(FLOW if flow else VE, dtype=torch.float64)
    x = sigmas[0] * torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = Denoiser(flow, noise_scale)
    if mine.stochastic:
        draw = SOURCES[mine.draws](x, 3, sigmas.tolist())
        options["noise_sampler"] = lambda s, t: draw(float(s), float(t))
    expected = theirs(model, x, sigmas, extra_args={}, disable=True, **options)
    got = sampler(mine).sampler_function(model, x, sigmas, extra_args={"seed": 3}, disable=True)
    return got, expected


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("theirs", "mine", "flow", "options"),
    [
        (core.sample_euler, DDIM(), False, {}),
        (core.sample_euler, DDIM(), True, {}),
        (core.sample_euler_ancestral, DDIM(eta=0.7, noise="gaussian"), False, {"eta": 0.7}),
        (core.sample_dpmpp_2m, DPMSolverPP(lower_order_final="never"), False, {}),
        (core.sample_dpmpp_2m_sde, SDEDPMSolverPP(lower_order_final="never"), False, {}),
        (core.sample_dpmpp_2m_sde, SDEDPMSolverPP(lower_order_final="never"), True, {}),
        (
            core.sample_dpmpp_2m_sde,
            SDEDPMSolverPP(eta=0.6, correction="taylor", lower_order_final="never"),
            True,
            {"eta": 0.6, "solver_type": "heun"},
        ),
        (core.sample_dpmpp_2m_sde, DPMSolverPP(lower_order_final="never"), True, {"eta": 0.0}),
        (
            core.sample_dpmpp_3m_sde,
            SDEDPMSolverPP(order=3, third_order="reference", correction="taylor", lower_order_final="never"),
            False,
            {},
        ),
        (
            core.sample_dpmpp_3m_sde,
            DPMSolverPP(order=3, third_order="reference", correction="taylor", lower_order_final="never"),
            True,
            {"eta": 0.0},
        ),
        (core.sample_res_multistep, DPMSolverPP(correction="taylor", lower_order_final="never"), False, {}),
    ],
)
def test_parity_with_core(theirs, mine, flow, options):
    got, expected = both(theirs, mine, flow, **options)
    tolerance = 1e-5 if theirs is core.sample_res_multistep else 1e-9  # core computes its phi functions in float32
    assert (got - expected).abs().max() < tolerance


def test_noise_scale_of_the_model():
    """Models trained with noise of another size (HiDream-O1: 8) get injected noise of that size."""
    mine = SDEDPMSolverPP(lower_order_final="never")
    got, expected = both(core.sample_dpmpp_2m_sde, mine, True, noise_scale=8.0)
    assert (got - expected).abs().max() < 1e-9
    assert (both(core.sample_dpmpp_2m_sde, mine, True)[0] - got).abs().max() > 1e-3


def test_core_dpmpp_2m_on_flow_models_interpolates_in_log_sigma():
    """Core's takes -log sigma for lambda on flow models as well: consistent, but another method than DPM-Solver++ there."""
    got, expected = both(core.sample_dpmpp_2m, DPMSolverPP(lower_order_final="never"), True)
    assert 1e-4 < (got - expected).abs().max() < 0.5


def test_the_parity_test_can_fail():
    got, expected = both(core.sample_dpmpp_2m, DPMSolverPP(correction="taylor", lower_order_final="never"), False)
    assert (got - expected).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_process_follows_the_model_and_its_patches(kind):
    model = models.gaussian(kind)
    process = process_of(model)
    assert isinstance(process, RectifiedFlow if kind == "flow" else VarianceExploding)
    sampling = model.get_model_object("model_sampling")
    assert process.t_max == pytest.approx(float(sampling.sigma_max))
    assert process.t_min == pytest.approx(float(sampling.sigma_min))
    if kind == "flow":
        shifted = model.clone()
        patched = Flow()
        patched.set_parameters(shift=3.0)
        shifted.add_object_patch("model_sampling", patched)
        assert process_of(shifted).t_of_u(0.5) > process.t_of_u(0.5)
    assert process.u_of_t(process.t_of_u(0.37)) == pytest.approx(0.37, abs=1e-6)


def run(model, solver, sigmas, shape=(1, 4, 8, 8), seed=0, cfg=1.0, mask=None, latent=None, callback=None):
    x = torch.zeros(shape) if latent is None else latent
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    condition = models.conditioning(1)
    return comfy.sample.sample_custom(
        model, noise, cfg, sampler(solver), torch.tensor(sigmas), condition, condition, x,
        noise_mask=mask, callback=callback, disable_pbar=True, seed=seed,
    )  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.id)
@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 4, 3, 8, 8), (2, 4, 50)], ids=["image", "video", "audio"])
@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_every_latent_shape_from_pure_noise_to_clean(solver, shape, kind):
    model = models.gaussian(kind)
    top = 1.0 if kind == "flow" else 14.6
    steps = torch.linspace(1, 0, 41).double() ** (1 if kind == "flow" else 3)
    out = run(model, solver(), (top * steps).float().tolist(), shape)
    assert out.shape == shape and out.isfinite().all()
    assert abs(out.mean() - 0.5) < 0.1
    assert 0.3 < out.std() < 0.6  # data: N(0.5, 0.5^2)


@pytest.mark.smoke
def test_flow_ode_hits_the_exact_solution():
    """For Gaussian data N(m, s^2) the flow ODE from sigma = 1 ends at m + s noise."""
    model = models.gaussian("flow")
    noise = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    out = run(model, DPMSolverPP(order=3), torch.linspace(1, 0, 101).tolist(), (2, 4, 8, 8))
    assert (out - (0.5 + 0.5 * noise)).abs().max() < 0.05


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: s.id)
@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_inpaint_keeps_the_masked_part(solver, kind):
    model = models.gaussian(kind)
    latent = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(9))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1.0
    out = run(model, solver(), FLOW if kind == "flow" else VE, mask=mask, latent=latent)
    assert torch.allclose(out[..., 4:], latent[..., 4:], atol=1e-5)
    assert (out[..., :4] - latent[..., :4]).abs().mean() > 0.1


def test_callback_once_per_step_and_last_step_is_the_prediction():
    seen = []
    out = run(
        models.gaussian("flow"),
        DPMSolverPP(),
        FLOW,
        callback=lambda i, x0, x, total: seen.append((i, total, x0.clone())),
    )
    assert [i for i, _, _ in seen] == list(range(len(FLOW) - 1))
    assert {total for _, total, _ in seen} == {len(FLOW) - 1}
    assert torch.allclose(seen[-1][2], out, atol=1e-6)


def test_repeated_sigmas_and_partial_runs():
    """Repetitions are no steps; a run that stops above zero can be continued by a second one."""
    model = models.gaussian("eps")
    whole = run(model, DDIM(), VE)
    assert torch.equal(run(model, DDIM(), [VE[0], *VE]), whole)
    first = run(model, DDIM(), VE[:5])
    condition = models.conditioning(1)
    rest = comfy.sample.sample_custom(
        model,
        torch.zeros_like(first),
        1.0,
        sampler(DDIM()),
        torch.tensor(VE[4:]),
        condition,
        condition,
        first,
        disable_pbar=True,
    )
    assert torch.allclose(rest, whole, atol=1e-4)


@pytest.mark.parametrize("solver", [DDIM(eta=1.0), SDEDPMSolverPP(), SDEDPMSolverPP(noise="gaussian")], ids=str)
def test_stochastic_runs_follow_the_seed_and_leave_the_global_generator_alone(solver):
    model = models.gaussian("eps")
    torch.manual_seed(1)
    one = run(model, solver, VE, seed=4)
    state = torch.get_rng_state()
    again = run(model, solver, VE, seed=4)
    assert torch.equal(one, again)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(one, run(model, solver, VE, seed=5))


@pytest.mark.parametrize(
    ("sigmas", "words"),
    [
        ([1.0, 2.0, 0.0], "sigmas must decrease"),
        ([2.0, float("nan"), 0.0], "finite number"),
        ([2.0, 1.0, -1.0], "negative"),
    ],
)
def test_bad_sigmas_are_refused_in_one_sentence(sigmas, words):
    with pytest.raises(ValueError, match=words):
        run(models.gaussian("eps"), DDIM(), sigmas)


def test_flow_sigmas_above_one_are_refused():
    with pytest.raises(ValueError, match="flow model"):
        run(models.gaussian("flow"), DDIM(), [5.0, 1.0, 0.0])


def test_interruption_stops_the_run():
    def stop(i, *unused):
        if i == 2:
            comfy.model_management.interrupt_current_processing()
            comfy.model_management.throw_exception_if_processing_interrupted()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(models.gaussian("flow"), DPMSolverPP(), FLOW, callback=stop)
    assert run(models.gaussian("flow"), DPMSolverPP(), FLOW).isfinite().all()
