"""The level of guidance inside a real ComfyUI: what is left out, what stands in for it, and what is not touched."""

import importlib.util
import sys
from pathlib import Path

import comfy.context_windows
import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import Guider_DualCFG
from quickstep_under_test.nodes import attach
from quickstep_under_test.nodes.calibrate_linear_ag import CalibrateLinearAG
from quickstep_under_test.solvers.artifact import load
from quickstep_under_test.solvers.caching.adaptive_guidance import AdaptiveGuidance
from quickstep_under_test.solvers.caching.guidance_cache import GuidanceCache
from quickstep_under_test.solvers.caching.guidance_window import GuidanceWindow
from quickstep_under_test.solvers.caching.linear_ag import KIND, LinearAG


def _beside(name):
    full = f"quickstep_tests_comfy_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


M = _beside("models")
CACHED = GuidanceCache(interval=3, warmup=2, tail=0, start_percent=0.0)


@pytest.fixture(scope="module")
def model():
    return M.unet()


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def last(model):
    return attach.ledger_of(model).runs[-1]


def close(a, b):
    return float((a - b).norm() / b.norm()) < 5e-6


def seen(model):
    """A clone whose calls of the conditionings' batch are written down: which sides were real, and what came out."""
    made = []

    def look(executor, base, conds, x, timestep, options):
        out = executor(base, conds, x, timestep, options)
        made.append(([side is not None for side in conds], [side.clone() for side in out]))
        return out

    clone = model.clone()
    # Outermost, so it sees what the sampler gets, and once more innermost, for what the network computed.
    inner = []

    def deep(executor, base, conds, x, timestep, options):
        inner.append([side is not None for side in conds])
        return executor(base, conds, x, timestep, options)

    kinds = clone.wrappers.get(WrappersMP.CALC_COND_BATCH, {})
    clone.wrappers[WrappersMP.CALC_COND_BATCH] = {"outer": [look], **kinds, "inner": [deep]}
    return clone, made, inner


@pytest.mark.smoke
@pytest.mark.parametrize(("sampler", "calls"), [("euler", 9), ("heun", 17), ("dpmpp_2m_sde", 9), ("euler_cfg_pp", 9)])
def test_one_call_in_three_has_both_sides(model, sampler, calls):
    clone, made, inner = seen(attach.attach(model, CACHED))
    M.sample(clone, sampler, 9)
    full = [n < 2 or (n - 1) % 3 == 0 for n in range(calls)]
    assert inner == [[True, both] for both in full]
    # Nobody outside sees a difference: two sides, and the second is neither zeros nor the first.
    assert all(sides == [True, True] and len(out) == 2 for sides, out in made)
    assert all(float((out[1] - out[0]).abs().max()) > 0 and float(out[1].abs().max()) > 0 for _, out in made)
    assert last(clone).calls == calls and last(clone).work == pytest.approx((calls + sum(full)) / (2 * calls))


def test_dropped_guidance_is_the_positive_prompt_alone(model):
    dropped = attach.attach(model, GuidanceWindow(start_percent=1.0, end_percent=1.0))
    assert torch.equal(M.sample(dropped, cfg=7.0), M.sample(model, cfg=1.0))
    assert last(dropped).work == 1.0 and last(dropped).forwards == last(dropped).calls


def test_the_window_is_where_guidance_is(model):
    clone, _, inner = seen(attach.attach(model, GuidanceWindow(start_percent=0.25, end_percent=0.75)))
    M.sample(clone, steps=20)
    both = [sides[1] for sides in inner]
    assert sum(both) == pytest.approx(10, abs=2) and not both[0] and not both[-1] and both[10]


@pytest.mark.parametrize("cfg", [1.0, 7.0])
def test_without_a_negative_side_it_says_so_once(model, cfg):
    for settings in (CACHED, AdaptiveGuidance(), GuidanceWindow()):
        on = attach.attach(model, settings)
        made = M.sample(on, cfg=cfg)
        said = last(on).line().count("did nothing")
        assert said == (cfg == 1.0), settings
        assert cfg > 1.0 or torch.equal(made, M.sample(model, cfg=1.0))


def test_another_guider_is_left_alone(model):
    """Guiders that join three conditionings have another structure."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 5)

    def run(patched):
        guider = Guider_DualCFG(patched)
        guider.set_conds(M.conditioning(1), M.conditioning(3), M.conditioning(2))
        guider.set_cfg(5.0, 3.0)
        with torch.inference_mode():
            return guider.sample(
                noise,
                torch.zeros_like(noise),
                comfy.samplers.sampler_object("euler"),
                sigmas,
                seed=0,
                disable_pbar=True,
            )

    on = attach.attach(model, CACHED)
    assert torch.equal(run(on), run(model)) and "did nothing" in last(on).line()


def test_several_negatives_are_left_out_together(model):
    negative = [*M.conditioning(2), *M.conditioning(3, area=(8, 4, 0, 0)), *M.conditioning(4, area=(4, 8, 0, 0))]
    on = attach.attach(model, CACHED)
    made = M.sample(on, steps=6, negative=negative)
    assert made.isfinite().all() and not torch.equal(made, M.sample(model, steps=6, negative=negative))
    # The areas' copies on the positive side stay: 1 + 2 of 2 * (1 + 2) entries.
    assert last(on).work == pytest.approx((3 * 1.0 + 3 * 0.5) / 6, abs=0.01)


def test_extra_guidance_passes_are_not_touched(model):
    """A pass with both sides again, through a changed network, as some packs make it, and one with the positive side."""
    passes = []

    def again(args):
        options = comfy.model_patcher.create_model_options_clone(args["model_options"])
        options["transformer_options"].setdefault("patches", {})["input_block_patch"] = [lambda h, o: h * 0.5]
        one = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        two = comfy.samplers.calc_cond_batch(
            args["model"], [args["cond"], args["uncond"]], args["input"], args["sigma"], options
        )
        passes.append(two[1].clone())
        return args["denoised"] + 0.1 * (args["cond_denoised"] - one[0]) + 0.1 * (args["uncond_denoised"] - two[1])

    guided = model.clone()
    guided.set_model_sampler_post_cfg_function(again)
    clone, _, inner = seen(attach.attach(guided, CACHED))
    M.sample(clone, steps=6)
    assert [inner[i : i + 3] for i in range(0, 18, 3)] == [
        [[True, both], [True], [True, True]] for both in (True, True, False, False, True, False)
    ]
    assert all(float(side.abs().max()) > 0 for side in passes)
    assert torch.equal(M.sample(attach.attach(guided, GuidanceCache(interval=1)), steps=6), M.sample(guided, steps=6))


def test_context_windows_have_a_difference_each(model):
    handler = comfy.context_windows.IndexListContextHandler(
        context_schedule=comfy.context_windows.get_matching_context_schedule("standard_static"),
        fuse_method=comfy.context_windows.get_matching_fuse_method("pyramid"),
        context_length=4, context_overlap=2, dim=0,
    )  # fmt: skip
    windowed = model.clone()
    windowed.model_options["context_handler"] = handler
    x, noise = M.latent(6), torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    keys = []

    def watch(executor, *args, **kwargs):
        result = executor(*args, **kwargs)
        session = args[2]["transformer_options"][attach.key_of(CACHED)]
        keys.append({key[0] for key in session.store._kept})
        return result

    clone, _, inner = seen(attach.attach(windowed, CACHED))
    clone.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "watch", watch)
    made = M.sample(clone, steps=5, x=x, noise=noise)
    assert keys[-1] == {(0, 1, 2, 3), (2, 3, 4, 5)}
    assert inner == [[True, both] for both in (True, True, False, False, True) for _ in range(2)]
    whole = M.sample(attach.attach(windowed, GuidanceCache(interval=1)), steps=5, x=x, noise=noise)
    assert torch.equal(whole, M.sample(windowed, steps=5, x=x, noise=noise)) and not torch.equal(made, whole)


def test_a_batch_is_as_many_runs(model):
    on = attach.attach(model, CACHED)
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    together = M.sample(on, x=M.latent(3), noise=noise)
    assert all(close(together[i : i + 1], M.sample(on, noise=noise[i : i + 1])) for i in range(3))


def test_known_bugs_of_other_packs(model):
    """x is not written into, pre-CFG functions run with both sides, and a second run starts anew."""
    before, given = [], []

    def pre(args):
        given.append(([c is not None for c in args["conds"]], [bool(o.abs().max() > 0) for o in args["conds_out"]]))
        return args["conds_out"]

    hooked = model.clone()
    hooked.set_model_sampler_pre_cfg_function(pre)
    on = attach.attach(hooked, AdaptiveGuidance(threshold=-1.0))

    def watch(executor, x, timestep, *args, **kwargs):
        kept = x.clone()
        result = executor(x, timestep, *args, **kwargs)
        before.append(torch.equal(kept, x))
        return result

    on.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "watch", watch)
    first = M.sample(on, steps=6)
    assert all(before) and given == [([True, True], [True, True])] * 6
    assert torch.equal(M.sample(on, steps=6), first)
    assert last(on).work == pytest.approx((1 + 5 * 0.5) / 6)


def test_calibration_of_linear_ag(folder):
    model = M.unet()
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 8)
    given = dict(
        model=model, positive=M.conditioning(1), negative=M.conditioning(2), sigmas=sigmas, latent_image={"samples": M.latent()},
        cfg=4.0, interval=3, warmup=2, history=2, runs=2, seed=0, name="mine",
    )  # fmt: skip
    with torch.inference_mode():
        file, text = CalibrateLinearAG.execute(sampler=comfy.samplers.sampler_object("euler"), **given).args
        with pytest.raises(ValueError, match="heun made 15 guided calls in 8 steps"):
            CalibrateLinearAG.execute(sampler=comfy.samplers.sampler_object("heun"), **given)
    assert file == "mine.json" and "with the fit" in text
    found = load(folder / file, KIND)
    assert found.found_for.loss_after is not None and found.found_for.solver == "euler" and found.found_for.cfg == 4.0
    settings = LinearAG(found)
    clone, _, inner = seen(attach.attach(model, settings))
    M.sample(clone, steps=8)
    assert [sides[1] for sides in inner] == [step is None for step in found.table["steps"]] and not all(
        sides[1] for sides in inner
    )
    assert "calibrated for" not in last(clone).line()
    assert "calibrated for CFG 4" in _line(model, settings, cfg=6.0) and "the sampler euler" in _line(
        model, settings, sampler="dpmpp_2m"
    )
    assert "is off: it was calibrated for 8 steps" in _line(model, settings, steps=5)


def _line(model, settings, **options):
    on = attach.attach(model, settings)
    M.sample(on, **options)
    return last(on).line()


def test_a_calibration_for_another_model_is_said(caplog):
    from quickstep_under_test.nodes.fingerprint import fingerprint
    from quickstep_under_test.solvers.artifact import Artifact, FoundFor
    from quickstep_under_test.solvers.caching.linear_ag_fit import fit

    model = M.unet()
    table = {"times": [], "steps": fit([], 8, 3, 2, 2)}
    for name, said in ((fingerprint(model), 0), ("another", 1), (None, 0)):
        caplog.clear()
        attach.attach(model, LinearAG(Artifact(KIND, table, found_for=FoundFor(model=name))))
        assert sum("made for another model" in r.getMessage() for r in caplog.records) == said
