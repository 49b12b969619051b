"""Stitched runs inside a real ComfyUI.

The same network in every stage must give the run of that network, bit for bit; models whose answers are known exactly
must agree across parametrizations; and everything that guiders bring along must reach the model it belongs to.
"""

import gc
import importlib.util
import logging
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import comfy.controlnet
import comfy.hooks
import comfy.latent_formats
import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import comfy.supported_models
import pytest
import torch
from comfy.nested_tensor import NestedTensor
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import Guider_Basic, Guider_DualCFG
from quickstep_under_test.nodes import attach, demo, stitch, stitch_run
from quickstep_under_test.nodes.bridge import sampler as ours
from quickstep_under_test.solvers.caching.deepcache import DeepCache
from quickstep_under_test.solvers.exponential import DPMSolverPP
from quickstep_under_test.solvers.restart import Restart
from quickstep_under_test.solvers.stitch import Alternate, TStitch, TStitchModel


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
STEPS = 7


@pytest.fixture(scope="module")
def large():
    return M.unet(0)


@pytest.fixture(scope="module")
def small():
    return M.unet(1)


@pytest.fixture(scope="module")
def exact():
    """Two quick models of different data."""
    return M.gaussian("eps", mean=0.5), M.gaussian("eps", mean=-0.3)


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def guider(model, seed=1, cfg=4.0, **extra):
    made = comfy.samplers.CFGGuider(model)
    made.set_conds(M.conditioning(seed, **extra), M.conditioning(seed + 1))
    made.set_cfg(cfg)
    return made


def sigmas_of(model, steps=STEPS, scheduler="normal"):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def sample(guider, sampler="euler", sigmas=None, shape=(1, 4, 8, 8), x=None, noise=None, mask=None, callback=None):
    x = torch.zeros(shape) if x is None else x
    if noise is None:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    sigmas = sigmas_of(guider.model_patcher) if sigmas is None else sigmas
    with torch.inference_mode():
        return guider.sample(noise, x, sampler, sigmas, denoise_mask=mask, callback=callback, disable_pbar=True, seed=0)


def stitched(*guiders, **settings):
    return stitch.stitched(list(guiders), TStitch(**settings))[0]


def far(a, b):
    return float((a - b).norm() / b.norm())


def notes(made):
    return attach.ledger_of(made.model_patcher).runs[-1].notes


def calls(made):
    """Calls by model, as reported."""
    return [int(part.split()[0]) for part in notes(made)[0].removeprefix("stitched calls: ").split(", ")]


def network(model):
    return model.model.diffusion_model


class Counted:
    """How often the network of each model is run, in order."""

    def __init__(self, *models):
        self.order = []
        self.handles = [
            network(model).register_forward_hook(lambda *args, k=k: self.order.append(k))
            for k, model in enumerate(models)
        ]

    def __enter__(self):
        return self.order

    def __exit__(self, *args):
        for handle in self.handles:
            handle.remove()


SAMPLERS = {
    **{name: name for name in ("euler", "dpmpp_2m", "heun", "dpm_2", "euler_cfg_pp", "dpmpp_2m_cfg_pp", "uni_pc")},
    **{name: name for name in ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "lms")},
    "our dpmpp": ours(DPMSolverPP(order=3)),
    "our restart": ours(Restart(DPMSolverPP())),
}


@pytest.mark.smoke
@pytest.mark.parametrize(("kind", "fraction"), [("flow", 0.0), ("flow", 0.4), ("v", 0.4), ("v", 1.0)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_network_in_both_stages_changes_no_bit(kind, sampler, fraction):
    model = M.gaussian(kind)
    made = stitched(guider(model), guider(model), fraction=fraction)
    assert torch.equal(sample(made, SAMPLERS[sampler]), sample(guider(model), SAMPLERS[sampler]))


@pytest.mark.parametrize("sampler", ["euler_cfg_pp", "dpmpp_2m_cfg_pp", "dpmpp_2m"])
def test_one_unet_in_both_stages_changes_no_bit(large, sampler):
    made = stitched(guider(large), guider(large), fraction=0.5)
    sigmas = sigmas_of(large, 4)
    assert torch.equal(sample(made, sampler, sigmas), sample(guider(large), sampler, sigmas))


@pytest.mark.smoke
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_cfg_pp", "dpmpp_2m_cfg_pp", "our dpmpp"])
def test_all_and_nothing_are_the_pure_models(exact, sampler):
    how, (small, large) = SAMPLERS[sampler], exact
    for fraction, pure in ((0.0, large), (1.0, small)):
        made = stitched(guider(small), guider(large), fraction=fraction)
        with Counted(small, large) as order:
            made = sample(made, how)
        assert torch.equal(made, sample(guider(pure), how)) and set(order) == {0 if fraction else 1}
    half = sample(stitched(guider(small), guider(large), fraction=0.4), how)
    assert far(half, sample(guider(large), how)) > 1e-3 and far(half, sample(guider(small), how)) > 1e-3


@pytest.mark.parametrize(
    ("sampler", "counts"), [("euler", [12, 18]), ("heun", [23, 36]), ("dpmpp_2m", [12, 18]), ("dpm_2", [24, 35])]
)
def test_evaluation_counts(sampler, counts):
    model = M.gaussian("eps")
    made = stitched(guider(model), guider(model), fraction=0.4)
    sample(made, sampler, sigmas_of(model, 30))
    assert calls(made) == counts and attach.ledger_of(made.model_patcher).runs[-1].calls == counts[1]


def test_the_order_of_two_runs_with_split_sigmas(large, small):
    """ComfyUI's own way to change the model: two samplers. Only the second's start is rounded on the way."""
    early, late = guider(small, seed=5, cfg=3.0), guider(large, seed=7)
    sigmas = sigmas_of(large, 4)
    half = sample(early, sigmas=sigmas[:3])
    two = sample(late, sigmas=sigmas[2:], x=half, noise=torch.zeros_like(half))
    assert far(sample(stitched(early, late, fraction=0.5), sigmas=sigmas), two) < 1e-5
    for other in (stitched(guider(small), late, fraction=0.5), stitched(early, guider(large), fraction=0.5)):
        assert far(sample(other, sigmas=sigmas), two) > 5e-5


KINDS = ["flow", "eps", "v"]


@pytest.mark.smoke
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_cfg_pp", "dpmpp_2m_cfg_pp"])
@pytest.mark.parametrize(("early", "late"), [(a, b) for a in KINDS for b in KINDS if a != b])
def test_parametrizations_agree(early, late, sampler):
    """One denoiser as flow, eps and v network. The times are ones that the eps network's table holds."""
    table = sigmas_of(M.gaussian("eps"), 12, "simple")
    sigmas = table / (1 + table) if late == "flow" else table
    last = guider(M.gaussian(late))
    made = sample(stitched(guider(M.gaussian(early)), last, fraction=0.5), sampler, sigmas)
    plain = sample(last, sampler, sigmas)
    assert far(made, plain) < 1e-5


def test_a_flow_model_starts_above_all_that_an_eps_model_knows():
    last = guider(M.gaussian("flow"))
    made = stitched(guider(M.gaussian("eps")), last, fraction=0.5)
    plain, got = sample(last), sample(made)
    assert torch.isfinite(got).all() and far(got, plain) < 0.1
    assert "1 beyond the largest sigma of their model" in notes(made)[0]


def scaled(kind, scale, shift=0.0):
    """The Gaussian model of other units: its latents are ``scale z + shift``."""
    model = M.gaussian(kind, 0.5 * scale + shift, 0.5 * scale)
    form = comfy.latent_formats.LatentFormat()
    form.process_in, form.process_out = (lambda z: z * scale + shift), (lambda z: (z - shift) / scale)
    model.model.latent_format = form
    return model


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_cfg_pp"])
@pytest.mark.parametrize("late", ["flow", "eps"])
def test_latents_in_other_units(late, sampler):
    """The late model's own result, whatever units the early one thinks in: guided x0 and CFG++'s too."""
    table = sigmas_of(M.gaussian("eps"), 12, "simple")[4:]
    last = guider(M.gaussian(late))
    sigmas = table / (1 + table) if late == "flow" else table
    made = sample(stitched(guider(scaled("flow", 0.5, 0.25)), last, fraction=0.5), sampler, sigmas)
    plain = sample(last, sampler, sigmas)
    assert far(made, plain) < 1e-5


@pytest.mark.smoke
def test_four_models_and_patterns(exact):
    (small, large), others = exact, [M.gaussian("flow"), M.gaussian("v")]
    guiders = [guider(model) for model in (small, *others, large)]
    with Counted(small, *others, large) as order:
        made = stitched(*guiders, fraction=0.3, fraction_2=0.3, fraction_3=0.2)
        sample(made, "euler")
    assert order == [0, 0, 1, 1, 2, 2, 3] and calls(made) == [2, 2, 2, 1]
    with Counted(small, large) as order:
        turns, _ = stitch.stitched([guider(small), guider(large)], Alternate(pattern="AAB"))
        sample(turns, "dpmpp_2m")
    assert order == [0, 0, 1, 0, 0, 1, 0]
    same, _ = stitch.stitched([guider(large)] * 3, Alternate(pattern="ABCB"))
    assert torch.equal(sample(same, "dpmpp_2m"), sample(guider(large), "dpmpp_2m"))


def test_guiders_of_other_kinds(exact):
    small, large = exact
    basic, dual = Guider_Basic(small), Guider_DualCFG(large)
    basic.set_conds(M.conditioning(3))
    dual.set_conds(M.conditioning(1), M.conditioning(5), M.conditioning(2))
    dual.set_cfg(3.0, 2.0)
    assert torch.equal(sample(stitched(dual, dual, fraction=0.5)), sample(dual))
    assert torch.equal(sample(stitched(basic, dual, fraction=0.0)), sample(dual))
    assert torch.equal(sample(stitched(basic, dual, fraction=1.0)), sample(basic))
    assert isinstance(stitched(basic, dual), Guider_DualCFG)
    with pytest.raises(ValueError, match="guider 1 is a object"):
        stitched(object(), dual)


def test_what_was_given_stays_as_it_was(exact):
    small, large = exact
    early, late = guider(small), guider(large)
    before = [dict(vars(g)) for g in (early, late)]
    options = [str(g.model_patcher.wrappers) for g in (early, late)]
    sample(stitched(early, late))
    assert [dict(vars(g)) for g in (early, late)] == before
    assert [str(g.model_patcher.wrappers) for g in (early, late)] == options
    sample(early)
    sample(late)


def test_batch_and_mask(exact):
    small, large = exact
    x = torch.randn(3, 4, 8, 8)
    mask = torch.stack([torch.zeros(8, 8), torch.ones(8, 8), torch.ones(8, 8).tril()])
    plain = sample(guider(large), x=x, mask=mask)
    assert torch.equal(sample(stitched(guider(large), guider(large)), x=x, mask=mask), plain)
    made = sample(stitched(guider(small), guider(large), fraction=0.9), x=x, mask=mask)
    kept = mask[:, None].expand_as(x) == 0
    assert torch.allclose(made[kept], x[kept], atol=1e-4) and not torch.equal(made[1], plain[1])


def test_every_stage_gets_the_latent_and_the_mask(exact, monkeypatch):
    """Inpainting models make conditionings of them."""
    small, large = exact
    seen = {}
    for name, model in (("small", small), ("large", large)):
        plain = model.model.extra_conds

        def spy(name=name, plain=plain, **given):
            seen[name] = [given[k].clone() for k in ("noise", "latent_image", "denoise_mask")]
            return plain(**given)

        monkeypatch.setattr(model.model, "extra_conds", spy)
    mask = torch.stack([torch.ones(8, 8).tril(), torch.ones(8, 8).triu()])
    sample(stitched(guider(small), guider(large)), x=torch.randn(2, 4, 8, 8), mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(seen["small"], seen["large"], strict=True))
    assert seen["small"][2].shape == (2, 4, 8, 8) and not torch.equal(seen["small"][2][0], seen["small"][2][1])


def test_combined_latents():
    model = M.gaussian("flow")

    def run(made):
        parts = [torch.zeros(1, 4, 8, 8), torch.zeros(1, 2, 6)]
        noise = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(parts)]
        sampler, mask = comfy.samplers.sampler_object("euler"), NestedTensor([torch.ones(1, 8, 8).tril()])
        with torch.inference_mode():
            return made.sample(
                NestedTensor(noise), NestedTensor(parts), sampler, sigmas_of(model), mask, disable_pbar=True, seed=0
            ).unbind()

    bare = comfy.samplers.CFGGuider(model)
    bare.set_conds([[None, {}]], [[None, {}]])
    made, plain = run(stitched(bare, bare)), run(bare)
    assert len(made) == 2 and all(torch.equal(a, b) for a, b in zip(made, plain, strict=True))
    other = scaled("flow", 0.5, 0.25)
    early = comfy.samplers.CFGGuider(other)
    early.set_conds([[None, {}]], [[None, {}]])
    with pytest.raises(ValueError, match="combined latents"):
        run(stitched(early, bare))


class Control(comfy.controlnet.ControlBase):
    """A ControlNet that adds nothing and notes what happens to it."""

    def __init__(self):
        super().__init__()
        self.log = []

    def pre_run(self, model, percent_to_timestep_function):
        super().pre_run(model, percent_to_timestep_function)
        self.log.append(("run", percent_to_timestep_function(0.5)))

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        self.log.append(("call", float(t[0])))
        return None

    def cleanup(self):
        super().cleanup()
        self.log.append(("cleanup", 0.0))

    def copy(self):
        return self


def test_a_controlnet_works_for_its_stage_only(exact):
    small, large = exact
    control = Control()
    sample(stitched(guider(small, control=control), guider(large), fraction=3 / 7))
    what = [kind for kind, _ in control.log]
    assert what[0] == "run" and what.count("call") == 3 and what[-1] == "cleanup"
    assert [t for kind, t in control.log if kind == "call"] == pytest.approx(sigmas_of(large)[:3].tolist())


def test_a_controlnet_of_both_stages_is_told_whose_turn_it_is():
    control = Control()
    flow, eps = M.gaussian("flow"), M.gaussian("eps")
    sample(stitched(guider(eps, control=control), guider(flow, control=control), fraction=3 / 7))
    half = {"eps": float(eps.model.model_sampling.percent_to_sigma(0.5)), "flow": 0.5}
    turns = [
        value for i, (kind, value) in enumerate(control.log[:-1]) if kind == "run" and control.log[i + 1][0] == "call"
    ]
    assert turns == pytest.approx([half["eps"], half["flow"]])


class Fails(RuntimeError):
    pass


@pytest.mark.parametrize("stage", [0, 1])
def test_an_exception_cleans_up_both(exact, stage):
    small, large = models = exact
    made = stitched(guider(small), guider(large), fraction=0.5)
    plain = sample(made)
    cleaned = []
    names = [set(vars(network(model))) for model in models]

    def fail(*unused):
        raise Fails

    for k, guided in enumerate((made.model_patcher, small)):
        guided.add_callback_with_key("on_cleanup", "test", lambda *unused, k=k: cleaned.append(k))
    handle = network(models[stage]).register_forward_pre_hook(fail)
    try:
        with pytest.raises(Fails):
            sample(made)
    finally:
        handle.remove()
        for guided in (made.model_patcher, small):
            guided.remove_callbacks_with_key("on_cleanup", "test")
    assert sorted(cleaned) == [0, 1] and [model.model.current_patcher for model in models] == [None, None]
    assert [set(vars(network(model))) for model in models] == names
    report = attach.ledger_of(made.model_patcher).runs[-1]
    assert not report.finished and "stitched calls" in report.notes[0]
    assert torch.equal(sample(made), plain)


def test_an_interrupt_stops_all(exact):
    small, large = exact
    made = stitched(guider(small), guider(large), fraction=0.5)
    plain = sample(made)

    def interrupt(step, *unused):
        if step == 4:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(made, callback=interrupt)
    assert torch.equal(sample(made), plain)


def test_nothing_outlives_the_run(exact, monkeypatch):
    small, large = exact
    kept = []
    plain = stitch_run.Run.call

    def call(self, x, *args):
        made = plain(self, x, *args)
        kept.extend([weakref.ref(self), weakref.ref(x), weakref.ref(made)])
        return made

    monkeypatch.setattr(stitch_run.Run, "call", call)
    gc.collect()
    gc.disable()  # models held by a cycle cost a collection at every load, and ComfyUI warns of a leak
    try:
        made = stitched(guider(small), guider(large))
        sample(made)
        assert len(kept) == 3 * STEPS and all(ref() is None for ref in kept)
        assert not {"inner_model", "conds", "loaded_models"} & set(vars(made))
        model = weakref.ref(made.model_patcher)
        del made
        assert model() is None
        once = stitch.stitched_model(large, small, TStitchModel())
        M.sample(once)
        model = weakref.ref(once)
        del once
        assert model() is None
    finally:
        gc.enable()


def test_previews_come_from_the_real_run(exact):
    small, large = exact
    steps = []
    sample(stitched(guider(small), guider(large)), callback=lambda step, x0, x, total: steps.append((step, total)))
    assert steps == [(i, STEPS) for i in range(STEPS)]


@pytest.mark.smoke
def test_accelerators_work_in_their_own_stage(large, small):
    cached = attach.attach(large, DeepCache(interval=3, depth=1, warmup=1))
    made, model = stitch.stitched([guider(small), guider(cached)], TStitch(fraction=0.3))
    plain = sample(stitched(guider(small), guider(large), fraction=0.3))
    assert attach.ledger_of(model) is attach.ledger_of(cached)
    result = sample(made)
    report = attach.ledger_of(cached).runs[-1]
    assert (report.calls, report.full, report.partial) == (5, 2, 3) and report.notes[0] == notes(made)[0]
    assert 0 < far(result, plain) < 0.2
    early = attach.attach(small, DeepCache(interval=2, depth=1, warmup=1))
    sample(stitched(guider(early), guider(large), fraction=0.6))
    report = attach.ledger_of(early).runs[-1]
    assert (report.calls, report.partial) == (4, 2) and "stitched calls: 4 by model 1" in report.notes[0]
    once = attach.attach(large, DeepCache(interval=1))
    assert torch.equal(sample(stitched(guider(small), guider(once), fraction=0.3)), plain)


@pytest.mark.parametrize("order", ["before", "after"])
def test_accelerators_before_and_after_the_model_node(large, small, order):
    settings, cache = TStitchModel(fraction=0.3), DeepCache(interval=3, depth=1, warmup=1)
    if order == "before":
        model = stitch.stitched_model(attach.attach(large, cache), small, settings)
    else:
        model = attach.attach(stitch.stitched_model(large, small, settings), cache)
    M.sample(model, steps=STEPS)
    report = attach.ledger_of(model).runs[-1]
    assert (report.calls, report.full, report.partial) == (5, 2, 3) and "2 by model 1" in report.notes[0]


@pytest.mark.smoke
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_cfg_pp", "dpmpp_2m_cfg_pp"])
def test_the_model_node_with_the_plain_sampler(exact, sampler):
    small, large = exact
    for fraction, pure in ((0.0, large), (1.0, small)):
        model = stitch.stitched_model(large, small, TStitchModel(fraction=fraction))
        assert torch.equal(M.sample(model, sampler), M.sample(pure, sampler))
    twice = stitch.stitched_model(large, large, TStitchModel())
    assert torch.equal(M.sample(twice, sampler), M.sample(large, sampler))
    model = stitch.stitched_model(large, small, TStitchModel())
    made = sample(stitched(guider(small), guider(large)), sampler, sigmas_of(large, 8))
    assert torch.equal(M.sample(model, sampler), made)
    assert "3 by model 1 (BaseModel), 5 by model 2" in attach.ledger_of(model).runs[-1].notes[0] or sampler == "heun"


def test_the_model_node_inpaints(exact):
    small, large = exact
    x, mask = torch.randn(2, 4, 8, 8), torch.ones(2, 1, 8, 8).tril()
    model = stitch.stitched_model(large, small, TStitchModel())
    made = sample(stitched(guider(small), guider(large)), "euler", sigmas_of(large, 8), x=x, mask=mask)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(M.sample(model, x=x, mask=mask, noise=noise), made)


def test_the_model_node_refuses_other_text_encoders(large):
    narrow = M.build(comfy.supported_models.SD15, {**M.UNET, "context_dim": 32}, 0, num_heads=4, num_head_channels=-1)
    with pytest.raises(ValueError, match="encodings of 32 numbers, BaseModel of 64; give each a guider"):
        stitch.stitched_model(large, narrow, TStitchModel())
    adm = {**M.UNET, "adm_in_channels": 16, "num_classes": "sequential"}
    pooled = M.build(comfy.supported_models.SD15, adm, 0, num_heads=4, num_head_channels=-1)
    with pytest.raises(ValueError, match="64 numbers and a pooled one"):
        stitch.stitched_model(large, pooled, TStitchModel())
    with pytest.raises(ValueError, match="encodings of 16 numbers"):
        config = {**M.SD3, "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 16}}}
        config = {k: v for k, v in config.items() if k != "image_model"}
        patched = SimpleNamespace(model=SimpleNamespace(model_config=SimpleNamespace(unet_config=config)))
        stitch.same_prompts(large, patched, "T-Stitch")


def test_latents_that_do_not_match_are_refused(large, monkeypatch):
    with pytest.raises(ValueError, match="latent_channels 16 and 4"):
        stitched(guider(M.sd3()), guider(large))
    with pytest.raises(ValueError, match=r"\(SDXL and SD15\) belong to different VAEs"):
        stitch.stitched_model(large, M.sdxl(), TStitchModel())
    playground = M.sdxl()
    playground.model.latent_format = comfy.latent_formats.SDXL_Playground_2_5()
    with pytest.raises(ValueError, match="scale the channels of one VAE differently"):
        stitched(guider(playground), guider(M.sdxl()))
    other = M.gaussian("flow")
    monkeypatch.setattr(other.model.latent_format, "spacial_downscale_ratio", 16, raising=False)
    with pytest.raises(ValueError, match="spacial_downscale_ratio 16 and 8"):
        stitched(guider(other), guider(M.gaussian("flow")))


def test_models_without_noise_and_stitched_ones_are_refused(large, small):
    image = M.gaussian("eps")
    image.add_object_patch("model_sampling", comfy.model_sampling.IMG_TO_IMG())
    with pytest.raises(ValueError, match="into another without noise"):
        stitched(guider(image), guider(M.gaussian("eps")))
    with pytest.raises(ValueError, match="stitched already"):
        stitched(guider(small), stitched(guider(small), guider(large)))
    with pytest.raises(ValueError, match="go down"):
        sample(stitched(guider(small), guider(large)), sigmas=sigmas_of(large).flip(0))


def patched(model, strength=1.0):
    """A clone with a LoRA-like patch."""
    clone = model.clone()
    name = "diffusion_model.time_embed.0.weight"
    weight = clone.model.state_dict()[name]
    clone.add_patches({name: ("diff", (torch.full_like(weight, 0.05),))}, strength)
    return clone


def test_one_checkpoint_with_and_without_a_lora_is_loaded_twice(large, caplog):
    with pytest.raises(ValueError, match="cannot load it again"):
        stitched(guider(patched(large)), guider(large))
    with pytest.raises(ValueError, match="cannot load it again"):
        stitch.stitched_model(patched(large), large, TStitchModel())
    model = demo.load_model("unet_small", disable_dynamic=True)
    shape, lora = (1, 3, 32, 32), patched(model)

    def at(model):
        made = comfy.samplers.CFGGuider(model)
        made.set_conds([[torch.ones(1, 16, 64), {}]], [[torch.zeros(1, 16, 64), {}]])
        made.set_cfg(3.0)
        return made

    before = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    with caplog.at_level(logging.INFO, "quickstep"):
        made = stitched(at(lora), at(model), fraction=3 / 7)
    assert "loads a second BaseModel" in caplog.text and made.model_patcher.model is not model.model
    sigmas = sigmas_of(model)
    half = sample(at(lora), sigmas=sigmas[:4], shape=shape)
    two = sample(at(model), sigmas=sigmas[3:], x=half, noise=torch.zeros(shape))
    assert torch.allclose(sample(made, shape=shape), two, atol=1e-4)
    assert not torch.allclose(sample(at(model), shape=shape), two, atol=1e-2)
    comfy.model_management.unload_all_models()
    assert all(torch.equal(weight, before[name]) for name, weight in model.model.state_dict().items())


def test_what_counts_as_sharing_weights(large, small):
    shifted = large.clone()
    shifted.add_object_patch("model_sampling", large.get_model_object("model_sampling"))
    optional = large.clone()
    optional.set_model_unet_function_wrapper(
        lambda apply, given: apply(given["input"], given["timestep"], **given["c"])
    )
    assert stitch.torn(large, shifted, False) and stitch.torn(large, patched(large), False)
    assert not stitch.torn(large, large.clone(), False) and not stitch.torn(large, optional, False)
    assert stitch.torn(large, large.clone(), True) and not stitch.torn(large, small, True)
    assert not stitch.hooked(guider(large, control=Control()))
    assert stitch.hooked(guider(large, hooks=comfy.hooks.HookGroup()))
    with pytest.raises(ValueError, match="prompts have hooks"):
        once = stitch.stitched_model(large, large.clone(), TStitchModel())
        sample(guider(once, hooks=comfy.hooks.HookGroup()))


def spied(monkeypatch):
    """The models of every load, by name."""
    loads = []
    plain = comfy.model_management.load_models_gpu

    def load(models, *args, **kwargs):
        loads.append([model.model for model in models])
        return plain(models, *args, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
    return loads


def test_memory(exact, monkeypatch):
    small, large = exact
    loads = spied(monkeypatch)
    a, b = small.model, large.model
    sample(stitched(guider(small), guider(large), memory="resident"))
    assert loads == [[b], [a], [b, a]]  # each guider's own, and then both at once, for good
    loads.clear()
    sample(stitched(guider(small), guider(large), memory="swap"))
    assert loads == [[b], [a], [a], [b]]
    loads.clear()
    sample(stitched(guider(small), guider(large)))
    assert loads[-1] == [b, a]
    loads.clear()
    sample(stitched(guider(large), guider(large.clone())))
    assert loads == [[b], [b]]  # one network


def test_room_for_all(monkeypatch):
    management, gb = comfy.model_management, 2**30

    def model(size, loaded=0):
        return SimpleNamespace(model_size=lambda: size * gb, loaded_size=lambda: loaded * gb, load_device="gpu")

    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "get_free_memory", lambda device: 6 * gb)
    monkeypatch.setattr(management, "loaded_models", lambda: [model(4, 4), None])
    monkeypatch.setattr(management, "minimum_inference_memory", lambda: gb)
    assert stitch_run.room_for([model(4), model(4)], 0) and not stitch_run.room_for([model(5), model(4)], 0)
    assert not stitch_run.room_for([model(4), model(4)], 2 * gb)


# ---- the nodes


def node(name):
    return next(n for n in stitch.NODES if n.GET_SCHEMA().node_id == f"Quickstep_{name}")


@pytest.mark.smoke
def test_nodes(exact):
    small, large = exact
    assert [n.GET_SCHEMA().node_id for n in stitch.NODES] == [
        f"Quickstep_{name}" for name in ("TStitch", "TStitchModel", "Alternate", "ScoreGate")
    ]
    for made in stitch.NODES:
        made.GET_NODE_INFO_V1()
    guiders = {"guider0": guider(small), "guider1": guider(large), "guider2": None}
    made, model = node("TStitch").execute(guiders=guiders, fraction=0.3).args
    assert made.model_patcher is model and torch.equal(
        sample(made), sample(stitched(guider(small), guider(large), fraction=0.3))
    )
    made, model = node("Alternate").execute(guiders=guiders, pattern="AB").args
    sample(made)
    assert calls(made) == [4, 3]
    (model,) = node("TStitchModel").execute(model=large, small_model=small, by="percent", fraction=0.5).args
    M.sample(model)
    assert "stitched" in attach.ledger_of(model).runs[-1].notes[0]
    with pytest.raises(ValueError, match="at least two guiders; 1 is connected"):
        node("TStitch").execute(guiders={"guider0": guider(small)})


@pytest.mark.smoke
def test_the_gate_asks_for_the_second_branch_only_if_it_must():
    gate = node("ScoreGate")
    nan = float("nan")
    for score, good, refine in ((0.6, "high", False), (0.5, "high", False), (0.4, "high", True), (nan, "high", True)):
        assert gate.check_lazy_status(score, "quick", 0.5, good) == (["refined"] if refine else [])
    assert gate.check_lazy_status(0.6, "quick", 0.5, "low") == ["refined"]
    assert gate.check_lazy_status(0.4, "quick", 0.5, "low") == []
    assert gate.check_lazy_status(0.4, "quick", 0.5, "high", refined="better") == []
    assert gate.execute(0.6, "quick", 0.5, "high").args == ("quick", False)
    assert gate.execute(0.4, "quick", 0.5, "high", "better").args == ("better", True)
    lazy = {item.id: item.as_dict().get("lazy") for item in gate.GET_SCHEMA().inputs}
    assert [name for name, value in lazy.items() if value] == ["refined"]


def test_wrappers_see_the_real_sampler(exact):
    """An accelerator asks the sampler's name and kind when its run begins."""
    small, large = exact
    seen = []

    def spy(executor, noise, latent, sampler, *args, **kwargs):
        seen.append((attach.sampler_name(sampler), attach.stochastic(sampler), attach.adaptive(sampler)))
        return executor(noise, latent, sampler, *args, **kwargs)

    models = [small.clone(), large.clone()]
    for model in models:
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "spy", spy)
    how = ours(Restart(DPMSolverPP()))
    sample(stitched(*map(guider, models)), how)
    assert seen == [(attach.sampler_name(how), attach.stochastic(how), attach.adaptive(how))] * 2


def test_two_guiders_of_one_network_each_keep_their_callbacks(exact):
    """ComfyUI asks the network which of its patchers is at work."""
    turns, models = [], [exact[0].clone(), exact[0].clone()]
    for k, model in enumerate(models):
        model.add_callback_with_key("on_prepare_state", "test", lambda *unused, k=k: turns.append(k))
    sample(stitched(*map(guider, models), fraction=3 / 7))
    assert turns == [0] * 3 + [1] * 4


def test_a_stage_that_computes_nothing_is_not_entered(exact, monkeypatch):
    small, large = exact
    loads = spied(monkeypatch)
    sample(stitched(guider(small), guider(large), fraction=0.0))
    assert all(models == [large.model] for models in loads)


def test_reloading_keeps_conditionings(exact):
    """A reload in the middle (swap) must not cost a stage its prompts."""
    small, large = exact
    swap = sample(stitched(guider(small), guider(large), memory="swap"))
    assert torch.equal(swap, sample(stitched(guider(small), guider(large), memory="resident")))
    turns = [guider(small), guider(large)]
    made = [stitch.stitched(turns, Alternate("AB", memory))[0] for memory in ("swap", "resident")]
    assert torch.equal(sample(made[0]), sample(made[1]))


def test_hooks_of_a_stage(large, small):
    """Weights that a prompt changes are changed for its stage only, and back afterwards."""
    hook = comfy.hooks.WeightHook(strength_model=1.0)
    name = "diffusion_model.time_embed.0.weight"
    hook.weights = {name: ("diff", (torch.full_like(small.model.state_dict()[name], 0.05),))}
    hook.need_weight_init = False
    group = comfy.hooks.HookGroup()
    group.add(hook)
    before = small.model.state_dict()[name].clone()
    early, sigmas = guider(small, hooks=group), sigmas_of(large, 2)
    made = [sample(g, sigmas=sigmas) for g in (stitched(early, guider(large)), stitched(guider(small), guider(large)))]
    assert not torch.equal(*made)
    whole = sample(stitched(early, guider(large), fraction=1.0), sigmas=sigmas)
    assert torch.equal(whole, sample(early, sigmas=sigmas))
    assert torch.equal(small.model.state_dict()[name], before)
