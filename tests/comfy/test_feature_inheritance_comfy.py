"""Feature inheritance inside a real ComfyUI, on small UNets with random weights."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from quickstep_under_test.nodes import attach
from quickstep_under_test.nodes.sites.unet_inheritance import feature_inheritance, places
from quickstep_under_test.solvers.caching.accelerator import Plan, Run
from quickstep_under_test.solvers.caching.deepcache import DeepCache
from quickstep_under_test.solvers.caching.feature_inheritance import LEVELS, FeatureInheritance
from quickstep_under_test.solvers.report import Forward
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
KEY = attach.key_of(FeatureInheritance())


@pytest.fixture(scope="module")
def model():
    return M.unet()


@pytest.fixture(scope="module")
def wide():
    return M.sdxl()


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def distance(a, b):
    return float((a - b).norm() / b.norm())


def last(model):
    return attach.ledger_of(model).runs[-1]


def inputs(seed=0, batch=2, size=8):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, size, size, generator=g)
    return x, torch.full((batch,), 500.0 + 100 * seed), torch.randn(batch, 8, 64, generator=g)


class Bench:
    """One network call at a time, with the plan of one's choice."""

    def __init__(self, model, settings, patches=None):
        self.network, self.patches = model.model.diffusion_model, patches or {}
        self.session = settings.start(Run([float(9 - i) for i in range(10)]))
        self.wrapper = feature_inheritance(model, settings, KEY, attach.FORWARD)[WrappersMP.APPLY_MODEL]
        self.record = Forward(1)

    def __call__(self, plan, x, t, context, uuids=("c", "u"), **more):
        self.session.plan, self.session.t, self.session.phase = plan, 9.0, 0 if plan is Plan.FULL else 1
        self.session._seen.clear()
        options = {KEY: self.session, "uuids": list(uuids), "cond_or_uncond": list(range(len(uuids)))}
        options |= {"patches": self.patches, attach.FORWARD: self.record}

        def network(x, t, c_concat, c_crossattn, control, options, **kwargs):
            return self.network(x, t, context=c_crossattn, control=control, transformer_options=dict(options), **kwargs)

        network.class_obj = SimpleNamespace(diffusion_model=self.network, current_patcher=None)
        with torch.inference_mode():
            if plan is None:
                return network(x, t, None, context, None, options, **more)
            return self.wrapper(network, x, t, None, context, None, options, **more)


@pytest.mark.smoke
@pytest.mark.parametrize("inherit", LEVELS)
def test_partial_equals_full_for_the_same_input(model, wide, inherit):
    """In every bit for blocks and units; layers add what they keep to their input again, so within rounding."""
    for network, more in ((model, {}), (wide, {"y": torch.randn(2, 1280 + 6 * 256)})):
        for fresh in (1, 2):
            bench = Bench(network, FeatureInheritance(inherit=inherit, fresh=fresh))
            x, t, context = inputs()
            plain, full = bench(None, x, t, context, **more), bench(Plan.FULL, x, t, context, **more)
            assert torch.equal(plain, full) and bench.record.share == 1.0
            partial = bench(Plan.PARTIAL, x, t, context, **more)
            assert bench.record.share < 1.0
            kinds = set(LEVELS[inherit])
            exact = not kinds & {"resnet", "transformer"}
            assert torch.equal(partial, full) if exact else distance(partial, full) < 2e-6
            assert not any("forward" in vars(m) for m in bench.network.modules())


@pytest.mark.parametrize("inherit", LEVELS)
def test_partial_inherits_and_computes_the_rest_anew(model, inherit):
    bench = Bench(model, FeatureInheritance(inherit=inherit))
    (x, t, context), other = inputs(), inputs(1)
    bench(Plan.FULL, x, t, context)
    made = bench(Plan.PARTIAL, *other)
    assert not torch.equal(made, bench(None, *other)) and not torch.equal(made, bench(None, x, t, context))


@pytest.mark.parametrize("inherit", LEVELS)
def test_the_share_of_work_is_what_torch_counts(model, wide, inherit):
    for network, more in ((model, {}), (wide, {"y": torch.randn(2, 1280 + 6 * 256)})):
        bench = Bench(network, FeatureInheritance(inherit=inherit))
        x, t, context = inputs(size=32)
        counted = []
        for plan in (None, Plan.FULL, Plan.PARTIAL):  # what a full call computes to keep it counts for nothing
            with FlopCounterMode(display=False) as flops:
                bench(plan, x, t, context, **more)
            counted.append(flops.get_total_flops())
        assert bench.record.share == pytest.approx(counted[2] / counted[0], rel=0.02)
        assert counted[1] < 1.05 * counted[0]


def test_what_inherits(model):
    network = model.model.diffusion_model

    def kinds(**settings):
        return [place.kind for place in places(network, FeatureInheritance(**settings))]

    inner = len(network.input_blocks) + 1 + len(network.output_blocks) - 4
    assert kinds(inherit="blocks") == ["block"] * inner
    assert set(kinds(inherit="layers")) == {"resnet", "transformer"} and set(kinds(inherit="units")) == {
        "attn1", "attn2", "ff"}  # fmt: skip
    assert len(kinds(inherit="self_attention")) == kinds(inherit="units").count("attn1") > 0
    assert kinds(fresh=30) == []


def test_patched_attention_is_computed(model):
    """Token merging hands attention other tokens in every step."""
    patches = {"attn1_patch": [lambda q, context, value, options: (q, context, value)]}
    for inherit, share in (("self_attention", 1.0), ("feed_forward", None)):
        bench = Bench(model, FeatureInheritance(inherit=inherit), patches)
        x, t, context = inputs()
        bench(Plan.FULL, x, t, context)
        bench(Plan.PARTIAL, x, t, context)
        assert bench.record.share == share if share else bench.record.share < 1.0


@pytest.mark.smoke
@pytest.mark.parametrize("mode", ["together", "in turn"])
@pytest.mark.parametrize("inherit", ["blocks", "layers", "units"])
def test_a_run(model, mode, inherit):
    on = attach.attach(model, FeatureInheritance(inherit=inherit, mode=mode, warmup=1, tail=1))
    made, plain = M.sample(on, steps=9), M.sample(model, steps=9)
    assert 0 < distance(made, plain) < 0.5
    report = last(on)
    assert (report.calls, report.full) == (9, 5 if mode == "together" else 2) and 0.4 < report.work < 1
    off = attach.attach(model, FeatureInheritance(inherit=inherit, mode=mode, interval=1))
    assert torch.equal(M.sample(off, "heun", 5), M.sample(model, "heun", 5)) and last(off).cache_bytes == 0


@pytest.mark.parametrize("depth", [0, 2])
def test_inheriting_whole_blocks_is_deepcache_without_forecast(model, depth):
    blocks = FeatureInheritance(inherit="blocks", interval=3, fresh=depth + 1, warmup=1, tail=0)
    ring = DeepCache(interval=3, depth=depth, warmup=1, forecast_order="0")
    on, other = attach.attach(model, blocks), attach.attach(model, ring)
    assert torch.equal(M.sample(on, steps=9), M.sample(other, steps=9))
    assert last(on).work == pytest.approx(last(other).work) and last(on).partial == 6


def test_an_unknown_branch_is_computed(model):
    bench = Bench(model, FeatureInheritance(inherit="blocks"))
    x, t, context = inputs()
    bench(Plan.FULL, x, t, context, uuids=("a", "b"))
    assert torch.equal(bench(Plan.PARTIAL, *inputs(1), uuids=("a", "new")), bench(None, *inputs(1)))


@pytest.mark.parametrize("make", [M.sd3, M.gaussian])
def test_other_networks_are_refused(make):
    with pytest.raises(ValueError, match="Feature Inheritance: this model is a"):
        attach.attach(make(), FeatureInheritance())
