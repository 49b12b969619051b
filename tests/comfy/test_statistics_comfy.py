"""Nodes that gather statistics, and what uses them: in a real ComfyUI, on models whose answer is known."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from quickstep_under_test.nodes import (
    calibration_statistics,
    calibration_statistics_run,
    calibration_statistics_start,
    live,
    plot,
)
from quickstep_under_test.nodes.bridge import process_of, sampler
from quickstep_under_test.nodes.calibration_found import InspectCalibration
from quickstep_under_test.nodes.calibration_statistics_ems import EstimateStatistics
from quickstep_under_test.nodes.calibration_statistics_run import schedules
from quickstep_under_test.nodes.calibration_statistics_score import (
    FindScoreMean,
    FoundEpsilonScalingNode,
    MeasureEpsilonScaling,
    ScoreMeanNode,
)
from quickstep_under_test.nodes.calibration_statistics_start import MeasureGaussian, SignalLeak, Teleport
from quickstep_under_test.nodes.samplers import NODES
from quickstep_under_test.solvers import ems
from quickstep_under_test.solvers.adaptive import DPMSolverAdaptive
from quickstep_under_test.solvers.artifact import load
from quickstep_under_test.solvers.calibration import exposure, gaussian, score_mean
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP

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
    made = made_by(model, how, sigmas, latent, noise if latent is None else torch.zeros_like(noise))
    return float((made - exact).square().mean().sqrt())


def sigmas(kind: str, steps: int) -> torch.Tensor:
    return torch.tensor(schedules(process_of(models.gaussian(kind)), steps)[2])


@KINDS
def test_model_statistics_are_measured_kept_and_used(folder, kind):
    how, curve, report = run(EstimateStatistics, **given(kind, statistics="economy", samples=4, levels=30, steps=4))
    assert curve.shape == (1, 600, 960, 3) and "mine.safetensors" in report
    (file,) = folder.iterdir()
    found = load(file, ems.KIND)
    then = found.found_for
    assert then.loss_after < 0.7 * then.loss_before and then.cfg == 1.0 and then.shape == (4, 8, 8)
    fresh = node("DPMSolverV3").execute(statistics="mine.safetensors").args[0]
    for made in (how, fresh):
        assert error(kind, made, sigmas(kind, 4)) < 0.7 * error(kind, sampler(DPMSolverPP()), sigmas(kind, 4))


def test_model_statistics_per_channel_serve_other_sizes(folder, caplog):
    """And nothing is said of a size they were not measured for."""
    how, *_ = run(EstimateStatistics, **given(statistics="scalar", samples=8, levels=16, steps=4, size=6))
    assert error("flow", how, sigmas("flow", 4)) < 0.5 * error("flow", sampler(DPMSolverPP()), sigmas("flow", 4))
    assert "may not fit" not in caplog.text
    assert load(folder / "mine.safetensors").found_for.shape is None


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
        run(EstimateStatistics, **given(statistics="scalar", samples=4, levels=30, steps=4))
    comfy.model_management.interrupt_current_processing(False)
    assert seen[0] == 0 and sorted(seen) == seen and not list(folder.iterdir())


@pytest.mark.parametrize("cls", [EstimateStatistics, MeasureGaussian], ids=lambda cls: cls.__name__)
def test_what_took_long_is_in_a_file_before_it_is_compared(folder, monkeypatch, cls):
    """Stopped then, it can be used; left alone, the same file has the comparison."""

    def stopped(*arguments):
        raise comfy.model_management.InterruptProcessingException
        yield

    with monkeypatch.context() as patched:
        patched.setattr(calibration_statistics_run, "compared", stopped)
        patched.setattr(calibration_statistics_start, "jumps", stopped)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(cls, **given(**CURVES[cls]))
    (file,) = folder.iterdir()
    found = load(file)
    assert found.tensors and found.found_for.cfg == 1.0 and found.found_for.loss_after is None
    assert file.name == "mine.safetensors" and InspectCalibration.execute(file.name).args[0].shape == (1, 600, 960, 3)
    run(cls, **given(**CURVES[cls]))
    again = load(folder / "mine_2.safetensors")
    assert len(list(folder.iterdir())) == 2 and all(torch.equal(v, again.tensors[n]) for n, v in found.tensors.items())
    assert again.found_for.loss_after is not None if cls is EstimateStatistics else again.table["jump_error"]


CURVES = {
    EstimateStatistics: dict(statistics="economy", samples=4, levels=5, steps=1),
    FindScoreMean: dict(pictures={"samples": torch.zeros(4, 4, 8, 8)}, statistics="channel", samples=4, levels=5),
    MeasureEpsilonScaling: dict(sampler=sampler(DDIM()), sigmas=torch.tensor([1.0, 0.5, 0.2, 0.0]), samples=2),
    MeasureGaussian: dict(samples=4, frequencies=4, rank=0),
}
"""Of each node that measures: inputs with which it is quick."""


@pytest.mark.parametrize("cls", CURVES, ids=lambda cls: cls.__name__)
def test_what_is_measured_is_shown_while_it_is(folder, monkeypatch, cls):
    sent = []

    def progress(self, value, total=None, preview=None):
        if preview is not None:
            sent.append((value, preview))

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", progress)
    monkeypatch.setattr(live, "PREVIEW", 0.0)
    drawn = run(cls, **given(**CURVES[cls]))[1]
    value, (kind, picture, size) = sent[-1]
    assert kind == "JPEG" and size == 640 and drawn.shape[1:3] == (picture.height, picture.width)
    # the drawing that is the final one too, of the levels done by then: at least the title is the same
    assert value > 0 and torch.equal(plot.to_image(picture)[:, :40], drawn[:, :40])
    sent.clear()
    monkeypatch.setattr(live, "PREVIEW", 1e9)
    run(cls, **given(**{**CURVES[cls], "name": "again"}))
    assert not sent


def pictures(count: int, size=8, seed=1) -> dict:
    """Of the model's data."""
    z = torch.randn(count, 4, size, size, generator=torch.Generator().manual_seed(seed))
    return {"samples": 0.5 + 0.7 * z}


@KINDS
def test_a_score_mean_is_measured_kept_and_used(folder, kind):
    """Of a network whose data lie 0.2 lower than the pictures: with the file its samples lie 0.2 higher."""
    low = models.gaussian(kind, mean=0.3, std=0.7)
    file, curve, report = run(
        FindScoreMean,
        **given(kind, model=low, batch=16, pictures=pictures(48), statistics="channel", samples=64, levels=20),
    )
    assert file == "mine.safetensors" and "48 pictures" in report and curve.shape == (1, 600, 960, 3)
    found = load(folder / file, score_mean.KIND)
    assert found.found_for.cfg == 1.0 and found.found_for.shape is None
    assert found.tensors["eta"].shape == (20, 4, 1, 1)
    plain = comfy.samplers.sampler_object("euler")
    how = ScoreMeanNode.execute(sampler=plain, strength=1.0, calibration=file).args[0]
    ends = [made_by(low, s, sigmas(kind, 12)).mean() for s in (plain, how)]
    assert abs(ends[0] - 0.3) < 0.08  # of 1024 numbers, with the error of few steps
    assert float(ends[1] - ends[0]) == pytest.approx(0.2, abs=0.03)


def made_by(model, how, times, latent=None, noise=None) -> torch.Tensor:
    noise = start("") if noise is None else noise
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model, noise, 1.0, how, times, CONDITION, CONDITION, torch.zeros_like(noise) if latent is None else latent,
            disable_pbar=True, seed=0,
        )  # fmt: skip


@KINDS
def test_epsilon_scaling_is_measured_kept_and_used(folder, kind):
    """DDIM's few steps make too little noise of this data, and the factors make up for some of it."""
    times = sigmas(kind, 6)
    how, curve, report = run(MeasureEpsilonScaling, **given(kind, samples=4, sampler=sampler(DDIM()), sigmas=times))
    assert curve.shape == (1, 600, 960, 3) and "mine.json" in report
    (file,) = folder.iterdir()
    found = load(file, exposure.KIND)
    then, tried = found.found_for, found.table["tried"]
    assert then.solver == "DDIM" and then.steps == 6 and min(tried.values()) < 0.99 * tried["none"]
    assert then.loss_after < then.loss_before
    fresh = FoundEpsilonScalingNode.execute(sampler=sampler(DDIM()), calibration="mine.json").args[0]
    core = FoundEpsilonScalingNode.execute(
        sampler=comfy.samplers.sampler_object("euler"), calibration="mine.json"
    ).args[0]
    off = error(kind, sampler(DDIM()), times)
    assert error(kind, how, times) < off and error(kind, fresh, times) == error(kind, how, times)
    assert error(kind, core, times) == pytest.approx(error(kind, how, times), rel=1e-3)


def test_epsilon_scaling_wants_a_whole_deterministic_run(folder):
    with pytest.raises(ValueError, match="adds noise with these settings"):
        run(MeasureEpsilonScaling, **given(samples=2, sampler=sampler(DDIM(eta=1.0)), sigmas=sigmas("flow", 3)))
    with pytest.raises(ValueError, match="chooses its own steps"):
        run(MeasureEpsilonScaling, **given(samples=2, sampler=sampler(DPMSolverAdaptive()), sigmas=sigmas("flow", 3)))
    with pytest.raises(ValueError, match="must run from 1 to 0"):
        run(MeasureEpsilonScaling, **given(samples=2, sampler=sampler(DDIM()), sigmas=sigmas("flow", 3)[1:]))


class Noise:
    """As RandomNoise makes."""

    seed = 77

    def generate_noise(self, latent):
        assert latent["samples"].shape == (4, 4, 8, 8)
        return start("")


@pytest.mark.parametrize(("kind", "own"), [("flow", False), ("eps", True), ("zsnr", False)])
def test_teleport_starts_where_the_run_would_be(folder, kind, own):
    file, curve, report = run(
        MeasureGaussian,
        **given(kind, samples=64, frequencies=1, rank=0, batch=32, pictures=None if own else pictures(64)),
    )
    assert curve.shape == (1, 600, 960, 3) and "A jump down to sigma" in report
    table = load(folder / file, gaussian.KIND).table
    assert max(table["jump_error"]) < 0.05
    times, model = sigmas(kind, 12), models.gaussian(kind, std=0.7)
    latent, rest = run(
        Teleport, model=model, noise=Noise(), latent={"samples": models.latent(4)}, sigmas=times, file=file, skip=8
    )
    assert torch.equal(rest, times[8:])
    how = sampler(DPMSolverPP())
    jumped = error(kind, how, rest, latent=latent["samples"])
    assert jumped < 0.06  # the same picture, of the same noise
    assert error(kind, how, rest) > 5 * jumped


@KINDS
def test_teleport_in_samplers_of_both_kinds(folder, kind):
    """SamplerCustomAdvanced without noise, and KSampler (Advanced) from the step on: the same."""
    file, *_ = run(MeasureGaussian, **given(kind, samples=8, frequencies=2, rank=0, pictures=pictures(8)))
    model = models.gaussian(kind, std=0.7)
    times = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 8)
    latent, rest = run(
        Teleport, model=model, noise=Noise(), latent={"samples": models.latent(4)}, sigmas=times, file=file, skip=3
    )
    one = made_by(model, comfy.samplers.sampler_object("euler"), rest, latent["samples"], torch.zeros(4, 4, 8, 8))
    with torch.inference_mode():
        two = comfy.sample.sample(
            model, torch.zeros(4, 4, 8, 8), 8, 1.0, "euler", "normal", CONDITION, CONDITION, latent["samples"],
            disable_noise=True, start_step=3, disable_pbar=True, seed=0,
        )  # fmt: skip
    assert torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize(("skip", "words"), [(4, "must leave a sigma above 0"), (9, "the schedule has 4 steps")])
def test_teleport_refuses_to_skip_everything(folder, skip, words):
    run(MeasureGaussian, **given("eps", samples=4, frequencies=2, rank=0, pictures=pictures(4)))
    given_ = dict(
        model=models.gaussian("eps"), noise=Noise(), latent={"samples": models.latent(4)}, sigmas=sigmas("eps", 4)
    )
    with pytest.raises(ValueError, match=words):
        run(Teleport, **given_, file="mine.safetensors", skip=skip)
    with pytest.raises(ValueError, match="choose a file of Measure Gaussian"):
        run(Teleport, **given_, file="none", skip=1)


def test_a_signal_leak_brings_the_right_brightness(folder):
    """Started from noise alone, an EPS model's samples are too dark by m c / sqrt(c^2 + sigma^2); with the leak they are not."""
    mean, std, size = 3.0, 1.0, 32
    data = {"samples": mean + std * torch.randn(60, 4, size, size, generator=torch.Generator().manual_seed(2))}
    model = models.gaussian("eps", mean=mean, std=std)
    run(MeasureGaussian, **given("eps", model=model, size=size, samples=60, frequencies=3, rank=0, pictures=data))
    empty = {"samples": models.latent(8, size=size)}
    (leak,) = run(SignalLeak, model=model, latent=empty, file="mine.safetensors", strength=1.0, seed=3)
    assert leak["samples"].mean() == pytest.approx(mean, abs=0.1) and leak["samples"].std() == pytest.approx(
        std, abs=0.1
    )
    noise = torch.randn(8, 4, size, size, generator=torch.Generator().manual_seed(4))
    dark, right = (
        made_by(model, sampler(DPMSolverPP()), sigmas("eps", 16), x, noise) for x in (empty["samples"], leak["samples"])
    )
    missing = mean * std / (std**2 + 14.6146**2) ** 0.5  # 0.2
    assert mean - dark.mean() == pytest.approx(missing, abs=0.03)
    assert abs(mean - right.mean()) < 0.03
    (none,) = run(SignalLeak, model=model, latent=empty, file="mine.safetensors", strength=0.0, seed=3)
    assert not none["samples"].any()


def test_schemas(folder):
    ids = [n.GET_SCHEMA().node_id.removeprefix("Quickstep_") for n in calibration_statistics.NODES]
    assert ids == [
        "EstimateStatistics", "FindScoreMean", "ScoreMean", "MeasureEpsilonScaling", "FoundEpsilonScaling", "MeasureGaussian",
        "Teleport", "SignalLeak",
    ]  # fmt: skip
