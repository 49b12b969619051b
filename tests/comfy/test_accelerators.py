"""The laws every accelerator keeps, in a real ComfyUI, on small networks with random weights.

An accelerator joins by a ``Variant`` in ``tests/accelerators/<family>.py``. What is equal must be equal in every bit where the
same numbers go through the same kernels, and within ``close`` where batches are cut differently.
"""

import gc
import importlib.util
import sys
import weakref
from functools import cache, lru_cache
from itertools import combinations
from pathlib import Path

import comfy.controlnet
import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from quickstep_under_test.nodes import attach
from quickstep_under_test.nodes.accelerators import NODES
from quickstep_under_test.nodes.bridge import Sampler
from quickstep_under_test.solvers.caching.composition import conflict
from quickstep_under_test.solvers.caching.library import ACCELERATORS
from quickstep_under_test.solvers.exponential import SDEDPMSolverPP


def _load(full, path):
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, path, submodule_search_locations=[str(path.parent)])
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


HERE = Path(__file__).parent
M = _load("quickstep_tests_comfy_models", HERE / "models.py")
VARIANTS = _load("quickstep_tests_accelerators", HERE.parent / "accelerators" / "__init__.py").variants()

STEPS = 8
MAKERS = {"unet": M.unet, "sdxl": M.sdxl, "sd3": M.sd3, "flux": M.flux,
          "flow": lambda: M.gaussian("flow"), "eps": lambda: M.gaussian("eps")}  # fmt: skip
CHANNELS = {"sd3": 16, "flux": 16}
KIND = {"unet": "unet", "sdxl": "unet", "sd3": "dit", "flux": "dit", "flow": "exact", "eps": "exact"}
WIDTH = {"sd3": {"width": 32, "pooled": 32}, "flux": {"width": 32, "pooled": 32}, "sdxl": {"pooled": 1280}}

model_of = lru_cache(maxsize=None)(lambda name: MAKERS[name]())


def prompts(name, tokens=8, **more):
    return (M.conditioning(1, tokens=tokens, **WIDTH.get(name, {}), **more),
            M.conditioning(2, tokens=tokens, **WIDTH.get(name, {}), **more))  # fmt: skip


def sample(model, name, batch=1, size=8, tokens=8, conds=None, split=None, **options):
    positive, negative = conds or prompts(name, tokens)
    x = M.latent(batch, CHANNELS.get(name, 4), size)
    return M.sample(model, positive=positive, negative=negative, x=x, **{"steps": STEPS, **options})


@cache
def plain(name, **options):
    """The same without any accelerator; computed once."""
    return sample(model_of(name), name, **options)


@cache
def unaccelerated(run, name, cfg):
    """``run(model, name, cfg)`` without any accelerator; computed once."""
    return run(model_of(name), name, cfg)


def split_calls(monkeypatch):
    """No memory for positive and negative conditioning in one network call."""
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 0)


def under(law, every=False):
    """(variant, model): on the first of a variant's models, or on one of every kind (UNet, DiT, exact)."""
    kinds = {v: {KIND[m]: m for m in reversed(v.models)}.values() for v in VARIANTS if v.holds(law)}
    cases = [(v, m) for v, models in kinds.items() for m in (models if every else v.models[:1])]
    return pytest.mark.parametrize(("variant", "name"), cases, ids=lambda value: str(value))


def close(a, b, limit=5e-6):
    return float((a - b).norm() / b.norm()) < limit


def last(model):
    return attach.ledger_of(model).runs[-1]


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def sessions(monkeypatch):
    """Weak references to the sessions of all runs, and to their stores."""
    made = []
    for accelerator in ACCELERATORS:

        def start(self, run, _start=accelerator.start):
            session = _start(self, run)
            made.append(weakref.ref(session))
            return session

        monkeypatch.setattr(accelerator, "start", start)
    return made


def test_every_accelerator_is_under_the_laws_and_has_a_node():
    assert {v.active.id for v in VARIANTS} == {a.id for a in ACCELERATORS}
    ids = {node.define_schema().node_id for node in NODES}
    assert {f"Quickstep_{a.id}" for a in ACCELERATORS} <= ids


@pytest.mark.smoke
@pytest.mark.parametrize("split", [False, True], ids=["together", "split"])
@under("neutral", every=True)
def test_neutral_settings_change_no_bit(variant, name, split, monkeypatch):
    if split:
        split_calls(monkeypatch)
    on = attach.attach(model_of(name), variant.neutral)
    for batch in (1, 4):
        for cfg in variant.cfg if not split else variant.cfg[-1:]:  # at CFG 1 there is nothing to split
            made = sample(on, name, batch, cfg=cfg, steps=3)
            assert torch.equal(made, plain(name, batch=batch, cfg=cfg, steps=3, split=split)), (batch, cfg)


@under("active", every=True)
def test_active_settings_do_something(variant, name):
    cfg = variant.cfg[-1]
    made = sample(attach.attach(model_of(name), variant.active), name, cfg=cfg)
    assert made.isfinite().all() and not torch.equal(made, plain(name, cfg=cfg))


@pytest.mark.smoke
@under("gone")
def test_it_is_gone_when_it_is_gone(variant, name, sessions):
    model, cfg = model_of(name), variant.cfg[-1]
    network = model.model.diffusion_model
    before = plain(name, cfg=cfg)
    attributes = {module: set(vars(module)) for module in network.modules()}
    on = attach.attach(model, variant.active)
    whole = sample(on, name, cfg=cfg)
    for error in (RuntimeError, comfy.model_management.InterruptProcessingException):
        calls = []

        def trip(*_, error=error, calls=calls):
            calls.append(None)
            if len(calls) == 4:
                raise error()

        handle = network.register_forward_pre_hook(trip)
        try:
            with pytest.raises(error):
                sample(on, name, cfg=cfg)
        finally:
            handle.remove()
            comfy.model_management.interrupt_current_processing(False)
        assert not last(on).finished
    assert torch.equal(sample(on, name, cfg=cfg), whole)  # nothing of the runs before is left
    off = attach.detach(on, variant.active)
    assert attach.on(off) == () and not any(attach.key_of(variant.active) in kinds for kinds in off.wrappers.values())
    assert torch.equal(sample(off, name, cfg=cfg), before)
    assert attributes == {module: set(vars(module)) for module in network.modules()}
    gc.collect()
    assert sessions and all(ref() is None for ref in sessions)


@under("second run")
def test_another_size_prompt_and_seed_right_after(variant, name):
    """A hires pass or the next prompt: as if nothing had been before."""
    model, cfg = model_of(name), variant.cfg[-1]
    on = attach.attach(model, variant.active)
    sample(on, name, cfg=cfg, steps=5)
    for options in ({"size": 12, "steps": 5}, {"batch": 2, "tokens": 13, "steps": 5}):
        assert torch.equal(
            sample(on, name, cfg=cfg, **options), sample(attach.attach(model, variant.active), name, cfg=cfg, **options)
        )


@under("split", every=True)
def test_split_and_joined_conditionings_are_the_same(variant, name, monkeypatch):
    model, cfg = model_of(name), variant.cfg[-1]
    on = attach.attach(model, variant.active)
    together = sample(on, name, cfg=cfg)
    counter = iter(range(10**6))
    # Now and then there is room for both, as when memory runs short in the middle of a run.
    monkeypatch.setattr(
        comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: 1e12 if next(counter) % 3 == 0 else 0
    )
    assert close(sample(on, name, cfg=cfg), together, 2e-5)


SAMPLERS = ("heun", "dpmpp_2m", "euler_ancestral", "uni_pc", "euler_cfg_pp")


@under("samplers")
def test_every_kind_of_sampler(variant, name):
    model, cfg = model_of(name), variant.cfg[-1]
    on = attach.attach(model, variant.active)
    for sampler in SAMPLERS:
        assert sample(on, name, sampler=sampler, cfg=cfg, steps=4).isfinite().all(), sampler


@under("samplers")
def test_a_sampler_that_chooses_its_steps(variant, name):
    """With tolerances so loose that it takes few."""
    on, x = attach.attach(model_of(name), variant.active), M.latent(1, CHANNELS.get(name, 4))
    loose = comfy.samplers.ksampler("dpm_adaptive", {"h_init": 2.0, "rtol": 9.0, "atol": 9.0})
    sigmas = comfy.samplers.calculate_sigmas(on.get_model_object("model_sampling"), "normal", 4)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        made = comfy.sample.sample_custom(
            on, noise, variant.cfg[-1], loose, sigmas, *prompts(name), x, disable_pbar=True, seed=0
        )
    assert made.isfinite().all()
    if variant.active.site not in ("tuning", "tokens", "tiles"):
        assert last(on).partial == last(on).skipped == 0 and "is off" in last(on).line()


@under("areas")
def test_areas_masks_and_inpainting(variant, name):
    model, cfg = model_of(name), variant.cfg[-1]
    plainly = unaccelerated(inpainted, name, cfg)
    made = inpainted(attach.attach(model, variant.active), name, cfg)
    kept = made[..., 4:, :] - plainly[..., 4:, :]
    assert made.isfinite().all() and float(kept.abs().max()) < 1e-5 and not torch.equal(made, torch.zeros_like(made))
    assert torch.equal(inpainted(attach.attach(model, variant.neutral), name, cfg), plainly)


def inpainted(model, name, cfg):
    """The upper half of a latent, with a second prompt on its left."""
    positive, negative = prompts(name)
    area = [[positive[0][0], {**positive[0][1], "area": (8, 4, 0, 0), "strength": 1.0}]]
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4, :] = 1.0
    x = M.latent(1, CHANNELS.get(name, 4), 8)
    return M.sample(model, positive=positive + area, negative=negative, x=x, mask=mask, cfg=cfg, steps=5)


class Residuals(comfy.controlnet.ControlBase):
    """A ControlNet that always adds the same to a UNet's skips, or between a DiT's blocks."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        def residual(*shape):
            g = torch.Generator().manual_seed(sum(shape))
            return torch.randn(1, *shape, generator=g).expand(len(x_noisy), *shape).clone()

        if self.name in ("sd3", "flux"):
            rows = [residual(16, 128) for _ in range(2)]  # 8 x 8 latents are 16 tokens
            return {"output": rows, "input": rows} if self.name == "flux" else {"output": rows}
        shapes = [(128, 2, 2), (64, 4, 4), (64, 4, 4), (32, 8, 8), (32, 8, 8)]
        return {"output": [None, *(residual(*s) for s in shapes[::-1])][-3:], "middle": [residual(128, 2, 2)]}

    def copy(self):
        return Residuals(self.name)


@under("control")
def test_controlnet(variant, name):
    """Its residuals arrive, and only once."""
    model, cfg = model_of(name), variant.cfg[-1]
    plainly = unaccelerated(controlled, name, cfg)
    assert torch.equal(controlled(attach.attach(model, variant.neutral), name, cfg), plainly)
    on = attach.attach(model, variant.active)
    made = controlled(on, name, cfg)
    assert made.isfinite().all()
    if name in CONTROLLED:
        assert not torch.equal(plainly, plain(name, cfg=cfg, steps=5))
        assert not torch.equal(made, sample(on, name, cfg=cfg, steps=5))


CONTROLLED = ("sd3", "flux", "unet")


def controlled(model, name, cfg):
    conds = prompts(name, control=Residuals(name)) if name in CONTROLLED else prompts(name)
    return sample(model, name, conds=conds, cfg=cfg, steps=5)


@under("hooks")
def test_scheduled_lora_hooks(variant, name):
    """A LoRA whose strength changes in the middle of the run, on one of the two conditionings."""
    model, cfg = model_of(name), variant.cfg[-1]
    plainly = unaccelerated(hooked, name, cfg)
    assert not torch.equal(plainly, plain(name, cfg=cfg, steps=5))
    assert torch.equal(hooked(attach.attach(model, variant.neutral), name, cfg), plainly)
    on = attach.attach(model, variant.active)
    made = hooked(on, name, cfg)
    assert made.isfinite().all() and not torch.equal(made, sample(on, name, cfg=cfg, steps=5))


def hooked(model, name, cfg):
    weight = next(n for n, p in model.model.diffusion_model.named_parameters() if p.ndim == 2)
    shape = model.model.diffusion_model.get_parameter(weight).shape
    g = torch.Generator().manual_seed(0)
    base = f"diffusion_model.{weight.removesuffix('.weight')}"
    lora = {f"{base}.lora_up.weight": torch.randn(shape[0], 2, generator=g),
            f"{base}.lora_down.weight": torch.randn(2, shape[1], generator=g)}  # fmt: skip
    group = comfy.hooks.create_hook_lora(lora, 1.0, 1.0)
    frames = comfy.hooks.HookKeyframeGroup()
    frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
    frames.add(comfy.hooks.HookKeyframe(strength=0.2, start_percent=0.5))
    group.set_keyframes_on_hooks(frames)
    positive, negative = prompts(name)
    conds = ([[positive[0][0], {**positive[0][1], "hooks": group}]], negative)
    return sample(model, name, conds=conds, cfg=cfg, steps=5)


@under("few steps")
def test_one_and_two_steps(variant, name):
    on = attach.attach(model_of(name), variant.active)
    for steps in (1, 2):
        assert sample(on, name, steps=steps, cfg=variant.cfg[-1]).isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_torch_compile_is_said(variant):
    """What decides inside the network cannot be compiled and says so, before or after; the rest runs."""
    name = variant.models[0]
    model = model_of(name)
    compiled = model.clone()
    compiled.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "torch.compile", lambda e, *a, **k: e(*a, **k))
    later = attach.attach(model, variant.active)
    later.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "torch.compile", lambda e, *a, **k: e(*a, **k))
    if attach.SITES[variant.active.site].compiles:
        assert torch.equal(sample(attach.attach(compiled, variant.active), name), sample(later, name))
        return
    with pytest.raises(ValueError, match=rf"{variant.active.title}.*torch\.compile"):
        attach.attach(compiled, variant.active)
    with pytest.raises(ValueError, match=r"torch\.compile"):
        sample(later, name)


@pytest.mark.parametrize("name", sorted({m for v in VARIANTS for m in v.models}))
def test_two_accelerators_run_together_or_say_why_not(name):
    """Each pair on one model of a kind."""
    firsts = {v.active.id: v for v in VARIANTS if name in v.models}.values()
    before = [m for m in list(MAKERS)[: list(MAKERS).index(name)] if KIND[m] == KIND[name]]
    model = model_of(name)
    for a, b in combinations(firsts, 2):
        if any(m in a.models and m in b.models for m in before):
            continue
        if conflict(type(a.active), type(b.active)) is not None:
            with pytest.raises(ValueError, match="cannot be used together"):
                attach.attach(attach.attach(model, a.active), b.active)
            continue
        one, other = (attach.attach(attach.attach(model, x.active), y.active) for x, y in ((a, b), (b, a)))
        nested = [{kind: list(keys) for kind, keys in m.wrappers.items()} for m in (one, other)]
        assert nested[0] == nested[1], f"{a} and {b}: the order of the nodes matters"
        assert sample(one, name, cfg=a.cfg[-1], steps=4).isfinite().all(), f"{a} and {b}"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_our_stochastic_solver(variant):
    name = variant.models[0]
    on = attach.attach(model_of(name), variant.active)
    guider = comfy.samplers.CFGGuider(on)
    guider.set_conds(*prompts(name))
    guider.set_cfg(variant.cfg[-1])
    x = M.latent(2, CHANNELS.get(name, 4))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    sigmas = comfy.samplers.calculate_sigmas(on.get_model_object("model_sampling"), "normal", 6)
    with torch.inference_mode():
        made = guider.sample(noise, x, Sampler(SDEDPMSolverPP()), sigmas, seed=3, disable_pbar=True)
    assert made.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_windows_are_in_order(variant):
    settings = {"start_percent": 0.7, "end_percent": 0.3}
    if not settings.keys() <= set(vars(variant.active)):
        assert variant.active.percents == (0.0, 1.0)
        return
    with pytest.raises(ValueError, match=rf"{variant.active.title}: the window.*ends before it starts"):
        attach.attach(model_of(variant.models[0]), type(variant.active)(**{**vars(variant.active), **settings}))
