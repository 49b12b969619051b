"""Accelerate: measured once, kept, used for every target, refused for another model."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from quickstep_under_test.nodes import accelerate, artifacts, demo
from quickstep_under_test.nodes.accelerate import Accelerate, AccelerationPlan, thinned
from quickstep_under_test.nodes.attach import attach, on
from quickstep_under_test.nodes.bridge import process_of, sampler
from quickstep_under_test.nodes.fingerprint import fingerprint
from quickstep_under_test.solvers.caching import budget
from quickstep_under_test.solvers.caching.deepcache import DeepCache
from quickstep_under_test.solvers.exponential import DDIM, SDEDPMSolverPP
from quickstep_under_test.solvers.schedules import ExponentialSchedule


@pytest.fixture(scope="module")
def shapes():
    model, clip = demo.load_model("unet_small"), demo.load_clip()

    def prompt(text):
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    return model, prompt("a big red circle"), prompt("")


def accelerated(shapes, *, goal="speed-up", speed_up=1.3, max_error=0.5, steps=10, again=False, solver=None, end=0.0):
    model, positive, negative = shapes
    process = process_of(model)
    sigmas = torch.from_numpy(ExponentialSchedule()(process, process.t_max, process.t_min, steps)).float()
    sigmas[-1] = end
    latent = {"samples": torch.zeros(2, 3, 32, 32)}
    given = solver if isinstance(solver, comfy.samplers.KSAMPLER) else sampler(solver or DDIM())
    return Accelerate.execute(
        model, positive, negative, given, sigmas, latent, 3.0, goal, speed_up, max_error, 1, again
    ).args


def test_it_measures_once_and_chooses_for_every_target(shapes, folder, monkeypatch):
    model, text = accelerated(shapes)
    assert on(model) and "times less network work" in text and "plain steps" in text
    (file,) = folder.iterdir()
    written = file.read_bytes()
    monkeypatch.setattr(accelerate, "_measured", lambda *_: pytest.fail("measured twice"))
    close, said = accelerated(shapes, goal="fidelity", max_error=10.0)
    assert on(close) and file.read_bytes() == written
    nothing, said = accelerated(shapes, goal="fidelity", max_error=0.0)
    assert on(nothing) == () and "left as it is" in said
    plan, _ = AccelerationPlan.execute(shapes[0], file.name, "speed-up", 1.3, 0.1).args
    assert on(plan) == on(model)
    other = demo.load_model("unet")
    with pytest.raises(ValueError, match="measured on another model"):
        AccelerationPlan.execute(other, file.name, "speed-up", 1.3, 0.1)
    with pytest.raises(ValueError, match="no plan is chosen"):
        AccelerationPlan.execute(other, artifacts.NONE, "speed-up", 1.3, 0.1)


@pytest.mark.parametrize("target", [{"goal": "fidelity", "max_error": 10.0}, {"speed_up": 5.0}], ids=str)
def test_whatever_the_first_target_every_recipe_is_tried(shapes, folder, monkeypatch, target):
    monkeypatch.setattr(budget, "RECIPES", budget.RECIPES[2:5:2])
    model, text = accelerated(shapes, **target)
    assert on(model) and "StepForecast" in text and "DeepCache" in text


def test_other_schedules_and_samplers_are_measured_anew(shapes, folder, monkeypatch):
    monkeypatch.setattr(budget, "RECIPES", budget.RECIPES[2:3])
    others = [
        {"steps": 7},
        {"solver": SDEDPMSolverPP()},
        {"solver": SDEDPMSolverPP(eta=0.5)},
        {"end": 0.01},
        {"solver": comfy.samplers.ksampler("euler")},
        {"solver": comfy.samplers.ksampler("euler", {"s_churn": 1.0})},
    ]
    accelerated(shapes, steps=6)
    for number, other in enumerate(others):
        accelerated(shapes, **{"steps": 6, **other})
        assert len(list(folder.iterdir())) == 2 + number
    monkeypatch.setattr(accelerate, "_measured", lambda *_: pytest.fail("measured twice"))
    for other in others:
        accelerated(shapes, **{"steps": 6, **other})


def test_what_it_cannot_measure_is_refused(shapes, folder):
    model, positive, negative = shapes
    with pytest.raises(ValueError, match="DeepCache is on the model"):
        accelerated((attach(model, DeepCache()), positive, negative))
    with pytest.raises(ValueError, match="sigmas holds 2 values"):
        accelerated(shapes, steps=1)
    assert list(folder.iterdir()) == []


def test_a_thinned_schedule_keeps_its_ends_and_its_curve():
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])
    half = thinned(sigmas, 0.5)
    assert half.tolist() == [8.0, 2.0, 0.0] and thinned(sigmas, 1.0).tolist() == sigmas.tolist()


def test_the_fingerprint_is_of_the_weights(shapes):
    assert fingerprint(shapes[0]) == fingerprint(demo.load_model("unet_small")) == fingerprint(shapes[0].clone())
    assert fingerprint(shapes[0]) != fingerprint(demo.load_model("unet"))
