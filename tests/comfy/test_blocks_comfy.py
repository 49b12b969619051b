"""Gates on transformer blocks inside a real ComfyUI, on small DiTs with random weights."""

import importlib.util
import sys
from pathlib import Path

import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from quickstep_under_test.nodes import attach
from quickstep_under_test.nodes.calibrate_blocks import CalibrateBlocks
from quickstep_under_test.nodes.sites import families
from quickstep_under_test.nodes.sites.blocks import blocks
from quickstep_under_test.nodes.sites.scoped import scoped
from quickstep_under_test.solvers.artifact import load
from quickstep_under_test.solvers.caching import profile
from quickstep_under_test.solvers.caching.accelerator import Plan, Run
from quickstep_under_test.solvers.caching.delta_dit import DeltaDiT
from quickstep_under_test.solvers.caching.first_block import DBCache, FirstBlockCache
from quickstep_under_test.solvers.caching.magcache import MagCache
from quickstep_under_test.solvers.caching.taylorseer import TaylorSeer
from quickstep_under_test.solvers.caching.teacache import TeaCache
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


M, D = _beside("models"), _beside("dits")
KEY = "quickstep.test"


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=D.DITS)
def dit(request):
    return D.DITS[request.param]()


def error(a, b):
    return float((a - b).norm() / b.norm())


class Bench:
    """One network pass at a time, with the plan of one's choice."""

    def __init__(self, dit, settings):
        self.dit = dit
        self.session = settings.start(Run([1.0, 0.6, 0.3, 0.0]))
        self.wrapper = blocks(dit.model, settings, KEY, attach.FORWARD)[WrappersMP.APPLY_MODEL]
        self.chain = families.chain(dit.network, "", "")
        self.ran = []

    def __call__(self, plan, x, t, context, control=None, **options):
        self.session.plan, self.session.t, self.session.verdict = plan, float(t[0]), None
        self.session._seen.clear()
        self.record = attach.Meter().forward(1)
        options = {
            KEY: self.session, attach.FORWARD: self.record,
            "wrappers": {WrappersMP.APPLY_MODEL: {KEY: [self.wrapper]}} if plan else {}, **options,
        }  # fmt: skip
        ran = []
        taps = {
            block: (lambda *args, i=i, inner=block.forward, **kwargs: (ran.append(i), inner(*args, **kwargs))[1])
            for i, block in enumerate(self.chain.blocks)
        }
        with scoped(taps):
            out = self.dit.call(x, t, context, options, control)
        self.ran = ran
        assert not any("forward" in vars(m) for m in self.dit.network.modules())
        return out


SPANS = {
    "front 1": FirstBlockCache(threshold=2.0),
    "front 2 back 1": DBCache(threshold=2.0, Fn=2, Bn=1),
    "all": TaylorSeer(interval=9),
    "all but the back half": DeltaDiT(interval=9, b=0.0),
    "back half": DeltaDiT(interval=9, b=1.0),
}


@pytest.mark.parametrize("settings", SPANS.values(), ids=SPANS)
def test_a_hit_with_the_same_input_is_the_full_pass(dit, settings):
    """Every row of the table of families, for every part of the chain that may be left out."""
    found = families.chain(dit.network, "", "")
    n = len(found)
    if (settings.id == "DBCache" and n <= 3) or (found.family.skips and settings == SPANS["all but the back half"]):
        with pytest.raises(ValueError, match=r"leave none|late blocks of HunyuanDiT"):
            Bench(dit, settings)
        return
    bench = Bench(dit, settings)
    first, end = settings.spans(n)[0]
    given, other = dit.inputs(), dit.inputs(1, sigma=0.3)
    plain = bench(None, *given)
    assert bench.ran == list(range(n))
    full = bench(Plan.FULL, *given)
    assert torch.equal(plain, full) and bench.ran == list(range(n))
    hit = bench(Plan.PARTIAL, *given)
    assert bench.ran == [i for i in range(n) if not first <= i < end]
    assert error(hit, full) <= 1e-6
    assert 0.0 < bench.record.share < 1.0
    # With another input the blocks that stay see it, and the answer is another one.
    moved = bench(Plan.PARTIAL, *other)
    assert len(bench.ran) == n - (end - first)
    assert not torch.equal(moved, hit) and not torch.equal(moved, bench(None, *other))


WATCHES = {"change": FirstBlockCache(threshold=0.02), "modulated": TeaCache(threshold=0.5)}


@pytest.mark.parametrize("settings", WATCHES.values(), ids=WATCHES)
def test_what_is_watched_sees_the_input_and_decides(dit, settings):
    bench = Bench(dit, settings)
    given = dit.inputs()
    shown = []
    bench.session.keep = lambda keys, residual, watched, keep=bench.session.keep: (
        shown.append(watched), keep(keys, residual, watched)
    )  # fmt: skip
    bench(Plan.FULL, *given)
    (watched,) = shown
    assert len(watched) == 2 and watched.isfinite().all() and float(watched.std()) > 0
    bench(Plan.PARTIAL, *given)
    assert len(bench.ran) < len(bench.chain) and len(shown) == 1
    # Far away in input and time: the same session says no.
    x, t, context = dit.inputs(5, sigma=0.02)
    bench(Plan.PARTIAL, 4 * x, t, context)
    assert len(bench.ran) == len(bench.chain) and len(shown) == 2
    # The time alone moves the modulated input.
    if settings.id == "TeaCache" and bench.chain.layouts[0].modulated is not None:
        bench(Plan.FULL, given[0], torch.full_like(given[1], 0.1), given[2])
        assert not torch.equal(shown[-1], watched)


@pytest.mark.parametrize("name", ["flux", "sd3", "ltxv", "aura"])
def test_what_is_kept_does_not_change_when_the_network_writes_into_it(name):
    """Flux and LTX-Video add to their hidden states in place: a second hit must give what the first one gave."""
    dit = D.DITS[name]()
    bench = Bench(dit, TaylorSeer(interval=9))
    given, other = dit.inputs(), dit.inputs(1)
    full = bench(Plan.FULL, *given)
    for _ in range(2):
        bench(Plan.PARTIAL, *other)
    assert error(bench(Plan.PARTIAL, *given), full) <= 1e-6


def residuals(dit, x, scale=0.5):
    tokens = x.shape[-1] * x.shape[-2] // 4
    hidden = dit.network.hidden_size
    g = torch.Generator().manual_seed(3)
    made = [scale * torch.randn(len(x), tokens, hidden, generator=g) for _ in range(3)]
    return {"input": [made[0], None, made[1]], "output": made[1:]}


@pytest.mark.parametrize("settings", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("name", ["flux", "sd35", "chroma"])
def test_controlnet_residuals_arrive_once(name, settings):
    dit = D.DITS[name]()
    if settings.id == "DBCache" and len(families.chain(dit.network, "", "")) <= 3:
        settings = DBCache(threshold=2.0, Fn=1, Bn=1)
    bench = Bench(dit, settings)
    given = dit.inputs()
    control = residuals(dit, given[0])
    full = bench(Plan.FULL, *given, control=control)
    assert torch.equal(full, bench(None, *given, control=control))
    assert not torch.equal(full, bench(None, *given))
    bench(Plan.FULL, *given, control=control)
    hit = bench(Plan.PARTIAL, *given, control=control)
    assert error(hit, full) <= 1e-6 and len(bench.ran) < len(bench.chain)


@pytest.mark.parametrize("name", ["flux", "sd35", "wan", "qwen"])
def test_replaced_blocks_are_still_replaced(name):
    """Patches of other packs see every block that runs, and what they change is in the result."""
    dit = D.DITS[name]()
    bench = Bench(dit, DBCache(threshold=2.0, Fn=1, Bn=1))
    given, seen = dit.inputs(), []

    def tripled(args, extra):
        seen.append(1)
        out = extra["original_block"](args)
        return {key: value if value is None else 3.0 * value for key, value in out.items()}

    def options():
        return {"patches_replace": {"dit": {("double_block", 0): tripled}}}

    plain = bench(None, *given)
    patched = bench(None, *given, **options())
    full = bench(Plan.FULL, *given, **options())
    assert torch.equal(full, patched) and not torch.equal(patched, plain) and len(seen) == 2
    hit = bench(Plan.PARTIAL, *given, **options())
    assert error(hit, full) <= 1e-6 and len(seen) == 3 and len(bench.ran) == 2
    # A pass with other replacements is another branch: what was kept with these is not used in it.
    assert torch.equal(bench(Plan.PARTIAL, *given), plain) and len(bench.ran) == len(bench.chain)


@pytest.mark.parametrize("settings", [TaylorSeer(interval=9), FirstBlockCache(), TeaCache()], ids=lambda s: s.id)
def test_a_pass_that_leaves_out_blocks_by_itself_is_left_alone(settings):
    """Skip-layer guidance replaces blocks by nothing: the ends of the span may not be there."""
    dit = D.DITS["sd35"]()
    bench = Bench(dit, settings)
    given = dit.inputs()
    for skipped in (0, 1, 2):
        dit_patch = {("double_block", skipped): lambda args, extra: args}
        options = {"patches_replace": {"dit": dit_patch}}
        plain = bench(None, *given, **options)
        assert torch.equal(bench(Plan.FULL, *given, **options), plain)
        assert error(bench(Plan.PARTIAL, *given, **options), plain) <= 1e-6


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "qwen", "hunyuan_video", "pixart", "ltxv"])
@pytest.mark.parametrize("settings", [FirstBlockCache(threshold=2.0), TaylorSeer(interval=9)], ids=lambda s: s.id)
def test_the_share_of_work_is_what_torch_counts(name, settings):
    dit = D.DITS[name]()
    bench = Bench(dit, settings)
    given, counted = dit.inputs(), []
    for plan in (Plan.FULL, Plan.PARTIAL):
        with FlopCounterMode(display=False) as flops:
            bench(plan, *given)
        counted.append(flops.get_total_flops())
    assert bench.record.share == pytest.approx(counted[1] / counted[0], abs=0.03)


def test_other_networks_are_refused_by_name():
    for made in (M.unet(), M.gaussian()):
        kind = type(made.model.diffusion_model).__name__
        with pytest.raises(ValueError, match=f"TeaCache: this model is a {kind} .*works on Flux, Chroma, SD 3"):
            attach.attach(made, TeaCache())


def test_a_subclass_is_another_network():
    made = M.flux()
    made.model.diffusion_model.__class__ = type("Mine", (type(made.model.diffusion_model),), {})
    with pytest.raises(ValueError, match="this model is a Mine"):
        attach.attach(made, TeaCache())


def test_a_polynomial_of_another_family_is_refused():
    with pytest.raises(ValueError, match="made for Flux, and the model is SD 3"):
        attach.attach(M.sd3(), TeaCache(polynomial="Flux"))
    attach.attach(M.flux(), TeaCache(polynomial="Flux Kontext"))


def test_calibration_of_a_model_and_its_use(folder):
    model = M.sd3()
    conds = [M.conditioning(seed, width=32, pooled=32) for seed in (1, 2)]
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", 12)
    given = dict(cfg=3.0, sampler=comfy.samplers.ksampler("euler"), sigmas=sigmas, seed=1, name="mine")
    given.update(positive=conds[0], negative=conds[1], latent={"samples": M.latent(1, 16)})
    with torch.inference_mode():
        (file,) = CalibrateBlocks.execute(model, **given).args
    assert file == "mine.json"
    found = load(folder / file, profile.KIND)
    known = found.found_for
    assert (known.steps, known.cfg, known.shape, known.process) == (12, 3.0, (16, 8, 8), "flow")
    made = profile.BlockProfile.of(found)
    assert (made.network, made.blocks) == (type(model.model.diffusion_model).__name__, 2)
    assert len(made.at) == 12 and made.growth(made.at[0], made.at[-1]) != 1.0

    for settings in (
        MagCache(calibration=found, threshold=5.0, start_percent=0.0),
        TeaCache(calibration=found, threshold=5.0),
    ):
        on = attach.attach(model, settings)
        run = dict(positive=conds[0], negative=conds[1], x=M.latent(1, 16))
        M.sample(on, steps=12, cfg=3.0, **run)
        report = attach.ledger_of(on).runs[-1]
        assert report.partial > 3 and not report.notes
        M.sample(on, steps=20, cfg=5.0, **run)
        said = attach.ledger_of(on).runs[-1].line()
        assert "CFG 3, and this is CFG 5" in said and "12 steps, and this is 20 steps" in said
        M.sample(on, steps=12, cfg=3.0, **{**run, "x": M.latent(1, 16, 16)})
        assert "shape (16, 8, 8), and this is latents of shape (16, 16, 16)" in attach.ledger_of(on).runs[-1].line()
        with pytest.raises(ValueError, match="calibration was made with another model"):
            attach.attach(M.sd3(seed=1), settings)
        with pytest.raises(ValueError, match="calibration was made with another model"):
            attach.attach(M.flux(), settings)
    with pytest.raises(ValueError, match="TaylorSeer is on this model"):
        CalibrateBlocks.execute(attach.attach(model, TaylorSeer()), **given)
    with pytest.raises(ValueError, match="at least three"), torch.inference_mode():
        CalibrateBlocks.execute(model, **{**given, "sigmas": sigmas[-2:]})


def test_a_scope_leaves_no_trace_and_nests():
    layer = torch.nn.Linear(2, 2)
    heard = []
    layer.register_forward_hook(lambda *args: heard.append(1))
    x = torch.ones(1, 2)
    plain = layer(x)
    with scoped({layer: (lambda x, inner=layer.forward: inner(x) + 1)}):
        assert torch.equal(layer(x), plain + 1)
        with scoped({layer: (lambda x, inner=layer.forward: inner(x) * 2)}):
            assert torch.equal(layer(x), (plain + 1) * 2)
        assert torch.equal(layer(x), plain + 1)
        with pytest.raises(KeyError), scoped({layer: lambda x: x}):
            raise KeyError
        assert torch.equal(layer(x), plain + 1)
    assert torch.equal(layer(x), plain) and "forward" not in vars(layer) and len(heard) == 6
