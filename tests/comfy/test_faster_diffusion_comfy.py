"""Encoder propagation inside a real ComfyUI, on a small UNet with random weights."""

import importlib.util
import sys
from pathlib import Path

import comfy.controlnet
import comfy.model_patcher
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from quickstep_under_test.nodes import attach
from quickstep_under_test.nodes.sites.unet_decoder import BASE, faster_diffusion
from quickstep_under_test.solvers.caching.accelerator import Plan, Run
from quickstep_under_test.solvers.caching.faster_diffusion import FasterDiffusion
from quickstep_under_test.solvers.caching.work import decoder_share
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
KEY = attach.key_of(FasterDiffusion())
EVERY = {"key_steps": "uniform", "interval": 4}
ON = FasterDiffusion(**EVERY)
PARALLEL = FasterDiffusion(**EVERY, parallel_batch=3)


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


def last(model):
    return attach.ledger_of(model).runs[-1]


def passes(model, run, block="input_blocks"):
    """How many rows went through the first encoder or decoder block, one number per network pass."""
    rows = []
    handle = getattr(model.model.diffusion_model, block)[0][0].register_forward_hook(
        lambda m, args, out: rows.append(len(out))
    )
    try:
        run()
    finally:
        handle.remove()
    return rows


class Bench:
    """One network call at a time, with the plan of one's choice."""

    def __init__(self, model, patches=None):
        self.network, self.patches = model.model.diffusion_model, patches or {}
        self.session = ON.start(Run([float(9 - i) for i in range(10)]))
        self.wrapper = faster_diffusion(model, ON, KEY, attach.FORWARD)[WrappersMP.DIFFUSION_MODEL]
        self.base = model.model

    def __call__(self, plan, x, t, context, control=None, uuids=("c", "u"), **more):
        self.session.plan = plan
        self.session._seen.clear()
        options = {
            KEY: self.session,
            BASE: self.base,
            "uuids": list(uuids),
            "cond_or_uncond": list(range(len(uuids))),
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


def residuals(network, size=8, seed=5):
    shapes = []
    patches = {"output_block_patch": [lambda h, skip, o: (shapes.append(skip.shape), (h, skip))[1]]}
    x, t, context = inputs(batch=1, size=size)
    with torch.inference_mode():
        network(x, t, context=context, transformer_options={"patches": patches})
    g = torch.Generator().manual_seed(seed)
    skips = [torch.randn(s, generator=g) for s in shapes]
    return {"output": skips[::-1], "middle": [torch.randn(skips[0].shape, generator=g)], "input": skips[:3]}


def freeu(h, skip, options):
    h[:, : h.shape[1] // 2] *= 1.2  # in place, as FreeU does
    skip *= 0.9
    return h, skip


PATCHES = {
    "none": {},
    "freeu": {"output_block_patch": [freeu]},
    "blocks": {
        "input_block_patch": [lambda h, o: h * (1 + 0.1 * o["block"][1])],
        "emb_patch": [lambda emb, width, o: emb * 1.1],
        "output_block_patch": [lambda h, skip, o: (h, skip * (1 + 0.1 * o["block"][1]))],
    },
    "attention": {"attn2_patch": [lambda q, c, v, o: (q * (1.0 + 0.1 * o["transformer_index"]), c, v)]},
}


@pytest.mark.smoke
@pytest.mark.parametrize("patches", PATCHES)
@pytest.mark.parametrize("controlled", [False, True])
def test_partial_equals_full_for_the_same_input_and_time(model, controlled, patches):
    bench = Bench(model, PATCHES[patches])
    x, t, context = inputs()
    control = residuals(bench.network) if controlled else None
    plain = bench(None, x, t, context, control)
    full, partial = bench(Plan.FULL, x, t, context, control), []
    # The residuals are in what was kept; a ControlNet that is still there must not come on top of them.
    rows = passes(model, lambda: partial.append(bench(Plan.PARTIAL, x, t, context, control)))
    assert torch.equal(plain, full) and torch.equal(full, partial[0]) and rows == []
    assert torch.equal(bench(Plan.PARTIAL, x, t, context), full)  # once more, and nothing was changed in place


def test_partial_equals_full_with_class_embedding():
    bench = Bench(M.sdxl())
    x, t, context = inputs()
    y = torch.randn(2, 1280 + 6 * 256)
    assert torch.equal(bench(Plan.FULL, x, t, context, y=y), bench(Plan.PARTIAL, x, t, context, y=y))
    assert not torch.equal(bench(Plan.PARTIAL, x, t, context, y=y + 1), bench(Plan.PARTIAL, x, t, context, y=y))


def test_partial_sees_the_time_and_the_prompt_but_not_x(model):
    bench = Bench(model)
    (x, t, context), (x2, t2, context2) = inputs(), inputs(1)
    full = bench(Plan.FULL, x, t, context)
    assert torch.equal(bench(Plan.PARTIAL, x2, t, context), full)
    assert not torch.equal(bench(Plan.PARTIAL, x, t2, context), full)
    assert not torch.equal(bench(Plan.PARTIAL, x, t, context2), full)


def test_branches_may_come_apart_and_an_unknown_one_is_computed_in_full(model):
    bench = Bench(model)
    x, t, context = inputs()
    whole = bench(Plan.FULL, x, t, context)
    alone = bench(Plan.PARTIAL, x[:1], t[:1], context[:1], uuids=("c",))
    assert close(alone, whole[:1])
    assert passes(model, lambda: bench(Plan.PARTIAL, x, t, context, uuids=("c", "new"))) == [2]
    assert passes(model, lambda: bench(Plan.PARTIAL, x, t, context, uuids=("c", "new"))) == []
    assert passes(model, lambda: bench(Plan.PARTIAL, *inputs(size=16), uuids=("c", "new"))) == [2]


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "euler_cfg_pp"])
def test_interval_one_changes_no_bit(model, sampler):
    once = attach.attach(model, FasterDiffusion(key_steps="uniform", interval=1))
    assert torch.equal(M.sample(once, sampler, 5), M.sample(model, sampler, 5))
    assert last(once).partial == 0 and last(once).cache_bytes == 0


@pytest.mark.smoke
def test_the_encoder_runs_in_key_steps_only(model):
    on = attach.attach(model, ON)
    assert passes(model, lambda: M.sample(on, "euler", 10)) == [2, 2, 2]
    report = last(on)
    assert (report.calls, report.full, report.partial) == (10, 3, 7) and report.cache_bytes > 0
    share = decoder_share(model.model.diffusion_model, (1, 4, 8, 8), 8)
    assert report.work == pytest.approx((3 + 7 * share) / 10)


@pytest.mark.smoke
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_cfg_pp"])
def test_several_steps_at_once_are_the_same_as_one_by_one(model, sampler):
    one, many = attach.attach(model, ON), attach.attach(model, PARALLEL)
    sequential, made = M.sample(one, sampler, 10), []
    rows = passes(model, lambda: made.append(M.sample(many, sampler, 10)), "output_blocks")
    assert close(made[0], sequential) and not torch.equal(sequential, M.sample(model, sampler, 10))
    assert rows == [2, 6, 2, 6, 2, 2]  # key, three steps, key, three steps, key, the last step
    assert last(many).work == pytest.approx(last(one).work)


def decoder_passes(model, settings, sampler="euler", steps=6, **given):
    return passes(model, lambda: M.sample(attach.attach(model, settings), sampler, steps, **given), "output_blocks")


@pytest.mark.parametrize(("sampler", "rows"), [("heun", [2, 6, *[2] * 5]), ("dpm_2", [2] * 11)])
def test_with_several_calls_per_step_nothing_is_wrong(model, sampler, rows):
    """Heun calls at the given times only, so what was computed ahead serves its next steps; mid-points go one by one."""
    one, many = attach.attach(model, ON), attach.attach(model, PARALLEL)
    assert close(M.sample(many, sampler, 6), M.sample(one, sampler, 6))
    assert decoder_passes(model, PARALLEL, sampler) == rows


@pytest.mark.smoke
def test_other_packs_wrappers_around_the_network_run_in_every_pass(model):
    """They stand inside of ours, whichever was put on first, and get what the network gets and make what it makes."""
    seen = []

    def other(executor, x, timesteps, context, y, control, transformer_options, **kwargs):
        seen.append(KEY)
        return 0.9 * executor(
            x, timesteps, 1.1 * context, y, control=control, transformer_options=transformer_options, **kwargs
        )

    before, after = model.clone(), attach.attach(model, PARALLEL)
    before.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", other)
    before = attach.attach(before, PARALLEL)
    after.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", other)
    made = M.sample(before, steps=6)
    assert len(seen) == 6 and last(before).partial > 0
    assert torch.equal(M.sample(after, steps=6), made) and len(seen) == 12
    assert not close(M.sample(attach.attach(model, PARALLEL), steps=6), made)


def test_little_memory_makes_the_batch_smaller(model, monkeypatch):
    need = model.model.memory_required([4, 4, 8, 8]) * 1.5  # two steps of two conditionings
    for free, rows in ((need + 1, [2, 4, 2, 2, 2]), (need - 1, [2, 2, 2, 2, 2, 2])):
        monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device, f=free: f)
        assert decoder_passes(model, PARALLEL) == rows


def test_patches_that_may_depend_on_the_time_make_it_sequential(model):
    patched = model.clone()
    patched.set_model_output_block_patch(freeu)
    assert decoder_passes(patched, PARALLEL) == [2] * 6
    assert torch.equal(M.sample(attach.attach(patched, PARALLEL)), M.sample(attach.attach(patched, ON)))


class Residuals(comfy.controlnet.ControlBase):
    """A ControlNet that always answers the same, and counts."""

    def __init__(self, control):
        super().__init__()
        self.control, self.calls, self.cleaned = control, 0, 0

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        self.calls += 1
        return {k: [c.expand(len(x_noisy), -1, -1, -1).clone() for c in v] for k, v in self.control.items()}

    def copy(self):
        return self

    def cleanup(self):
        self.cleaned += 1
        super().cleanup()


def controlled(control, **more):
    return {"positive": M.conditioning(1, control=control), "negative": M.conditioning(2, control=control, **more)}


@pytest.mark.smoke
def test_controlnets_run_in_key_steps_only(model):
    control = Residuals(residuals(model.model.diffusion_model))
    on = attach.attach(model, ON)
    given = controlled(control)
    made = M.sample(on, steps=10, **given)
    assert control.calls == 3 and control.cleaned > 0 and last(on).partial == 7
    assert not close(made, M.sample(on, steps=10))
    assert all(cond[1]["control"] is control for conds in given.values() for cond in conds)
    M.sample(model, steps=10, **given)
    assert control.calls == 13


def test_a_conditioning_that_comes_later_gets_its_controlnet(model):
    """In the middle of a run a prompt joins that no key step has seen: it is computed in full, with its ControlNet."""
    control = Residuals({k: [3 * c for c in v] for k, v in residuals(model.model.diffusion_model).items()})
    late = [*M.conditioning(1, control=control), *M.conditioning(5, control=control, start_percent=0.3, strength=2.0)]
    runs = {}
    for name, settings in (("on", ON), ("first step only", FasterDiffusion(key_steps="list", steps="0"))):
        before = control.calls
        runs[name] = M.sample(attach.attach(model, settings), steps=10, positive=late, negative=M.conditioning(2))
        runs[name + " calls"] = control.calls - before
    assert runs["first step only calls"] == 2  # the first step's, and the one with which the other prompt joins
    assert runs["on"].isfinite().all()


def test_noise_is_injected_where_an_euler_step_ends(model):
    """With x0 always 0, whatever is added stays: a sum that is known."""
    still = model.clone()
    still.set_model_sampler_post_cfg_function(lambda args: torch.zeros_like(args["denoised"]))
    settings = FasterDiffusion(**EVERY, noise_injection=0.01)
    seen = []

    def watch(executor, x, timestep, *args, **kwargs):
        seen.append((float(timestep.max()), x.clone()))
        return executor(x, timestep, *args, **kwargs)

    on = attach.attach(still, settings)
    on.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "watch", watch)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    M.sample(on, steps=8, noise=noise)
    half = float(model.get_model_object("model_sampling").percent_to_sigma(0.5))
    added, before = 0.0, None
    for t, x in seen:
        if before is not None:
            added *= t / before
            added += 0.01 * (1 + t * t) ** 0.5 if t < half else 0.0
        assert torch.allclose(x - seen[0][1] * (t / seen[0][0]), added * noise, atol=1e-5), t
        before = t
    assert added > 0


@pytest.mark.parametrize("make", [M.sd3, M.gaussian])
def test_other_networks_are_refused(make):
    with pytest.raises(ValueError, match="Faster Diffusion: this model is a"):
        attach.attach(make(), FasterDiffusion())


def test_it_says_when_it_is_off(model):
    on = attach.attach(model, FasterDiffusion(key_steps="uniform"))
    assert torch.equal(M.sample(on, "euler_ancestral", 5), M.sample(model, "euler_ancestral", 5))
    assert "Faster Diffusion is off: the sampler adds noise" in last(on).line()


def test_the_share_of_work_is_what_torch_counts(model):
    bench = Bench(model)
    x, t, context = inputs(size=32)
    counted = []
    for plan in (Plan.FULL, Plan.PARTIAL):
        with FlopCounterMode(display=False) as flops:
            bench(plan, x, t, context)
        counted.append(flops.get_total_flops())
    assert decoder_share(bench.network, x.shape, 8) == pytest.approx(counted[1] / counted[0], rel=0.02)
