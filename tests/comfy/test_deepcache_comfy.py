"""DeepCache inside a real ComfyUI, on small UNets with random weights.

What is equal must be equal in every bit where the same numbers go through the same kernels, and within ``close`` where
batches are cut differently.
"""

import gc
import importlib.util
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import comfy.controlnet
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from quickstep_under_test.nodes import accelerators, attach
from quickstep_under_test.nodes.sites import branches, unet_ring, unet_walk
from quickstep_under_test.solvers.caching.accelerator import Plan, Run
from quickstep_under_test.solvers.caching.deepcache import DeepCache
from quickstep_under_test.solvers.caching.work import ring_share
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
KEY = attach.key_of(DeepCache())
CACHED = DeepCache(interval=3, depth=1, warmup=1)


@pytest.fixture(scope="module")
def model():
    return M.unet()


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def close(a, b):
    return float((a - b).norm() / b.norm()) < 2e-6


def deep_passes(model, run):
    """How often the middle block ran, row by row."""
    rows = []
    block = model.model.diffusion_model.middle_block[0]
    handle = block.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    try:
        run()
    finally:
        handle.remove()
    return sum(rows)


def last(model):
    return attach.ledger_of(model).runs[-1]


def free_memory(monkeypatch, answer):
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: answer())


class Bench:
    """One network call at a time, with the plan of one's choice."""

    def __init__(self, model, settings, patches=None):
        self.network = model.model.diffusion_model
        self.session = settings.start(Run([3.0, 2.0, 1.0, 0.0]))
        self.wrapper = unet_ring.deepcache(model, settings, KEY, attach.FORWARD)[WrappersMP.DIFFUSION_MODEL]
        self.patches = patches or {}

    def __call__(self, plan, x, t, context, control=None, uuids=("c", "u"), sides=None, **more):
        self.session.plan = plan
        self.session._seen.clear()
        options = {
            KEY: self.session,
            "uuids": list(uuids),
            "cond_or_uncond": list(sides or range(len(uuids))),
            "patches": {k: list(v) for k, v in self.patches.items()},
            "wrappers": {WrappersMP.DIFFUSION_MODEL: {KEY: [self.wrapper]}} if plan else {},
        }
        control = {k: [None if c is None else c.clone() for c in v] for k, v in control.items()} if control else None
        with torch.inference_mode():
            return self.network(x, t, context=context, control=control, transformer_options=options, **more)


def inputs(seed=0, batch=2, size=8):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, size, size, generator=g)
    return x, torch.full((batch,), 500.0 + 100 * seed), torch.randn(batch, 8, 64, generator=g)


def residuals(network, x, t, context, seed=5):
    """A ControlNet's answer: one residual for every input block, the middle and every output block."""
    shapes = []
    patches = {"output_block_patch": [lambda h, skip, o: (shapes.append(skip.shape), (h, skip))[1]]}
    with torch.inference_mode():
        network(x, t, context=context, transformer_options={"patches": patches})
    g = torch.Generator().manual_seed(seed)
    skips = [torch.randn(s, generator=g) for s in shapes]
    # Lists are consumed from their ends: the first output block takes the last of them.
    return {"output": skips[::-1], "middle": [torch.randn(skips[0].shape, generator=g)], "input": skips[:3]}


def freeu(h, skip, options):
    h[:, : h.shape[1] // 2] *= 1.2  # in place, as FreeU does
    return h, skip * 0.9


def attention_of_block(q, context, value, options):
    return q * (1.0 + 0.1 * options["transformer_index"]), context, value


PATCHES = {
    "none": {},
    "freeu": {"output_block_patch": [freeu]},
    "blocks": {
        "input_block_patch": [lambda h, o: h * (1 + 0.1 * o["block"][1])],
        "input_block_patch_after_skip": [lambda h, o: h + 0.1],
        "emb_patch": [lambda emb, width, o: emb * 1.1],
        "output_block_patch": [lambda h, skip, o: (h, skip * (1 + 0.1 * o["block"][1]))],
    },
    "attention": {"attn2_patch": [attention_of_block]},
}


@pytest.mark.smoke
@pytest.mark.parametrize("patches", PATCHES)
@pytest.mark.parametrize("controlled", [False, True])
@pytest.mark.parametrize("depth", range(5))
def test_partial_equals_full_for_the_same_input(model, depth, controlled, patches):
    bench = Bench(model, DeepCache(depth=depth), PATCHES[patches])
    x, t, context = inputs()
    control = residuals(bench.network, x, t, context) if controlled else None
    plain = bench(None, x, t, context, control)
    full = bench(Plan.FULL, x, t, context, control)
    partial = []
    rows = deep_passes(model, lambda: partial.append(bench(Plan.PARTIAL, x, t, context, control)))
    assert torch.equal(plain, full) and torch.equal(full, partial[0]) and rows == 0
    if controlled:
        assert not torch.equal(bench(None, x, t, context), plain)
    x2, t2, context2 = inputs(1)
    assert not torch.equal(bench(Plan.PARTIAL, x2, t2, context2, control), bench(None, x2, t2, context2, control))


def test_partial_equals_full_with_class_embedding():
    model = M.sdxl()
    assert unet_walk.unet_of(model, "x") is model.model.diffusion_model
    bench = Bench(model, DeepCache())
    x, t, context = inputs()
    y = torch.randn(2, 1280 + 6 * 256)
    assert torch.equal(bench(Plan.FULL, x, t, context, y=y), bench(Plan.PARTIAL, x, t, context, y=y))


def test_partial_computes_the_ring_anew(model):
    """The partial pass sees the new input and time: only what comes from inside is old."""
    bench = Bench(model, DeepCache(depth=1))
    (x, t, context), (x2, t2, context2) = inputs(), inputs(1)
    bench(Plan.FULL, x, t, context)
    made = [bench(Plan.PARTIAL, *given) for given in ((x2, t, context), (x, t2, context), (x, t, context2))]
    old = bench(Plan.PARTIAL, x, t, context)
    assert all(not torch.equal(m, old) for m in made)


def test_branches_may_come_apart_and_swap(model):
    bench = Bench(model, DeepCache(depth=1))
    x, t, context = inputs()
    whole = bench(Plan.FULL, x, t, context, uuids=("u", "c"), sides=(1, 0))
    swapped = bench(Plan.PARTIAL, x.flip(0), t, context.flip(0), uuids=("c", "u"), sides=(0, 1))
    alone = bench(Plan.PARTIAL, x[1:], t[1:], context[1:], uuids=("c",), sides=(0,))
    assert close(swapped.flip(0), whole) and close(alone, whole[1:])
    wrong = bench(Plan.PARTIAL, x.flip(0), t, context.flip(0), uuids=("u", "c"), sides=(1, 0))
    assert not close(wrong.flip(0), whole)


def test_what_tells_branches_apart():
    x, hook = inputs()[0], SimpleNamespace(strength=1.0)

    def names(x=x, **more):
        return branches.branch_names(x, {"uuids": ["a", "b"], "cond_or_uncond": [0, 1], **more})

    def hooked(hooks):
        base, seen = SimpleNamespace(current_patcher=SimpleNamespace(current_hooks=hooks)), []
        unet_ring.hooked(Call(lambda *args: seen.append(args[-1]), base), x, 1.0, transformer_options={})
        return names(**seen[0])

    assert len(set(names())) == 2 and names() == names() == hooked(None)
    assert branches.branch_names(x, {}) == [] and branches.branch_names(x[:1], {"uuids": ["a", "b"]}) == []
    assert len(set(names(uuids=["a", "a"]))) == 2
    others = [names(torch.cat([x, x])), names(x[..., :4]), names(x.double())]
    others += [names(context_window=SimpleNamespace(index_list=frames)) for frames in ([0, 1], [1, 2])]
    for hook.strength in (1.0, 0.5):
        others.append(hooked(SimpleNamespace(hooks=[hook])))
    assert len({tuple(n) for n in [names(), *others]}) == len(others) + 1


class Call:
    """A wrapper executor with nothing behind it."""

    def __init__(self, call, class_obj):
        self.call, self.class_obj = call, class_obj

    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)


def test_an_unknown_branch_is_computed_in_full_and_kept(model):
    bench = Bench(model, DeepCache(depth=1))
    x, t, context = inputs()
    bench(Plan.FULL, x, t, context, uuids=("a", "b"))
    rows = deep_passes(model, lambda: bench(Plan.PARTIAL, x, t, context, uuids=("a", "new")))
    assert rows == 2
    assert deep_passes(model, lambda: bench(Plan.PARTIAL, x, t, context, uuids=("a", "new"))) == 0
    other = inputs(size=16)
    assert deep_passes(model, lambda: bench(Plan.PARTIAL, *other, uuids=("a", "new"))) == 2


@pytest.mark.smoke
def test_other_packs_wrappers_around_the_network_run_in_every_pass(model):
    """They stand inside of ours, whichever was put on first, and get what the network gets and make what it makes."""
    seen = []

    def other(executor, x, timesteps, context, y, control, transformer_options, **kwargs):
        seen.append(KEY)
        return 0.9 * executor(
            x, timesteps, 1.1 * context, y, control=control, transformer_options=transformer_options, **kwargs
        )

    before, after = model.clone(), attach.attach(model, DeepCache(interval=3))
    before.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", other)
    before = attach.attach(before, DeepCache(interval=3))
    after.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", other)
    made = M.sample(before, steps=6)
    assert len(seen) == 6 and last(before).partial > 0
    assert torch.equal(M.sample(after, steps=6), made) and len(seen) == 12
    assert not close(M.sample(attach.attach(model, DeepCache(interval=3)), steps=6), made)


@pytest.mark.smoke
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpmpp_2m", "euler_ancestral", "euler_cfg_pp"])
def test_interval_one_changes_no_bit(model, sampler):
    once = attach.attach(model, DeepCache(interval=1))
    assert torch.equal(M.sample(once, sampler, 5), M.sample(model, sampler, 5))
    assert last(once).partial == 0 and last(once).cache_bytes == 0


@pytest.mark.smoke
@pytest.mark.parametrize(("sampler", "calls"), [("euler", 9), ("heun", 17), ("dpm_2", 17), ("dpmpp_sde", 17)])
def test_one_call_in_three_is_full(model, sampler, calls):
    cached = attach.attach(model, CACHED)
    rows = deep_passes(model, lambda: M.sample(cached, sampler, 9))
    report = last(cached)
    full = -(-calls // 3)
    assert (report.calls, report.full, report.partial, report.skipped) == (calls, full, calls - full, 0)
    assert rows == 2 * full and report.cache_bytes > 0
    assert report.work is not None and full / calls < report.work < 1


def test_the_cache_is_really_used(model):
    plain, cached = M.sample(model, steps=9), M.sample(attach.attach(model, CACHED), steps=9)
    assert not torch.equal(plain, cached)
    assert float((plain - cached).norm() / plain.norm()) < 0.1


def test_measuring_changes_no_bit_and_counts(model):
    measured = attach.measure(attach.measure(model))
    assert torch.equal(M.sample(measured, "heun", 4), M.sample(model, "heun", 4))
    report = last(measured)
    assert (report.calls, report.full, report.forwards, report.work) == (7, 7, 7, 1.0) and report.finished
    assert report.label == "heun, 4 steps" and report.seconds > 0 and len(attach.ledger_of(measured).runs) == 1
    assert attach.ledger_of(model) is None


def test_calls_that_another_wrapper_answers_are_counted_as_skipped(model):
    answers = []

    def every_second(executor, *args, **kwargs):
        answers.append(answers[-1] if len(answers) % 2 else executor(*args, **kwargs))
        return answers[-1]

    lazy = model.clone()
    lazy.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "lazy", every_second)
    M.sample(measured := attach.measure(lazy), steps=6)
    report = last(measured)
    assert (report.calls, report.full, report.skipped, report.work) == (6, 3, 3, 0.5)


def split_and_batched(model, monkeypatch, **given):
    """The same run with conditionings batched, one by one, and changing from call to call."""
    answers = {"batched": lambda: 1e18, "split": lambda: 0}
    turn = iter(range(10**6))
    answers["mixed"] = lambda: 1e18 if next(turn) % 3 else 0
    made = {}
    for name, answer in answers.items():
        free_memory(monkeypatch, answer)
        cached = attach.attach(model, CACHED)
        made[name] = M.sample(cached, steps=7, **given)
        report = last(cached)
        assert (report.full, report.partial) == (3, 4), name
        made[name + " forwards"] = report.forwards
    return made


@pytest.mark.parametrize("cfg", [1.0, 7.0])
def test_split_and_batched_conditionings_agree(model, monkeypatch, cfg):
    made = split_and_batched(model, monkeypatch, cfg=cfg)
    assert close(made["split"], made["batched"]) and close(made["mixed"], made["batched"])
    if cfg > 1:
        assert made["split forwards"] == 14 and made["batched forwards"] == 7 and 7 < made["mixed forwards"] < 14


def areas():
    """Two prompts on areas of different shape and one everywhere."""
    left, top = M.conditioning(3, area=(8, 4, 0, 0)), M.conditioning(4, area=(4, 8, 0, 0))
    return [*left, *top, *M.conditioning(5)]


def test_area_conditionings(model, monkeypatch):
    made = split_and_batched(model, monkeypatch, positive=areas())
    assert close(made["split"], made["batched"]) and close(made["mixed"], made["batched"])
    other_order = M.sample(attach.attach(model, CACHED), steps=7, positive=areas()[::-1])
    assert close(other_order, made["batched"])


def test_a_batch_of_three_is_three_runs(model):
    cached = attach.attach(model, CACHED)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    together = M.sample(cached, x=M.latent(3), noise=noise)
    for i in range(3):
        assert close(together[i : i + 1], M.sample(cached, noise=noise[i : i + 1]))
    assert not close(together[:1], together[1:2])


def test_inpainting_keeps_what_is_masked_out(model):
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1.0
    cached = attach.attach(model, CACHED)
    made = M.sample(cached, x=x, mask=mask)
    assert torch.allclose(made[..., :4], x[..., :4], atol=1e-5) and not torch.allclose(
        made[..., 4:], x[..., 4:], atol=1
    )
    assert last(cached).partial > 0
    once = attach.attach(model, DeepCache(interval=1))
    assert torch.equal(M.sample(once, x=x, mask=mask), M.sample(model, x=x, mask=mask))


class Residuals(comfy.controlnet.ControlBase):
    """A ControlNet that always answers the same."""

    def __init__(self, control):
        super().__init__()
        self.control = control

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        return {k: [c.expand(len(x_noisy), -1, -1, -1).clone() for c in v] for k, v in self.control.items()}

    def copy(self):
        return Residuals(self.control)


def test_controlnet(model, monkeypatch):
    x, t, context = inputs(batch=1, size=8)
    control = Residuals(
        {k: [3 * c for c in v] for k, v in residuals(model.model.diffusion_model, x, t, context).items()}
    )
    given = {"positive": M.conditioning(1, control=control), "negative": M.conditioning(2, control=control)}
    free = M.sample(attach.attach(model, CACHED), steps=7)
    made = split_and_batched(model, monkeypatch, **given)
    assert close(made["split"], made["batched"]) and not close(free, made["batched"])
    assert torch.equal(M.sample(attach.attach(model, DeepCache(interval=1)), **given), M.sample(model, **given))


def test_freeu_in_place_does_not_reach_the_cache(model):
    boosted = model.clone()
    boosted.set_model_output_block_patch(freeu)
    assert torch.equal(M.sample(attach.attach(boosted, DeepCache(interval=1))), M.sample(boosted))
    after = attach.attach(model, CACHED)
    after.set_model_output_block_patch(freeu)
    made = M.sample(attach.attach(boosted, CACHED))
    assert torch.equal(made, M.sample(after)) and not torch.equal(made, M.sample(attach.attach(model, CACHED)))


def test_extra_passes_have_their_own_cache(model):
    """A post-CFG function that runs the positive prompt again through a changed network, as PAG and SLG do."""

    def again(args):
        options = comfy.model_patcher.create_model_options_clone(args["model_options"])
        options["transformer_options"].setdefault("patches", {})["input_block_patch"] = [lambda h, o: h * 0.5]
        (worse,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"] + 0.5 * (args["cond_denoised"] - worse)

    guided = model.clone()
    guided.set_model_sampler_post_cfg_function(again)
    cached = attach.attach(guided, DeepCache(interval=3, depth=1, warmup=1))
    stores = []
    cached.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "watch", watch(lambda s: stores.append(list(s.store._kept))))
    M.sample(cached, steps=4)
    passes = sorted(ordinal for _, ordinal in stores[0])
    assert passes == [0, 0, 1]
    assert torch.equal(M.sample(attach.attach(guided, DeepCache(interval=1))), M.sample(guided))


def watch(look):
    def wrapper(executor, x, timestep, model_options, *args, **kwargs):
        result = executor(x, timestep, model_options, *args, **kwargs)
        look(model_options["transformer_options"][KEY])
        return result

    return wrapper


@pytest.mark.smoke
def test_on_and_off_again_leaves_nothing(model):
    before = M.sample(model)
    wrappers = {k: dict(v) for k, v in model.wrappers.items()}
    options = repr(model.model_options)
    cached = attach.attach(model, CACHED)
    M.sample(cached)
    off = attach.detach(cached, DeepCache())
    assert torch.equal(M.sample(off), before) and torch.equal(M.sample(model), before)
    assert model.wrappers == wrappers and model.attachments == {} and repr(model.model_options) == options
    assert not any(KEY in kinds for kinds in off.wrappers.values())
    assert any(KEY in kinds for kinds in cached.wrappers.values())
    assert not any("forward" in vars(m) for m in model.model.diffusion_model.modules())


class Stop(BaseException):
    """As ComfyUI's interruption: no Exception."""


@pytest.mark.parametrize("stop", [Stop, RuntimeError, None])
def test_the_state_ends_with_the_run(model, stop):
    cached = attach.attach(model, CACHED)
    sessions, options_seen = [], []

    def look(session):
        sessions.append(weakref.ref(session))
        assert session.store.nbytes > 0
        if stop is not None and len(sessions) == 3:
            raise stop

    cached.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "watch", watch(look))

    def run_options(executor, *args, **kwargs):
        options_seen.append(executor.class_obj.model_options)
        return executor(*args, **kwargs)

    cached.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "watch", run_options)
    if stop is None:
        M.sample(cached)
    else:
        with pytest.raises(stop):
            M.sample(cached)
    gc.collect()
    assert len({id(r) for r in sessions}) == 1 and sessions[0]() is None  # one session, seen in every call
    assert KEY not in options_seen[0]["transformer_options"] and KEY not in cached.model_options["transformer_options"]
    assert last(cached).finished is (stop is None)
    comfy.model_management.interrupt_current_processing(False)
    clean = attach.attach(model, CACHED)
    assert torch.equal(M.sample(clean), M.sample(attach.attach(model, CACHED)))


def test_runs_do_not_see_each_other(model):
    cached = attach.attach(model, CACHED)
    M.sample(cached, seed=1, steps=5)
    M.sample(cached, x=M.latent(2, size=16))
    assert torch.equal(M.sample(cached, seed=2), M.sample(attach.attach(model, CACHED), seed=2))
    assert len(attach.ledger_of(cached).runs) == 3


def test_a_run_inside_a_run(model):
    cached = attach.attach(model, CACHED)
    alone = M.sample(cached)
    inner = []

    def nest(executor, x, timestep, model_options, *args, **kwargs):
        if not inner:
            inner.append(None)
            inner[0] = M.sample(cached, seed=9, steps=4)
            model.model.current_patcher = executor.class_obj.model_patcher  # the inner run's clean-up took it away
        return executor(x, timestep, model_options, *args, **kwargs)

    outer = cached.clone()
    outer.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "nest", nest)
    assert close(M.sample(outer), alone) and torch.equal(inner[0], M.sample(cached, seed=9, steps=4))


def test_putting_it_on_again_replaces_it(model):
    once = attach.attach(model, DeepCache(interval=5, depth=0, warmup=0))
    twice = attach.attach(attach.attach(model, DeepCache(interval=2)), DeepCache(interval=5, depth=0, warmup=0))
    assert all(len(kinds[KEY]) == 1 for kinds in twice.wrappers.values() if KEY in kinds)
    assert torch.equal(M.sample(twice), M.sample(once))
    assert last(twice).full == last(once).full == 2


def test_the_window_is_in_the_models_own_percent(model):
    cached = attach.attach(model, DeepCache(interval=9, warmup=0, start_percent=0.3, end_percent=0.7))
    M.sample(cached, steps=20)
    assert last(cached).partial == pytest.approx(20 * 0.4, abs=1.5)


@pytest.mark.parametrize("make", [M.sd3, M.flux, M.gaussian])
def test_other_networks_are_refused(make):
    made = make()
    with pytest.raises(ValueError, match=f"DeepCache: this model is a {type(made.model.diffusion_model).__name__}"):
        attach.attach(made, DeepCache())


def test_a_depth_the_network_does_not_have_is_refused(model):
    with pytest.raises(ValueError, match=r"depth = 5.*6 output blocks.*between 0 and 4"):
        attach.attach(model, DeepCache(depth=5))


def test_a_subclass_that_only_wraps_forward_is_welcome(model):
    class Wrapped(type(model.model.diffusion_model)):
        def forward(self, x, *args, **kwargs):
            return super().forward(x.flip(-1), *args, **kwargs).flip(-1)

    class Other(Wrapped):
        def _forward(self, x, *args, **kwargs):
            return super()._forward(x, *args, **kwargs)

    made = M.unet()
    made.model.diffusion_model.__class__ = Wrapped
    M.sample(cached := attach.attach(made, CACHED), steps=4)
    assert last(cached).partial > 0
    made.model.diffusion_model.__class__ = Other
    with pytest.raises(ValueError, match="this model is a Other"):
        attach.attach(made, CACHED)


def test_torch_compile_is_refused_on_either_side(model):
    compiled = model.clone()
    compiled.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "torch.compile", lambda e, *a, **k: e(*a, **k))
    with pytest.raises(ValueError, match=r"torch\.compile"):
        attach.attach(compiled, CACHED)
    later = attach.attach(model, CACHED)
    later.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "torch.compile", lambda e, *a, **k: e(*a, **k))
    with pytest.raises(ValueError, match=r"torch\.compile"):
        M.sample(later)


def test_adaptive_samplers_run_in_full(model):
    cached = attach.attach(model, CACHED)
    assert torch.equal(M.sample(cached, "dpm_adaptive", 4, cfg=1.0), M.sample(model, "dpm_adaptive", 4, cfg=1.0))
    assert last(cached).partial == 0 and "DeepCache is off" in last(cached).line()


@pytest.mark.parametrize("depth", [0, 2, 4])
def test_the_share_of_work_is_what_torch_counts(model, depth):
    bench = Bench(model, DeepCache(depth=depth))
    x, t, context = inputs(size=32)
    counted = []
    for plan in (Plan.FULL, Plan.PARTIAL):
        with FlopCounterMode(display=False) as flops:
            bench(plan, x, t, context)
        counted.append(flops.get_total_flops())
    share = ring_share(depth, bench.network, x.shape, context.shape[1])
    assert share == pytest.approx(counted[1] / counted[0], rel=0.02)


def test_nodes(model):
    by_id = {node.define_schema().node_id: node for node in accelerators.NODES}
    assert set(by_id) >= {"Quickstep_DeepCache", "Quickstep_Measure", "Quickstep_Report"}
    (cached,) = by_id["Quickstep_DeepCache"].execute(model=model, interval=3, depth=1, warmup=1).args
    report = by_id["Quickstep_Report"]
    latent = {"samples": M.latent()}
    assert report.execute(latent, cached).args[1] == "No run yet with this model."
    M.sample(cached, steps=9)
    passed, text = report.execute(latent, cached).args
    assert passed is latent and "9 calls" in text and "3 full, 6 partial" in text and text.count("\n") == 0
    M.sample(cached.clone(), steps=2)
    assert report.execute(latent, cached).args[1].count("\n") == 1
    (measured,) = by_id["Quickstep_Measure"].execute(model).args
    M.sample(measured, steps=2)
    assert "2 calls" in report.execute(latent, measured).args[1]
    with pytest.raises(ValueError, match="not measured"):
        report.execute(latent, model)
