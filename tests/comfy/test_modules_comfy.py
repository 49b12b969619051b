"""Reuse of layers inside a real ComfyUI: FORA, PAB, Token Cache on small networks with random weights."""

import importlib.util
import sys
from functools import cache
from pathlib import Path

import comfy.supported_models as families
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from quickstep_under_test.nodes import attach
from quickstep_under_test.nodes.sites.layers import at, blocks_of
from quickstep_under_test.nodes.sites.modules import modules, unet_work
from quickstep_under_test.solvers.caching.accelerator import Plan
from quickstep_under_test.solvers.caching.fora import FORA
from quickstep_under_test.solvers.caching.pab import PAB
from quickstep_under_test.solvers.caching.token_cache import TokenCache
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
SMALL = {
    "wan": (families.WAN21_T2V, {"model_type": "t2v", "dim": 96, "ffn_dim": 192, "num_heads": 2, "num_layers": 3, "text_dim": 32,
                                 "freq_dim": 64, "in_dim": 16, "out_dim": 16, "text_len": 16}),
    "ltxv": (families.LTXV, {"in_channels": 16, "num_layers": 3, "attention_head_dim": 32, "cross_attention_dim": 64,
                             "num_attention_heads": 2, "caption_channels": 32}),
    "lumina": (families.Lumina2, {"patch_size": 2, "in_channels": 16, "dim": 96, "n_layers": 3, "n_refiner_layers": 1,
                                  "n_heads": 2, "n_kv_heads": 2, "qk_norm": True, "cap_feat_dim": 32,
                                  "axes_dims": [16, 16, 16], "axes_lens": [64, 64, 64]}),
    "qwen": (families.QwenImage, {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 48, "in_channels": 64,
                                  "joint_attention_dim": 32, "axes_dims_rope": [16, 16, 16]}),
    "pixart": (families.PixArtAlpha, {"hidden_size": 96, "depth": 3, "num_heads": 2, "caption_channels": 32,
                                      "micro_condition": False, "pe_interpolation": 1.0}),
    "cosmos": (families.CosmosT2IPredict2, {"in_channels": 16, "out_channels": 16, "max_img_h": 32, "max_img_w": 32,
                                            "max_frames": 4, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 96,
                                            "num_blocks": 3, "num_heads": 2, "crossattn_emb_channels": 32,
                                            "pos_emb_cls": "rope3d"}),
}  # fmt: skip
VIDEO = {"wan": 16, "ltxv": 16, "qwen": 16, "cosmos": 16}
MADE = {"unet": M.unet, "sdxl": M.sdxl, "sd3": M.sd3, "flux": M.flux}
NAMES = (*MADE, *SMALL)


@cache
def model_of(name):
    return MADE[name]() if name in MADE else M.build(*SMALL[name])


def size_of(name):
    return 40 if name == "pixart" else 8  # its positions divide by a size in units of 64


def sample(model, name, steps=6, size=None, **options):
    wide = {"unet": {}, "sdxl": {"pooled": 1280}}.get(name, {"width": 32, "pooled": 32})
    x = M.latent(1, 4 if name in ("unet", "sdxl", "pixart") else 16, size or size_of(name))
    if name in VIDEO:
        x = x[:, :, None]
    if name == "ltxv":
        wide["attention_mask"] = torch.ones(1, 8, dtype=torch.int64)
    conds = M.conditioning(1, **wide), M.conditioning(2, **wide)
    return M.sample(model, steps=steps, positive=conds[0], negative=conds[1], x=x, **options)


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def last(model):
    return attach.ledger_of(model).runs[-1]


def runs(model, run):
    """How often each layer computed something, by path."""
    counts, handles = {}, []
    for block in blocks_of(model.model.diffusion_model):
        for layer, module in block.layers:
            part = next(m for m in module.modules() if isinstance(m, torch.nn.Linear))
            counts[layer.name] = 0

            def count(*_, name=layer.name):
                counts[name] += 1

            handles.append(part.register_forward_hook(count))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return counts


EVERY_OTHER = {"warmup": 1, "tail": 0}


@pytest.mark.parametrize("name", NAMES)
def test_layers_of_every_family_are_reused_and_off_changes_no_bit(name):
    model = model_of(name)
    plain = sample(model, name)
    assert torch.equal(sample(attach.attach(model, FORA(interval=1)), name), plain)
    on = attach.attach(model, FORA(interval=2, **EVERY_OTHER))
    counts = runs(on, lambda: sample(on, name))
    assert counts and set(counts.values()) == {3}
    assert last(on).full == 3 and last(on).partial == 3 and last(on).work < 0.9
    assert torch.isfinite(made := sample(on, name)).all() and not torch.equal(made, plain)


class Same:
    """Calls of the network at one and the same input, each with a plan."""

    def __init__(self, name, settings, patches=None, **options):
        self.name, self.model, self.settings = name, model_of(name), settings
        self.wrapper = modules(self.model, settings, "key", "record")[WrappersMP.APPLY_MODEL]
        self.options = {"patches": patches or {}, **options}

    def __call__(self, times=(3.0, 2.0), x=None):
        from quickstep_under_test.solvers.caching.accelerator import Run

        session = self.settings.start(Run([4.0, 3.0, 2.0, 1.0, 0.0]))
        made, g = [], torch.Generator().manual_seed(0)
        shape = (2, 4 if self.name in ("unet", "pixart") else 16, size_of(self.name), size_of(self.name))
        x = torch.randn(shape, generator=g)
        context = torch.randn(2, 8, 64 if self.name == "unet" else 32, generator=g)
        pooled = None if self.name in ("unet", "pixart") else torch.randn(2, 32, generator=g)

        class Executor:
            class_obj = self.model.model

            def __call__(self, x, t, c_concat, c_crossattn, control, transformer_options, **more):
                net = self.class_obj.diffusion_model
                return net(x.clone(), t, context=c_crossattn, y=pooled, transformer_options=dict(transformer_options))

        for t in times:
            with session.call(t), torch.inference_mode():
                options = {**self.options, "key": session, "uuids": ["a", "b"], "cond_or_uncond": [0, 1]}
                made.append(
                    (session.plan, self.wrapper(Executor(), x, torch.full((2,), 0.5), None, context, None, options))
                )
        return made


@pytest.mark.parametrize("name", ["unet", "sd3", "flux", "pixart"])
def test_at_the_same_input_reuse_gives_the_same(name):
    (full, a), (partial, b) = Same(name, FORA(interval=2, **EVERY_OTHER))()
    assert (full, partial) == (Plan.FULL, Plan.PARTIAL)
    assert float((a - b).norm() / a.norm()) < 1e-6


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_joint_attention_of_another_pack_is_called_and_kept(name):
    seen = []

    def other(func, *args, **kwargs):
        seen.append(None)
        return 0.5 * func(*args, **kwargs)

    settings = PAB(spatial=2, start_percent=0.0, end_percent=1.0, **EVERY_OTHER)
    (_, a), (plan, b) = Same(name, settings, optimized_attention_override=other)()
    attentions = 2 if name == "sd3" else 5
    assert plan is Plan.PARTIAL and len(seen) == attentions
    assert float((a - b).norm() / a.norm()) < 1e-6
    (_, c), _ = Same(name, settings)()
    assert not torch.allclose(a, c)


def test_placeholders_are_not_shown_to_a_patch_of_queries_and_keys():
    seen = []

    def watch(q, k, v, **kwargs):
        seen.append(float(q.abs().sum()))
        return {}

    Same("flux", PAB(spatial=2, start_percent=0.0, end_percent=1.0, **EVERY_OTHER), patches={"attn1_patch": [watch]})()
    assert len(seen) == 10 and min(seen) > 0.0


@pytest.mark.parametrize(("settings", "same"), [(PAB(spatial=2, cross=2, start_percent=0.0, end_percent=1.0,
                                                     **EVERY_OTHER), True),
                                                (FORA(interval=2, **EVERY_OTHER), False)], ids=["PAB", "FORA"])  # fmt: skip
def test_tokens_that_another_pack_moves_are_not_taken_from_the_call_before(settings, same):
    """Token merging gives a UNet's attention its tokens in another order in every call."""
    orders = []

    def mix(q, context, value, options):
        orders.append(torch.randperm(q.shape[1], generator=torch.Generator().manual_seed(len(orders))))
        return q[:, orders[-1]], context, value

    def back(out, options):
        return out[:, orders[-1].argsort()]

    (_, a), (plan, b) = Same("unet", settings, patches={"attn1_patch": [mix], "attn1_output_patch": [back]})()
    assert plan is Plan.PARTIAL and float((a - b).norm() / a.norm()) < 1e-6
    model = model_of("unet").clone()
    model.set_model_attn1_patch(mix)
    model.set_model_attn1_output_patch(back)
    made, plain = sample(attach.attach(model, settings), "unet"), sample(model, "unet")
    assert (float((made - plain).norm() / plain.norm()) < 1e-5) == same  # feed-forward layers are reused all the same


def test_each_kind_has_its_own_interval():
    model = model_of("wan")
    on = attach.attach(model, PAB(spatial=2, cross=4, mlp=1, start_percent=0.0, end_percent=1.0, **EVERY_OTHER))
    counts = runs(on, lambda: sample(on, "wan", steps=8))
    for name, count in counts.items():
        assert count == (4 if "self_attn" in name else 2 if "cross_attn" in name else 8)


def test_flux_single_blocks_reuse_attention_alone_and_both():
    model = model_of("flux")
    block = model.model.diffusion_model.single_blocks[0]
    for settings, expected in (
        (FORA(interval=2, **EVERY_OTHER), 3),
        (PAB(spatial=2, start_percent=0.0, **EVERY_OTHER), 6),
    ):
        calls = []
        handle = block.linear1.register_forward_hook(lambda *_, calls=calls: calls.append(None))
        sample(attach.attach(model, settings), "flux")
        handle.remove()
        assert len(calls) == expected


@pytest.mark.parametrize("name", ["unet", "sd3", "flux", "wan"])
def test_token_cache_computes_a_part_of_the_tokens_of_feed_forward_layers_only(name):
    model = model_of(name)
    sizes, handles = {}, []
    for block in blocks_of(model.model.diffusion_model):
        for layer, module in block.layers:
            part = next(m for m in module.modules() if isinstance(m, torch.nn.Linear))
            handles.append(
                part.register_forward_hook(lambda m, a, o, n=layer: sizes.setdefault(n, []).append(a[0].shape[1]))
            )
    on = attach.attach(model, TokenCache(interval=2, ratio=0.25, **EVERY_OTHER))
    sample(on, name)
    for handle in handles:
        handle.remove()
    for layer, seen in sizes.items():
        reduced = {seen[0], round(0.25 * seen[0])} if layer.kind == "mlp" else {seen[0]}
        assert set(seen) == reduced, layer
    assert 0.5 < last(on).work < 1.0
    assert torch.equal(
        sample(attach.attach(model, TokenCache(interval=2, ratio=1.0, **EVERY_OTHER)), name), sample(model, name)
    )


@pytest.mark.parametrize(
    "settings", [FORA(interval=2, **EVERY_OTHER), TokenCache(interval=2, ratio=0.25, **EVERY_OTHER)], ids=str
)
def test_the_work_of_a_unet_is_what_its_layers_multiply(settings):
    model = model_of("unet")
    network = model.model.diffusion_model
    on = attach.attach(model, settings)

    def flops(steps, model):
        with FlopCounterMode(display=False) as counter:
            sample(model, "unet", steps=steps)
        return counter.get_total_flops()

    whole = flops(2, model) / 2 / 2
    assert abs(unet_work(network, (2, 4, 8, 8), 8) / whole - 1) < 0.02
    share = flops(2, on) / flops(2, model)
    assert share < 0.95 and abs(last(on).work - share) < 0.01


THREE = (
    FORA(interval=2, **EVERY_OTHER),
    TokenCache(interval=2, ratio=0.25, **EVERY_OTHER),
    PAB(spatial=2, start_percent=0.0, end_percent=1.0, **EVERY_OTHER),
)


@pytest.mark.parametrize("settings", THREE, ids=lambda settings: settings.id)
@pytest.mark.parametrize("name", ["sd3", "flux", "wan", "qwen"])
def test_the_work_of_a_transformer_is_what_its_layers_multiply(settings, name):
    """Embeddings and modulations are not counted; of small networks they are a few percent."""

    def flops(model):
        with FlopCounterMode(display=False) as counter:
            sample(model, name, steps=2, size=16, cfg=1.0)
        return counter.get_total_flops()

    on = attach.attach(model_of(name), settings)
    share = flops(on) / flops(model_of(name))
    assert share < 0.95 and abs(last(on).work - share) < 0.06


def test_what_another_pack_replaces_is_computed():
    model = model_of("unet").clone()
    model.set_model_attn1_replace(lambda q, k, v, extra: v, "middle", 0)
    on = attach.attach(model, FORA(interval=2, **EVERY_OTHER))
    counts = runs(on, lambda: sample(on, "unet"))
    assert counts["middle_block.1.transformer_blocks.0.attn1"] == 6
    assert counts["middle_block.1.transformer_blocks.0.ff"] == 3


def test_models_without_known_layers_are_refused_in_one_sentence():
    for settings in (FORA(), PAB(), TokenCache()):
        with pytest.raises(ValueError, match="whose layers are not known here; it works on"):
            attach.attach(M.gaussian("flow"), settings)


def test_a_small_cache_computes_instead_and_a_cache_beside_the_model_or_not_is_the_same():
    model = model_of("sd3")
    settings = {"interval": 2, "order": 1, **EVERY_OTHER}
    made = sample(attach.attach(model, FORA(**settings)), "sd3")
    assert torch.equal(sample(attach.attach(model, FORA(cache_device="cpu", **settings)), "sd3"), made)
    assert at(model.model.diffusion_model, "joint_blocks.0.nothing") is None
