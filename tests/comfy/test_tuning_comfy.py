"""Skip-Tuning, PLADIS, Block Skip and Block Sensitivity inside a real ComfyUI, on small networks with random weights."""

import importlib.util
import logging
import sys
from functools import cache
from pathlib import Path

import comfy.supported_models as families
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from quickstep_under_test.nodes import artifacts, attach
from quickstep_under_test.nodes import calibrate_sensitivity as sensitivity
from quickstep_under_test.solvers.artifact import Artifact, load
from quickstep_under_test.solvers.caching.block_skip import KIND, BlockSkip
from quickstep_under_test.solvers.caching.fora import FORA
from quickstep_under_test.solvers.caching.pladis import PLADIS, entmax15
from quickstep_under_test.solvers.caching.skip_tuning import SkipTuning
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
WAN = {"model_type": "t2v", "dim": 96, "ffn_dim": 192, "num_heads": 2, "num_layers": 3, "text_dim": 32, "freq_dim": 64,
       "in_dim": 16, "out_dim": 16, "text_len": 16}  # fmt: skip
MAKERS = {"unet": M.unet, "sdxl": M.sdxl, "sd3": M.sd3, "flux": M.flux, "wan": lambda: M.build(families.WAN21_T2V, WAN)}


@cache
def model_of(name):
    return MAKERS[name]()


def conds(name):
    wide = {"unet": {}, "sdxl": {"pooled": 1280}}.get(name, {"width": 32, "pooled": 32})
    return M.conditioning(1, **wide), M.conditioning(2, **wide)


def latent(name, size=8):
    x = M.latent(1, 4 if name in ("unet", "sdxl") else 16, size)
    return x[:, :, None] if name == "wan" else x


def sample(model, name="unet", steps=4, **options):
    positive, negative = conds(name)
    return M.sample(model, steps=steps, positive=positive, negative=negative, x=latent(name), **options)


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def last(model):
    return attach.ledger_of(model).runs[-1]


# Skip-Tuning


def test_skips_are_scaled_before_they_are_joined_and_not_in_place():
    seen = {}

    def watch(h, skip, options):
        seen.setdefault(options["block"], []).append(skip)
        return h, skip

    model = model_of("unet").clone()
    model.set_model_output_block_patch(watch)
    on = attach.attach(model, SkipTuning(rho_bottom=0.5, rho_top=1.0))
    joined = []
    network = on.model.diffusion_model
    handles = [block[0].register_forward_pre_hook(lambda m, a: joined.append(a[0])) for block in network.output_blocks]
    try:
        sample(on, steps=1)
    finally:
        for handle in handles:
            handle.remove()
    assert len(joined) == 6
    for i, h in enumerate(joined):
        skip = seen[("output", i)][0]  # as the patch of the other pack had it, which comes first
        assert torch.allclose(h[:, -skip.shape[1] :], (0.5 + 0.1 * i) * skip)


def test_skip_tuning_is_off_outside_its_window_and_needs_a_unet():
    model = model_of("unet")
    assert torch.equal(sample(attach.attach(model, SkipTuning(start_percent=1.0))), sample(model))
    with pytest.raises(ValueError, match="Skip-Tuning: this model is a"):
        attach.attach(model_of("sd3"), SkipTuning())


# PLADIS


def attentions(name, settings):
    """(dense, sharpened) of all cross-attentions of one pass, computed side by side."""
    pairs = []

    def inner(func, q, k, v, heads, *args, **kwargs):
        out = func(q, k, v, heads, *args, **kwargs)
        pairs.append((q, k, v, heads, out))
        return out

    model = model_of(name).clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = inner
    return pairs, attach.attach(model, settings)


def test_cross_attention_is_the_extrapolation_and_self_attention_is_not(monkeypatch):
    pairs, on = attentions("unet", PLADIS(lam=1.0))
    outs = []
    cross = on.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2
    handle = cross.to_out[0].register_forward_pre_hook(lambda m, a: outs.append(a[0]))
    try:
        sample(on, steps=1, cfg=1.0)
    finally:
        handle.remove()
    q, k, v, heads, dense = next(p for p in pairs if p[0].shape[-1] == 128 and p[1].shape[1] == 8)
    q, k, v = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
    expected = (entmax15(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5) @ v).transpose(1, 2).flatten(2)
    assert torch.allclose(outs[0], expected, atol=1e-5) and not torch.allclose(outs[0], dense, atol=1e-3)
    assert (
        sum(p[1].shape[1] == p[0].shape[1] for p in pairs) == len(pairs) / 2
    )  # the other pack sees all, self ones too


@pytest.mark.parametrize("name", ["unet", "wan"])
def test_pladis_changes_the_result_of_models_with_cross_attention(name):
    model = model_of(name)
    made = sample(attach.attach(model, PLADIS()), name)
    assert made.isfinite().all() and not torch.allclose(made, sample(model, name), atol=1e-4)
    assert torch.equal(sample(attach.attach(model, PLADIS(lam=0.0)), name), sample(model, name))


def test_pladis_refuses_joint_attention():
    for name in ("sd3", "flux"):
        with pytest.raises(ValueError, match="no separate attention to the prompt"):
            attach.attach(model_of(name), PLADIS())


def test_pladis_honours_masks():
    q, k, v = (torch.randn(2, n, 12, generator=torch.Generator().manual_seed(n)) for n in (6, 5, 5))
    _, on = attentions("unet", PLADIS())
    mask = torch.zeros(2, 6, 5)
    mask[..., 3:] = -torch.inf
    for lam in (1.0, 2.0):
        made = _sharpened(on, PLADIS(lam=lam), q, k, v, mask)
        shorter = _sharpened(on, PLADIS(lam=lam), q, k[:, :3], v[:, :3], None)
        assert torch.allclose(made, shorter, atol=1e-5)


def _sharpened(model, settings, q, k, v, mask):
    """What a cross-attention's attention function gives under ``settings``."""
    from quickstep_under_test.nodes.sites import tuning

    change = tuning._pladis(model, settings)
    network = model.model.diffusion_model
    _, overrides, _ = change(network, None, {})
    module = network.middle_block[1].transformer_blocks[0].attn2
    caught = {}
    original = module.forward
    vars(module)["forward"] = lambda *a, transformer_options=None, **kw: caught.update(transformer_options)
    try:
        _, overrides, _ = change(network, None, {})
        overrides[module](q, context=k, transformer_options={})
    finally:
        vars(module).pop("forward")
    assert module.forward == original
    return optimized_attention(q, k, v, 2, mask=mask, transformer_options=caught)


# Block Skip


def file_of(*units):
    rows = [{"name": n, "whole": w, "work": 0.02, "scores": [0.1]} for n, w in units]
    return Artifact(KIND, {"units": rows})


@pytest.mark.parametrize(
    ("name", "path", "whole"),
    [
        ("unet", "middle_block.1.transformer_blocks.0.attn1", False),
        ("unet", "input_blocks.1.1.transformer_blocks.0.attn2", False),
        ("sdxl", "middle_block.1.transformer_blocks.1.ff", False),
        ("flux", "double_blocks.1", True),
        ("flux", "single_blocks.0", True),
        ("sd3", "joint_blocks.0", True),
        ("wan", "blocks.1", True),
    ],
)
def test_a_part_is_left_out_and_its_input_passes_on(name, path, whole):
    model = model_of(name)
    part = dict(model.model.diffusion_model.named_modules())[path]
    inside = next(m for m in part.modules() if isinstance(m, torch.nn.Linear))
    calls = []
    handle = inside.register_forward_hook(lambda *_: calls.append(None))
    try:
        settings = BlockSkip(file_of((path, whole)), start_percent=0.0, end_percent=1.0)
        made = sample(attach.attach(model, settings), name)
        assert not calls
        plain = sample(model, name)
    finally:
        handle.remove()
    assert made.isfinite().all() and not torch.equal(made, plain)
    with torch.no_grad():  # zero its contribution by its weights instead
        if name == "unet":
            last_linear = part.to_out[0] if "attn" in path else part.net[2]
            kept = [p.clone() for p in last_linear.parameters()]
            for p in last_linear.parameters():
                p.zero_()
            zeroed = sample(model, name)
            for p, value in zip(last_linear.parameters(), kept, strict=True):
                p.copy_(value)
            assert torch.allclose(made, zeroed, atol=1e-6)


def test_block_skip_works_inside_its_window_and_says_what_it_saves():
    settings = BlockSkip(
        file_of(("middle_block.1.transformer_blocks.0.attn1", False)), start_percent=0.0, end_percent=1.0
    )
    on = attach.attach(model_of("unet"), settings)
    sample(on)
    assert last(on).work == pytest.approx(0.98)
    both = attach.attach(attach.attach(model_of("unet"), FORA(interval=2, warmup=1, tail=0)), settings)
    sample(both)
    fora = attach.attach(model_of("unet"), FORA(interval=2, warmup=1, tail=0))
    sample(fora)
    assert last(both).work == last(fora).work  # the cache's parts are the cache's
    off = attach.attach(model_of("unet"), BlockSkip(settings.calibration, start_percent=1.0, end_percent=1.0))
    assert torch.equal(sample(off), sample(model_of("unet")))


def test_scores_of_another_model_are_refused_or_reported(caplog):
    with pytest.raises(ValueError, match="choose scores"):
        attach.attach(model_of("unet"), BlockSkip())
    with pytest.raises(ValueError, match="has no part 'double_blocks"):
        attach.attach(model_of("unet"), BlockSkip(file_of(("double_blocks.1", True))))


@pytest.mark.parametrize("name", ["unet", "sd3", "flux"])
def test_sensitivity_is_measured_saved_and_used(name, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(artifacts, "free_path", lambda n, suffix, taker: str(tmp_path / f"{n}{suffix}"))
    monkeypatch.setattr(sensitivity, "STEPS", 6)
    model, (positive, negative) = model_of(name), conds(name)
    given = {"samples": latent(name)}
    if name == "sd3":  # two blocks are a first and a last one
        with pytest.raises(ValueError, match="nothing to leave out"):
            sensitivity.BlockSensitivity.execute(model, positive, negative, given, 4.0, 0, "scores")
        return
    before = sample(model, name)
    file, text = sensitivity.BlockSensitivity.execute(model, positive, negative, given, 4.0, 0, "scores").result
    assert torch.equal(sample(model, name), before)
    found = load(tmp_path / file, KIND)
    units = BlockSkip(found).units()
    assert len(units) == (21 if name == "unet" else 3) and len(text.splitlines()) == len(units)
    assert all(len(u.scores) == 3 and min(u.scores) > 0 and 0 < u.work < 0.5 for u in units)
    on = attach.attach(
        model, BlockSkip(found, budget=0.5 if name == "flux" else 0.05, start_percent=0.0, end_percent=1.0)
    )
    with FlopCounterMode(display=False) as part:
        sample(on, name, steps=1)
    with FlopCounterMode(display=False) as whole:
        sample(model, name, steps=1)
    share = part.get_total_flops() / whole.get_total_flops()
    assert last(on).work < 1.0 and abs(last(on).work - share) < (0.06 if name == "flux" else 0.01)
    other = MAKERS[name](seed=1)
    with caplog.at_level(logging.WARNING):
        attach.attach(other, BlockSkip(found))
    assert "the scores may not fit" in caplog.text


def test_a_model_with_an_accelerator_is_not_scanned():
    on = attach.attach(model_of("unet"), SkipTuning())
    with pytest.raises(ValueError, match="has an accelerator on it"):
        sensitivity.scan(on, *conds("unet"), latent("unet"), 4.0, 0)
