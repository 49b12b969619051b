"""Find Start Noise and Start noise (found): in a real ComfyUI, on a model that makes N(what it is told, 0.7^2)."""

from __future__ import annotations

import re

import comfy.model_management
import comfy.sample
import comfy.utils
import pytest
import torch
from comfy.controlnet import ControlBase
from comfy_extras.nodes_custom_sampler import Guider_Basic, RandomNoise, SamplerCustomAdvanced
from quickstep_under_test.nodes import artifacts, live
from quickstep_under_test.nodes.bridge import sampler
from quickstep_under_test.nodes.calibration_boundary import FindStartNoise, StartNoise, each
from quickstep_under_test.nodes.calibration_found import InspectCalibration
from quickstep_under_test.solvers.artifact import Artifact, load, save
from quickstep_under_test.solvers.calibration.boundary import KIND, RANDOM
from quickstep_under_test.solvers.er_sde import ERSDE
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP

from . import models

KINDS = pytest.mark.parametrize("kind", ["flow", "eps"])
SHAPE = (4, 6, 6)


class Told(models.GaussNet):
    """Its data's mean is the mean of the conditioning."""

    def forward(self, x, timestep, context=None, **more):
        self.mean = context.mean((1, 2)).view(-1, 1, 1, 1)
        return super().forward(x, timestep, context, **more)


def told(kind: str):
    model = models.gaussian(kind, std=0.7)
    model.model.diffusion_model.__class__ = Told
    return model


def condition(mean: float) -> list:
    return [[torch.full((1, 2, 3), mean), {}]]


MEANS = [-1.0, 0.0, 1.0, 2.0, -2.0, 0.5]


def references(count: int, seed=1) -> dict:
    """Data of the first of ``MEANS``."""
    z = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return {"samples": torch.tensor(MEANS[:count]).view(-1, 1, 1, 1) + 0.7 * z}


def times(kind: str) -> torch.Tensor:
    top = float(models.gaussian(kind).get_model_object("model_sampling").sigma_max)
    return torch.tensor([top, 0.5 * top, 0.1 * top, 0.0])


def find(kind="flow", count=4, cls=FindStartNoise, **more):
    given = dict(
        model=told(kind), positive=condition(MEANS[0]), negative=condition(0.0), references=references(count),
        positives={f"positive{i}": condition(m) for i, m in enumerate(MEANS[1:count])}, sampler=sampler(DDIM()),
        sigmas=times(kind), cfg=1.0, candidates=6, minutes=60.0, seed=5, name="mine", few=count, together=4,
    )  # fmt: skip
    with torch.inference_mode():
        return cls.execute(**given | more).args


def end(kind: str, noise: torch.Tensor, mean: float) -> torch.Tensor:
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            told(kind), noise, 1.0, sampler(DDIM()), times(kind), condition(mean), condition(0.0),
            torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip


def losses(kind: str, seeds: range, which: range) -> list[float]:
    """The mean error of each seed's noise, sampled as ComfyUI does."""
    x0 = references(6)["samples"]
    found = []
    for seed in seeds:
        noise = RandomNoise.execute(seed).args[0].generate_noise({"samples": torch.zeros(1, *SHAPE)})
        apart = [(end(kind, noise, MEANS[r]) - x0[r : r + 1]).square().mean().sqrt() for r in which]
        found.append(float(torch.stack(apart).mean()))
    return found


@KINDS
def test_the_found_noise_is_the_best_seed_of_comfyuis_own_sampling(folder, kind):
    noise, curve, report = find(kind, 6)
    tried, best = losses(kind, range(5, 11), range(4)), load(folder / "mine.safetensors", KIND)
    winner = 5 + tried.index(min(tried))
    assert noise.seed == winner == best.table["seed"] and f"with seed {winner}," in report
    assert best.table["error"] == pytest.approx(sorted(tried), rel=1e-4)
    assert curve.shape == (1, 600, 960, 3)
    others = losses(kind, range(11, 11 + RANDOM), range(4, 6))
    after = losses(kind, range(winner, winner + 1), range(4, 6))[0]
    then = best.found_for
    assert then.loss_after == pytest.approx(after, rel=1e-4)
    assert then.loss_before == pytest.approx(sum(others) / RANDOM, rel=1e-4)
    assert f"{sum(o > after for o in others)} are worse" in report and "2 references kept aside" in report
    assert ("no better than a random noise" in report) == (after >= sum(others) / RANDOM)
    assert (then.solver, then.steps, then.cfg, then.shape) == ("DDIM", 3, 1.0, SHAPE)


def test_the_file_is_used_in_comfyuis_sampler_for_any_batch_of_that_size(folder):
    noise, *_ = find()
    fresh, about = StartNoise.execute("mine.safetensors", told("flow")).args
    random = RandomNoise.execute(noise.seed).args[0].generate_noise({"samples": torch.zeros(1, *SHAPE)})
    assert "One start noise" in about and fresh.seed == noise.seed
    three = {"samples": torch.zeros(3, *SHAPE)}
    for made in (noise, fresh):
        assert torch.equal(made.generate_noise(three), random.repeat(3, 1, 1, 1))
    guider = Guider_Basic(told("flow"))
    guider.set_conds(condition(1.0))
    with torch.inference_mode():
        sampled = SamplerCustomAdvanced.execute(fresh, guider, sampler(DDIM()), times("flow"), three).args[0]["samples"]
    torch.testing.assert_close(sampled, end("flow", random, 1.0).repeat(3, 1, 1, 1))
    with pytest.raises(ValueError, match=r"latents of shape \(4, 6, 6\), and this one is of shape \(4, 8, 6\)"):
        fresh.generate_noise({"samples": torch.zeros(1, 4, 8, 6)})
    picture, words = InspectCalibration.execute("mine.safetensors").args
    assert picture.shape == (1, 600, 960, 3) and "Use Start noise (found)" in words
    assert artifacts.files(KIND) == ["none", "mine.safetensors"]
    save(folder / "odd.safetensors", Artifact(KIND, {}, {"noise": torch.zeros(*SHAPE)}))
    with pytest.raises(ValueError, match="is damaged: it has no noise or no seed"):
        StartNoise.execute("odd.safetensors")
    with pytest.raises(ValueError, match="choose a file of Find Start Noise"):
        StartNoise.execute("none")


def test_one_conditioning_serves_all_and_a_batch_of_pictures_is_taken_apart():
    text, pictures, pooled = torch.zeros(1, 2, 3), torch.rand(4, 4, 6, 6), torch.rand(1, 5)
    batch = [
        [text, {"concat_latent_image": pictures, "reference_latents": [pictures, pooled], "pooled_output": pooled}]
    ]
    rows = each(batch, None, 4, "")
    for i, [(kept, options)] in enumerate(rows):
        assert kept is text and torch.equal(options["concat_latent_image"], pictures[i : i + 1])
        assert torch.equal(options["reference_latents"][0], pictures[i : i + 1])
        assert options["pooled_output"] is options["reference_latents"][1] is pooled
    assert each(batch, {"positive0": None}, 3, "")[2][0][1]["concat_latent_image"] is pictures
    assert len(each(batch, {"positive0": batch, "positive1": batch}, 3, "")) == 3
    with pytest.raises(ValueError, match="here: 2 conditionings are connected; connect one, or 3, one per reference"):
        each(batch, {"positive0": batch}, 3, "here")


def test_a_controlnet_with_a_batch_of_pictures_is_refused():
    """Also behind another one. It is no tensor, so that nothing is taken apart: every noise would get another picture."""
    one, many = (ControlBase().set_cond_hint(torch.rand(n, 3, 48, 48)) for n in (1, 3))
    text = torch.zeros(1, 2, 3)
    assert each([[text, {"control": one}]], None, 3, "")[2][0][1]["control"] is one
    assert len(each([[text, {"control": many}]], None, 1, "")) == 1
    with pytest.raises(ValueError, match=r"here: its ControlNet .*; connect one conditioning for each reference"):
        each([[text, {"control": ControlBase().set_previous_controlnet(many)}]], None, 3, "here")


def test_few_references_and_one_candidate(folder):
    noise, _, report = find(count=2, candidates=1, together=9)
    assert noise.seed == 5 and "fewer than three" in report
    assert load(folder / "mine.safetensors").found_for.loss_after is None


def test_it_is_said_when_it_is_not_better(folder):
    """With one candidate, which is one random noise among others: about half of them are worse, or more."""
    said = []
    for seed in range(4):
        *_, report = find(count=3, candidates=1, seed=50 * seed, name=f"n{seed}")
        found, mean = map(float, re.search(r"error ([\d.]+), and ([\d.]+) in the mean", report).groups())
        assert ("It is no better than a random noise there: do not use it" in report) == (found >= mean)
        said.append(found >= mean)
    assert any(said) and not all(said)


def test_bad_requests_are_refused_before_any_call(folder):
    wide = {"samples": torch.rand(3, 16, 6, 6)}
    with pytest.raises(ValueError, match="references have 16 channels, but the model has 4"):
        find(references=wide, count=3)
    with pytest.raises(ValueError, match="negative: 2 conditionings are connected; connect one, or 4"):
        find(negatives={"negative0": condition(1.0)})
    with pytest.raises(ValueError, match="adds noise"):
        find(sampler=sampler(ERSDE()))
    with pytest.raises(ValueError, match="must run from 1 to 0"):
        find(sigmas=torch.tensor([0.5, 0.0]))
    with pytest.raises(ValueError, match="plain file name"):
        find(name="../mine")
    assert not list(folder.iterdir())


def test_the_minutes_end_it_and_the_user_does_and_both_keep_the_best(folder, monkeypatch):
    sent, calls = [], []

    def progress(self, value, total=None, preview=None):
        calls.append(value)
        sent.append(preview)
        if len(calls) == 9:
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", progress)
    monkeypatch.setattr(live, "PREVIEW", 0.0)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        find(candidates=200, sampler=sampler(DPMSolverPP()))
    comfy.model_management.interrupt_current_processing(False)
    stopped = load(folder / "mine.safetensors", KIND)
    assert stopped.table["candidates"] == 12 and stopped.found_for.loss_after is None
    shown = [preview for preview in sent if preview is not None]
    assert len(shown) > 3 and all(kind == "JPEG" and size == 640 for kind, _, size in shown)
    assert calls == sorted(calls)
    *_, report = find(candidates=20_000, minutes=0.002, name="short")
    assert "The time was over before" in report and "kept aside: error" in report
