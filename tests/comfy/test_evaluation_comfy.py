"""Whole network calls left out inside a real ComfyUI, and the faults of ComfyUI's EasyCache that are not here."""

import importlib.util
import sys
from pathlib import Path

import comfy.context_windows
import comfy.model_base
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from quickstep_under_test.nodes import attach
from quickstep_under_test.solvers.caching.easycache import EasyCachePaper
from quickstep_under_test.solvers.caching.sada import SADA
from quickstep_under_test.solvers.caching.step_forecast import StepForecast


def _beside(name):
    """The module ``name`` next to this file (importlib mode has no sys.path for test folders)."""
    full = f"quickstep_tests_comfy_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


M = _beside("models")
INTERVAL = StepForecast(mode="interval", interval=3)
FULL_CALLS = 6  # of 12: three to warm up, one in three of the others, the last


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def unet():
    return M.unet()


def last(model):
    return attach.ledger_of(model).runs[-1]


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", ["flow", "eps", "v", "zsnr"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "uni_pc"])
def test_closer_to_the_whole_run_than_as_many_steps(kind, sampler):
    """Float32 flow models included, where ComfyUI's EasyCache writes into the sampler's x."""
    model = M.gaussian(kind)
    fast = attach.attach(model, StepForecast(tol=0.02))
    whole, made = M.sample(model, sampler, steps=24), M.sample(fast, sampler, steps=24)
    run = last(fast)
    assert run.skipped >= 6 and run.notes == ()
    fewer = M.sample(model, sampler, steps=round(24 * run.full / run.calls))
    assert distance(made, whole) < distance(fewer, whole)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2"])
def test_calls_are_counted_not_steps(unet, sampler):
    fast = attach.attach(unet, INTERVAL)
    made = M.sample(fast, sampler, steps=10)
    run = last(fast)
    assert run.calls == 19 and 7 <= run.full <= 10 and torch.isfinite(made).all()


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_guidance_passes_vanish_with_their_call_and_count_in_full_ones(unet, cfg):
    """ComfyUI's EasyCache takes the perturbed pass for the positive one, or answers it by that."""

    def passes(args):
        x, sigma, options = args["input"], args["sigma"], args["model_options"]
        other = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], x * 0.9, sigma, options)[0]
        seen.append(float(sigma.max()))
        return args["denoised"] + 0.5 * (args["cond_denoised"] - other)

    guided = unet.clone()
    guided.set_model_sampler_post_cfg_function(passes, disable_cfg1_optimization=True)
    seen = []
    whole = M.sample(guided, steps=12, cfg=cfg)
    assert len(seen) == 12
    seen.clear()
    neutral = M.sample(attach.attach(guided, StepForecast(tol=0.0)), steps=12, cfg=cfg)
    assert torch.equal(whole, neutral) and len(seen) == 12
    seen.clear()
    fast = attach.attach(guided, INTERVAL)
    made = M.sample(fast, steps=12, cfg=cfg)
    assert len(seen) == last(fast).full == FULL_CALLS
    assert distance(made, whole) < distance(M.sample(unet, steps=12, cfg=cfg), whole)


def test_areas_skip_too(unet):
    """ComfyUI's EasyCache confuses them, or resets in every call."""
    areas = [
        M.conditioning(3, area=(4, 8, 0, 0), strength=1.0)[0],
        M.conditioning(4, area=(4, 4, 4, 0), strength=1.0)[0],
        M.conditioning(5)[0],
    ]
    fast = attach.attach(unet, INTERVAL)
    whole = M.sample(unet, steps=12, positive=areas)
    made = M.sample(fast, steps=12, positive=areas)
    assert last(fast).full == FULL_CALLS
    assert distance(made, whole) < 0.2
    assert torch.equal(M.sample(attach.attach(unet, StepForecast(tol=0.0)), steps=12, positive=areas), whole)


def test_context_windows_count_as_one_call():
    """All windows of a call share a uuid, which ComfyUI's EasyCache takes for one."""
    model = M.gaussian("flow")
    model.model_options["context_handler"] = comfy.context_windows.IndexListContextHandler(
        comfy.context_windows.get_matching_context_schedule("standard_static"),
        comfy.context_windows.get_matching_fuse_method("pyramid"),
        context_length=4, context_overlap=2, dim=2,
    )  # fmt: skip
    x = torch.zeros(1, 4, 8, 4, 4)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    whole = M.sample(model, steps=16, x=x, noise=noise)
    fast = attach.attach(model, StepForecast(tol=0.02))
    made = M.sample(fast, steps=16, x=x, noise=noise)
    run = last(fast)
    assert run.calls == 16 and run.skipped >= 3 and run.forwards > run.full
    assert distance(made, whole) < 0.05


@pytest.mark.parametrize(
    "settings", [INTERVAL, EasyCachePaper(tau=1.0), SADA(coefficients="published")], ids=lambda s: s.id
)
def test_a_second_run_at_another_size_is_as_if_alone(unet, settings):
    small, large = M.latent(size=8), M.latent(size=12)
    model = attach.attach(unet, settings)
    M.sample(model, steps=12, x=small)
    after = M.sample(model, steps=12, x=large)
    assert torch.equal(after, M.sample(attach.attach(unet, settings), steps=12, x=large))
    assert last(model).skipped > 0


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        ("euler_ancestral", "adds noise"),
        ("dpmpp_2m_sde", "adds noise"),
        ("dpm_adaptive", "comparing"),
        ("euler_cfg_pp", "unconditional"),
    ],
)
def test_off_where_it_cannot_work_and_says_so(sampler, said):
    model = M.gaussian("flow")
    fast = attach.attach(model, StepForecast(tol=1.0))
    made = M.sample(fast, sampler, steps=12)
    assert last(fast).skipped == 0 and said in " ".join(last(fast).notes)
    assert torch.equal(made, M.sample(model, sampler, steps=12))


def test_few_steps_are_noted():
    fast = attach.attach(M.gaussian("flow"), StepForecast())
    M.sample(fast, steps=6)
    assert "6 steps" in " ".join(last(fast).notes)


@pytest.mark.parametrize("kind", ["IMG_TO_IMG", "IMG_TO_IMG_FLOW"])
def test_models_that_sample_nothing_are_refused(kind, monkeypatch):
    model = M.gaussian("flow")
    monkeypatch.setattr(model.model, "model_type", comfy.model_base.ModelType[kind])
    with pytest.raises(ValueError, match="single call"):
        attach.attach(model, StepForecast())


def test_masked_pictures_keep_what_is_outside():
    model = M.gaussian("flow")
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1.0
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    fast = attach.attach(model, INTERVAL)
    made = M.sample(fast, steps=12, x=x, mask=mask)
    assert last(fast).full == FULL_CALLS
    assert torch.allclose(made[..., 4:], x[..., 4:], atol=1e-4)


def test_inner_accelerators_do_not_see_skipped_calls(unet):
    calls = []

    def inner(executor, *args, **kwargs):
        calls.append(1)
        return executor(*args, **kwargs)

    fast = attach.attach(unet, INTERVAL)
    fast.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "another pack", inner)
    M.sample(fast, steps=12)
    assert len(calls) == FULL_CALLS
