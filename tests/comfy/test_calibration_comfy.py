"""Optimize Schedule, Fit Solver, Found Schedule, Inspect Calibration: in a real ComfyUI, on models whose answer is known."""

from __future__ import annotations

from dataclasses import dataclass, replace

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from quickstep_under_test.nodes import artifacts, calibration, calibration_run
from quickstep_under_test.nodes.attach import attach
from quickstep_under_test.nodes.bridge import process_of, sampler, transformed
from quickstep_under_test.nodes.calibration import FitSolver, OptimizeSchedule
from quickstep_under_test.nodes.calibration_found import FoundSchedule, InspectCalibration
from quickstep_under_test.nodes.calibration_ld3 import LD3
from quickstep_under_test.nodes.calibration_samples import samples
from quickstep_under_test.nodes.samplers import NODES
from quickstep_under_test.solvers.adaptive import DPMSolverAdaptive
from quickstep_under_test.solvers.artifact import Artifact, load, save
from quickstep_under_test.solvers.caching.deepcache import DeepCache
from quickstep_under_test.solvers.calibration import decoupled, search
from quickstep_under_test.solvers.calibration.families import fitted_plan
from quickstep_under_test.solvers.calibration.fitted import KIND, FittedSolver
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP

from . import models

CONDITION = models.conditioning(1)
KINDS = ["flow", "eps", "zsnr"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two starts, one of which is improved."""
    monkeypatch.setattr(calibration, "STARTS", {name: calibration.STARTS[name] for name in ("Karras", "Uniform")})
    monkeypatch.setattr(search, "CLIMBS", 1)


def given(kind="flow", *, model=None, batch=3, steps=4, count=4, minutes=60.0, name="mine", cfg=1.0) -> dict:
    return dict(
        model=model or models.gaussian(kind, std=0.7), positive=CONDITION, negative=CONDITION,
        latent={"samples": models.latent(batch)}, cfg=cfg, steps=steps, samples=count, minutes=minutes, seed=5, name=name,
    )  # fmt: skip


def schedule(solver=None, **options):
    extra = {key: options.pop(key) for key in ("loss", "resume", "prompts") if key in options}
    with torch.inference_mode():
        return OptimizeSchedule.execute(**given(**options), sampler=sampler(solver or DDIM()), **extra).args


def fit(**options):
    extra = {key: options.pop(key) for key in ("memory", "resume", "sigmas", "prompts") if key in options}
    with torch.inference_mode():
        return FitSolver.execute(**given(**options), **extra).args


def selected(made: search.Search, plan) -> float:
    """A run's loss on the samples that select, measured anew."""
    running = made.select.errors(plan)
    with torch.inference_mode():
        while True:
            try:
                next(running)
            except StopIteration as end:
                return made.loss(end.value)


def error(kind: str, how, sigmas) -> float:
    """RMS distance to the exact end of the flow: data N(1/2, 0.7^2), noise of another seed."""
    model = models.gaussian(kind, std=0.7)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(77))
    top = float(model.get_model_object("model_sampling").sigma_max)
    start = noise * (1.0 if kind == "flow" else (1.0 + top**2) ** 0.5)
    alpha = 0.0 if kind == "flow" else 1.0
    exact = 0.5 + (start - alpha * 0.5) * 0.7 / (top**2 + alpha * 0.7**2) ** 0.5
    with torch.inference_mode():
        made = comfy.sample.sample_custom(
            model, noise, 1.0, how, sigmas, CONDITION, CONDITION, torch.zeros_like(noise), disable_pbar=True, seed=0
        )
    return float((made - exact).square().mean().sqrt())


def test_schemas(folder):
    ids = [node.GET_SCHEMA().node_id for node in calibration.NODES]
    assert ids == [
        f"Quickstep_{name}" for name in ("OptimizeSchedule", "FitSolver", "FoundSchedule", "InspectCalibration")
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_is_found_kept_and_used(folder, searches, kind):
    sigmas, curve, drawing, report = schedule(kind=kind)
    process = process_of(models.gaussian(kind))
    assert sigmas.dtype == torch.float32 and len(sigmas) == 5 and sigmas[-1] == 0.0
    assert float(sigmas[0]) == pytest.approx(process.t_max, rel=1e-6) and (sigmas.diff() < 0).all()
    assert curve.shape == drawing.shape == (1, 600, 960, 3)
    plain = calibration.starts(process, 4, DDIM()).values()
    usual = min(error(kind, sampler(DDIM()), torch.tensor(plan.times)) for plan in plain)
    assert error(kind, sampler(DDIM()), sigmas) < 0.97 * usual  # on the flow 0.94 is the least possible
    (file,) = folder.iterdir()
    found = load(file, calibration_run.SCHEDULE)
    then = found.found_for
    assert file.name == "mine.json" and then.solver == "DDIM" and then.steps == 4 and then.cfg == 1.0
    assert then.loss_after < then.loss_before and then.model and then.process == ("flow" if kind == "flow" else "ve")
    assert f"{then.loss_after:.4f} after" in report and "mine.json" in report
    (made,) = searches
    before, after = (selected(made, plan) for plan in (made.base, made.best))
    assert found.table["select_before"] == pytest.approx(before) and after < 0.99 * before
    assert found.table["select_after"] == pytest.approx(after)
    again, about = FoundSchedule.execute("mine.json", models.gaussian(kind, std=0.7)).args
    assert torch.equal(again, sigmas) and "DDIM" in about and "4" in about


@pytest.mark.parametrize("kind", KINDS)
def test_a_solver_is_fitted_kept_and_used(folder, kind):
    how, sigmas, *_ = fit(kind=kind)
    process = process_of(models.gaussian(kind))
    plain = calibration.starts(process, 4, FittedSolver()).values()
    usual = min(error(kind, sampler(DPMSolverPP()), torch.tensor(plan.times)) for plan in plain)
    assert error(kind, how, sigmas) < 0.3 * usual
    assert load(folder / "mine.json", KIND).table["weights"] == how.solver.weights
    node = next(n for n in NODES if n.GET_SCHEMA().node_id == "Quickstep_FittedSolver")
    fresh = node.execute(calibration="mine.json", elsewhere="refuse").args[0]
    same, _ = FoundSchedule.execute("mine.json").args
    assert error(kind, fresh, same) == error(kind, how, sigmas)
    with pytest.raises(ValueError, match="connect the sigmas of the same file"):
        error(kind, fresh, torch.cat([same[:1], same[1:-1] * 0.9, same[-1:]]))


def test_weights_alone_keep_the_sigmas(folder):
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    how, same, *_ = fit(sigmas=sigmas, memory=4, steps=99)
    assert torch.allclose(same, sigmas) and max(map(len, how.solver.weights)) == 4
    again = fit(sigmas=sigmas, memory=4, resume="mine.json", minutes=0.05)[1]
    assert torch.equal(again, same)
    other = torch.tensor([1.0, 0.8, 0.6, 0.2, 0.0])
    with pytest.raises(
        ValueError, match=r"Fit Solver: sigma 0.6 was given where the file to resume was fitted for 0.5"
    ):
        fit(sigmas=other, resume="mine.json")
    with pytest.raises(ValueError, match="must run from 1 to 0"):
        fit(sigmas=sigmas[1:])


@pytest.mark.parametrize("run", [schedule, fit])
def test_stopped_by_the_user_it_keeps_the_best_and_goes_on_later(folder, monkeypatch, run):
    show, seen = calibration_run.Pursuit._show, []

    def stop(self):
        show(self)
        seen.append(self)
        if len(self.search.trials) > 2:
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(calibration_run.Pursuit, "_show", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run()
    comfy.model_management.interrupt_current_processing(False)
    monkeypatch.setattr(calibration_run.Pursuit, "_show", show)
    (file,) = folder.iterdir()
    stopped = load(file)
    made = seen[-1].search
    tried = [selected(made, made.starts[label]) for label in {trial.label for trial in made.trials}]
    assert stopped.found_for.loss_before is None and stopped.table["select_before"] == pytest.approx(min(tried))
    assert stopped.table["select_after"] == pytest.approx(selected(made, made.best))
    assert "stopped before" in InspectCalibration.execute("mine.json").args[1]
    assert all(s.search.trajectories is None for s in seen if hasattr(s.search, "trajectories"))
    run(resume="mine.json", minutes=0.2)
    again = load(folder / "mine_2.json")
    assert again.table["select_after"] <= stopped.table["select_after"] * (1 + 1e-6)
    with pytest.raises(ValueError, match="is not for 6 steps"):
        run(resume="mine.json", steps=6)


@pytest.mark.parametrize("tried", [1, 3])
def test_time_ends_it_with_a_report(folder, searches, monkeypatch, tried):
    """After the first start, and after the first step of the search."""

    def left(self):
        return -1.0 if self.search.base is not None and len(self.search.trials) >= tried else 1.0

    monkeypatch.setattr(calibration_run.Pursuit, "left", left)
    sigmas, *_, report = schedule(steps=6, count=16)
    (made,) = searches
    assert len(sigmas) == 7 and "kept aside" in report and len(made.trials) == tried
    assert ("The time was over before the search began" in report) == (tried == 1)


def test_what_was_found_is_saved_before_the_teacher_is_forgotten(folder, monkeypatch):
    def fail(self):
        raise OSError("the file is in use")

    monkeypatch.setattr(search.Search, "release", fail)
    with pytest.raises(OSError, match="in use"):
        schedule(minutes=0.05)
    assert len(load(folder / "mine.json").table["sigmas"]) == 5


@dataclass(frozen=True)
class Diverging(DDIM):
    """Ends nowhere."""

    def step(self, *given):
        made = super().step(*given)
        return replace(made, x=made.x * torch.nan)


def test_where_no_start_is_finite_there_is_a_report_all_the_same(folder):
    *_, report = schedule(Diverging())
    table = load(folder / "mine.json").table
    assert table["select_before"] is table["select_after"] is None and "nan before" in report


@pytest.mark.parametrize("steps", [1, 2])
def test_very_few_steps(folder, steps):
    for made in (schedule(steps=steps, minutes=0.1)[0], fit(steps=steps, minutes=0.1)[1]):
        assert len(made) == steps + 1


def test_a_model_of_one_picture_leaves_everything_as_it_is(folder):
    model = models.gaussian("flow", std=0.0)
    how, _, *_, report = fit(model=model)
    assert "Nothing better" in report and how.solver.weights[0] == [1.0]
    assert "Nothing better" in schedule(model=model, name="other")[-1]


def test_what_cannot_be_calibrated_is_refused(folder):
    for solver, words in ((DDIM(eta=1.0), "adds noise"), (DPMSolverAdaptive(), "chooses its own steps")):
        with pytest.raises(ValueError, match=words):
            schedule(solver)
    tied = fitted_plan([1.0, 0.5, 0.0], [[1.0], [1.5, -0.5]]).solver
    asks = decoupled.DecoupledTimes(Artifact(decoupled.KIND, {"sigmas": [1.0, 0.5, 0.0], "offsets": [0.0, 0.1]}))
    for run in (schedule, ld3):
        with pytest.raises(
            ValueError, match="Fitted solver runs on the sigmas of its file alone, and here they are moved"
        ):
            run(tied)
        with pytest.raises(ValueError, match="Decoupled times runs on the sigmas of its file alone"):
            run(transformed(sampler(DDIM()), asks).solver)
    assert calibration.deterministic(sampler(tied), "Find Start Noise") is tied  # which moves none
    with pytest.raises(ValueError, match="DeepCache is on the model"):
        schedule(model=attach(models.unet(), DeepCache()))
    with pytest.raises(ValueError, match="plain file name"):
        schedule(name="../outside")
    assert list(folder.iterdir()) == []


def test_a_file_for_another_model_is_one_sentence(folder):
    schedule(minutes=0.05)
    with pytest.raises(
        ValueError, match=r"Found Schedule: mine.json is for another model. It was found for a flow model"
    ):
        FoundSchedule.execute("mine.json", models.gaussian("eps"))
    with pytest.raises(ValueError, match="found for a BaseModel, and this is a Flux"):
        FoundSchedule.execute("mine.json", models.flux())
    said = FoundSchedule.execute("mine.json", with_gain(models.gaussian("flow", std=0.7))).args[1]
    assert ("other weights" in said) is False  # one number is no weight matrix: the fingerprint does not see it
    with pytest.raises(ValueError, match="choose a file"):
        FoundSchedule.execute(artifacts.NONE)
    save(folder / "ratios.json", Artifact("dc_ratios", {"ratios": [1.0, 0.9]}))
    with pytest.raises(ValueError, match="dc_ratios, which has no sigmas"):
        FoundSchedule.execute("ratios.json")


@pytest.mark.parametrize("run", ["schedule", "fit", "ld3"])
def test_a_search_of_another_model_is_not_gone_on_from(folder, monkeypatch, run):
    """Said before the network is called."""
    globals()[run](minutes=0.05)
    monkeypatch.setattr(calibration_run.Pursuit, "run", None)
    with pytest.raises(ValueError, match=r": mine.json is for another model. It was found for a flow model"):
        globals()[run](kind="eps", resume="mine.json")


def test_a_fitted_sampler_has_levels_too(folder):
    """Without a file, and adapted: its weights stay in a file of their own."""
    file = fitted_plan([1.0, 0.5, 0.0], [[1.0], [1.5, -0.5]]).solver.calibration
    for number, solver in enumerate((FittedSolver(), FittedSolver(file, elsewhere="adapt"))):
        how, sigmas, *_ = ld3(solver, minutes=0.1, name=f"mine{number}")
        assert len(sigmas) == 5 and how.solver.solver == solver
        assert "weights" not in load(folder / f"mine{number}.json", decoupled.KIND).table
    schedule(FittedSolver(file, elsewhere="adapt"), minutes=0.1)
    assert "weights" not in load(folder / "mine.json", calibration_run.SCHEDULE).table


def with_gain(model):
    with torch.no_grad():
        model.model.diffusion_model.gain.fill_(0.9)
    return model


def test_anything_can_be_inspected(folder):
    fit(minutes=0.05, name="solver")
    schedule(minutes=0.05, name="sigmas")
    save(folder / "ratios.json", Artifact("dc_ratios", {"ratios": [1.0, 0.9]}))
    save(folder / "odd.json", Artifact("odd", {"x": "y"}))
    for name, words in (
        ("solver", "A fitted sampler"),
        ("sigmas", "Sigmas of a schedule"),
        ("ratios", "dc_ratios"),
        ("odd", "odd"),
    ):
        image, text = InspectCalibration.execute(f"{name}.json").args
        assert image.shape == (1, 600, 960, 3) and words in text.splitlines()[0]


def test_samples_are_the_same_at_any_batch_size_and_never_shared():
    seen = {}
    for batch in (1, 4):
        set_ = samples(
            models.gaussian("eps"),
            [CONDITION, models.conditioning(2)],
            CONDITION,
            {"samples": models.latent(batch)},
            1.0,
            3,
        )
        cohorts = set_.split(6)
        assert [len(c.batches) for c in cohorts] == ([6, 6, 3] if batch == 1 else [3, 2, 1])
        seen[batch] = [torch.cat([b(lambda problem, x: x.clone()) for b in c.batches]) for c in cohorts]
    for ones, fours in zip(seen[1], seen[4], strict=True):
        assert torch.equal(ones, fours)
    every = torch.cat(seen[1]).flatten(1)
    assert len(torch.unique(every, dim=0)) == 15


@pytest.mark.parametrize("extra", [{}, {"strength": 1.0}], ids=["side by side", "by prompt"])
def test_every_sample_has_its_own_prompt(extra):
    """The first prediction of each sample is that of a run of this sample alone, with its prompt."""
    model, prompts = models.unet(), [models.conditioning(seed, **extra) for seed in (3, 4, 5)]
    ends = []
    for batch in (1, 4):
        set_ = samples(model, prompts, CONDITION, {"samples": models.latent(batch)}, 4.0, 3)
        fit = set_.split(6)[0]
        with torch.inference_mode():
            made = [b(lambda problem, x: torch.stack([x, problem.denoise(x, 5.0)], 1).cpu()) for b in fit.batches]
        rows = torch.cat(made)
        ends.append(rows[rows[:, 0].flatten(1)[:, 0].argsort()])
    assert torch.equal(ends[0][:, 0], ends[1][:, 0]) and torch.allclose(ends[0], ends[1], atol=1e-4)
    assert len(fit.batches) == 3
    assert [rows[0] for rows, _ in set_.numbered(range(12), 2)] == (
        [0, 2, 4, 6, 8, 10] if not extra else [0, 1, 2, 6, 7, 8]
    )


def test_more_prompts_take_turns(folder):
    sigmas = schedule(model=models.unet(), prompts={"prompt0": models.conditioning(3)}, cfg=4.0, minutes=0.05)[0]
    assert len(sigmas) == 5


def ld3(solver=None, **options):
    extra = {key: options.pop(key) for key in ("loss", "resume") if key in options}
    with torch.inference_mode():
        return LD3.execute(**given(**options), sampler=sampler(solver or DDIM()), **extra).args


def test_where_no_levels_are_better_the_file_has_those_of_the_sigmas(folder):
    """Data of one point: all samplers are exact there."""
    model = models.gaussian("flow", std=0.0)
    how, sigmas, *_, report = ld3(model=model)
    assert load(folder / "mine.json", decoupled.KIND).table["offsets"] == [0.0] * 4
    assert "Nothing better" in report and len(sigmas) == 5 and how.solver.solver == DDIM()


@pytest.mark.parametrize("kind", KINDS)
def test_levels_of_the_network_are_found_kept_and_used(folder, kind):
    how, sigmas, *_, report = ld3(kind=kind, count=6)
    plain = calibration.starts(process_of(models.gaussian(kind)), 4, DDIM()).values()
    usual = min(error(kind, sampler(DDIM()), torch.tensor(plan.times)) for plan in plain)
    assert error(kind, how, sigmas) < 0.6 * usual  # sigmas alone: 0.94 on the flow
    found = load(folder / "mine.json", decoupled.KIND)
    assert found.table["offsets"][0] == 0.0 and any(found.table["offsets"]) and "mine.json" in report
    node = next(n for n in NODES if n.GET_SCHEMA().node_id == "Quickstep_DecoupledTimes")
    fresh = node.execute(sampler=sampler(DDIM()), calibration="mine.json").args[0]
    same, _ = FoundSchedule.execute("mine.json").args
    assert error(kind, fresh, same) == error(kind, how, sigmas)
    core = node.execute(sampler=comfy.samplers.sampler_object("euler"), calibration="mine.json").args[0]
    assert error(kind, core, same) == pytest.approx(error(kind, how, sigmas), rel=1e-3)  # which is DDIM on all models
    with pytest.raises(ValueError, match="connect the sigmas of the same file"):
        error(kind, fresh, torch.cat([same[:1], same[1:-1] * 0.9, same[-1:]]))
    image, text = InspectCalibration.execute("mine.json").args
    assert "Decoupled times" in text and image.shape == (1, 600, 960, 3)
    again = ld3(kind=kind, count=6, resume="mine.json", minutes=0.2)
    assert error(kind, again[0], again[1]) <= error(kind, how, sigmas) * 1.2
