"""Nodes that gather statistics, and what uses them: in a real ComfyUI, on models whose answer is known."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from quickstep_under_test.nodes import calibration_statistics
from quickstep_under_test.nodes.bridge import process_of, sampler
from quickstep_under_test.nodes.calibration_statistics import EstimateStatistics
from quickstep_under_test.nodes.samplers import NODES
from quickstep_under_test.solvers import ems
from quickstep_under_test.solvers.artifact import load
from quickstep_under_test.solvers.exponential import DPMSolverPP

from . import models

CONDITION = models.conditioning(1)
KINDS = pytest.mark.parametrize("kind", ["flow", "eps", "zsnr"])


def node(name: str):
    return next(n for n in NODES if n.GET_SCHEMA().node_id == f"Quickstep_{name}")


def given(kind="flow", *, model=None, batch=4, size=8, name="mine", cfg=1.0, seed=5, **more) -> dict:
    return dict(
        model=model or models.gaussian(kind, std=0.7), positive=CONDITION, negative=CONDITION,
        latent={"samples": models.latent(batch, size=size)}, cfg=cfg, seed=seed, name=name, **more,
    )  # fmt: skip


def run(cls, **options):
    with torch.inference_mode():
        return cls.execute(**options).args


def start(kind: str, seed=77) -> torch.Tensor:
    return torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def error(kind: str, how, sigmas, latent=None, noise=None) -> float:
    """RMS distance to the exact end of the flow: data N(1/2, 0.7^2)."""
    model = models.gaussian(kind, std=0.7)
    noise = start(kind) if noise is None else noise
    top = float(model.get_model_object("model_sampling").sigma_max)
    x = noise * (1.0 if kind == "flow" else (1.0 + top**2) ** 0.5)
    alpha = 0.0 if kind == "flow" else 1.0
    exact = 0.5 + (x - alpha * 0.5) * 0.7 / (top**2 + alpha * 0.7**2) ** 0.5
    if latent is not None:
        noise = torch.zeros_like(noise)
    with torch.inference_mode():
        made = comfy.sample.sample_custom(
            model, noise, 1.0, how, sigmas, CONDITION, CONDITION, torch.zeros_like(noise) if latent is None else latent,
            disable_pbar=True, seed=0,
        )  # fmt: skip
    return float((made - exact).square().mean().sqrt())


def sigmas(kind: str, steps: int) -> torch.Tensor:
    return torch.tensor(calibration_statistics.schedules(process_of(models.gaussian(kind)), steps)[2])


@KINDS
def test_model_statistics_are_measured_kept_and_used(folder, kind):
    how, curve, report = run(EstimateStatistics, **given(kind, statistics="economy", samples=8, levels=40, steps=4))
    assert curve.shape == (1, 600, 960, 3) and "mine.safetensors" in report
    (file,) = folder.iterdir()
    found = load(file, ems.KIND)
    then = found.found_for
    assert then.loss_after < 0.7 * then.loss_before and then.cfg == 1.0 and then.shape == (4, 8, 8)
    fresh = node("DPMSolverV3").execute(statistics="mine.safetensors").args[0]
    for made in (how, fresh):
        assert error(kind, made, sigmas(kind, 4)) < 0.7 * error(kind, sampler(DPMSolverPP()), sigmas(kind, 4))


def test_model_statistics_per_channel_serve_other_sizes(folder):
    how, *_ = run(EstimateStatistics, **given(statistics="scalar", samples=8, levels=16, steps=4, size=6))
    assert error("flow", how, sigmas("flow", 4)) < 0.5 * error("flow", sampler(DPMSolverPP()), sigmas("flow", 4))


@pytest.mark.parametrize("count", [1, 3])
def test_model_statistics_of_few_pictures_and_two_prompts(folder, count):
    """One picture, and more samples wanted than there are; prompts that cannot stand side by side."""
    pictures = {"samples": torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))}
    other = models.conditioning(2, tokens=9)
    *_, report = run(
        EstimateStatistics,
        **given(statistics="full", samples=9, levels=3, steps=1, pictures=pictures, prompts={"prompt0": other}),
    )
    assert f"{count} samples" in report


def test_pictures_of_another_size_are_refused_before_any_call(folder):
    pictures = {"samples": torch.zeros(2, 4, 9, 8)}
    with pytest.raises(ValueError, match=r"pictures are of shape \(4, 9, 8\), but the latent is of shape \(4, 8, 8\)"):
        run(EstimateStatistics, **given(statistics="full", samples=2, levels=3, steps=1, pictures=pictures))
    assert not list(folder.iterdir())


def test_the_user_can_stop_it(folder, monkeypatch):
    seen = []

    def progress(self, value, *rest, **more):
        seen.append(value)
        if len(seen) > 5:
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", progress)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(EstimateStatistics, **given(statistics="scalar", samples=8, levels=40, steps=4))
    comfy.model_management.interrupt_current_processing(False)
    assert seen[0] == 0 and sorted(seen) == seen and not list(folder.iterdir())
