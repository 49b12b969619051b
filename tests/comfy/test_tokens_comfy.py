"""ToDo and AT-EDM inside a real ComfyUI, on small UNets with random weights."""

import importlib.util
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from quickstep_under_test.nodes import attach
from quickstep_under_test.nodes.sites.tokens import places_of
from quickstep_under_test.solvers.caching.at_edm import ATEDM
from quickstep_under_test.solvers.caching.token_merge import ToDo
from torch.utils.flop_counter import FlopCounterMode


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


@cache
def model_of(name):
    return {"unet": M.unet, "sdxl": M.sdxl}[name]()


def sample(model, name="unet", steps=4, size=16, **options):
    wide = {"pooled": 1280} if name == "sdxl" else {}
    x = options.pop("x", M.latent(1, 4, size))
    return M.sample(
        model, steps=steps, positive=M.conditioning(1, **wide), negative=M.conditioning(2, **wide), x=x, **options
    )


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def last(model):
    return attach.ledger_of(model).runs[-1]


def lengths(model, name, run):
    """Tokens that a layer of the network saw, call by call."""
    seen = []
    part = dict(model.model.diffusion_model.named_modules())[name]
    handle = part.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    try:
        run()
    finally:
        handle.remove()
    return set(seen)


OUTER = "input_blocks.1.1.transformer_blocks.0"
INNER = "input_blocks.3.1.transformer_blocks.0"


def test_the_resolutions_of_a_unet():
    unet, sdxl = (model_of(name).model.diffusion_model for name in ("unet", "sdxl"))
    assert sorted({place.scale for place in places_of(unet, 0)}) == [1, 2, 4]
    assert {place.scale for place in places_of(unet, 1)} == {1}
    assert {place.block for place in places_of(unet, 1)} == {("input", 1), ("output", 4), ("output", 5)}
    assert {place.scale for place in places_of(sdxl, 1)} == {2}


@pytest.mark.parametrize(("levels", "inner"), [(1, 64), (2, 16)])
def test_keys_are_fewer_and_queries_are_not(levels, inner):
    on = attach.attach(model_of("unet"), ToDo(levels=levels))
    for layer, expected in (("attn1.to_k", 64), ("attn1.to_v", 64), ("attn1.to_q", 256), ("attn2.to_q", 256)):
        assert lengths(on, f"{OUTER}.{layer}", lambda: sample(on)) == {expected}
    assert lengths(on, f"{INNER}.attn1.to_k", lambda: sample(on)) == {inner}


def test_odd_sizes_work():
    for settings in (ToDo(factor=2, keep="mean"), ToDo(factor=3, keep="similar"), ATEDM()):
        made = sample(attach.attach(model_of("unet"), settings), x=torch.zeros(1, 4, 13, 10))
        assert made.shape == (1, 4, 13, 10) and made.isfinite().all()


def test_a_replaced_self_attention_is_left_alone():
    model = model_of("unet").clone()
    model.set_model_attn1_replace(lambda q, k, v, extra: v, "input", 1)  # as perturbed attention does
    on = attach.attach(model, ToDo())
    assert lengths(on, f"{OUTER}.attn1.to_v", lambda: sample(on)) == {256}
    assert lengths(on, "output_blocks.5.1.transformer_blocks.0.attn1.to_v", lambda: sample(on)) == {64}


def test_patches_of_other_packs_come_first_and_are_kept():
    def half(n, context, value, extra):
        return n, 0.5 * context, value

    model = model_of("unet").clone()
    model.set_model_attn1_patch(half)
    halved = sample(attach.attach(model, ToDo()))
    assert not torch.equal(halved, sample(attach.attach(model_of("unet"), ToDo())))
    assert torch.equal(sample(attach.attach(model, ToDo(factor=1))), sample(model))


@pytest.mark.parametrize("early", [0.0, 0.5])
def test_pruned_tokens_leave_after_the_first_self_attention(early):
    settings = ATEDM(ratio=0.25, early_ratio=0.5, early=early)
    on = attach.attach(model_of("sdxl"), settings)
    late, soon = 12, 8  # of 4 x 4 tokens
    after = {late} if early == 0.0 else {late, soon}
    inside = "middle_block.1.transformer_blocks"
    for layer, expected in (
        ("0.attn1.to_q", {16}), ("0.attn2.to_q", after), ("0.ff.net.2", after), ("1.attn1.to_k", after), ("1.ff.net.2", after)
    ):  # fmt: skip
        assert lengths(on, f"{inside}.{layer}", lambda: sample(on, "sdxl")) == expected


def test_attention_that_knows_places_is_left_alone():
    plain = model_of("unet").clone()
    plain.set_model_attn2_patch(lambda n, context, value, extra: (n, context, value))
    with pytest.raises(ValueError, match="may know the tokens by their place"):
        attach.attach(plain, ATEDM())
    late = attach.attach(model_of("unet"), ATEDM()).clone()
    late.set_model_attn2_patch(lambda n, context, value, extra: (n, context, value))
    assert torch.equal(sample(late), sample(model_of("unet")))
    assert any("left alone" in note for note in last(late).notes)


@pytest.mark.parametrize("settings", [ToDo(levels=2), ATEDM(ratio=0.4, early_ratio=0.4)], ids=lambda s: s.id)
@pytest.mark.parametrize("name", ["unet", "sdxl"])
def test_the_work_is_what_the_layers_multiply(settings, name):
    def flops(model):
        with FlopCounterMode(display=False) as counter:
            sample(model, name, steps=1)
        return counter.get_total_flops()

    on = attach.attach(model_of(name), settings)
    share = flops(on) / flops(model_of(name))
    assert share < 0.99 and abs(last(on).work - share) < 0.012


def test_models_without_unet_transformers_are_refused():
    for settings in (ToDo(), ATEDM()):
        for model in (M.sd3(), M.gaussian("eps")):
            with pytest.raises(ValueError, match="no UNet transformers"):
                attach.attach(model, settings)
