"""GITS, BOSS, OptimalSteps, Align Your Steps, Curvature: as nodes in a real ComfyUI, on models whose answer is known."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from quickstep_under_test.nodes import artifacts, calibration, calibration_proposals, calibration_run
from quickstep_under_test.nodes.bridge import process_of, sampler
from quickstep_under_test.nodes.calibration_found import FoundSchedule, InspectCalibration
from quickstep_under_test.solvers.adaptive import DPMSolverAdaptive
from quickstep_under_test.solvers.artifact import Artifact, load, save
from quickstep_under_test.solvers.calibration import teacher
from quickstep_under_test.solvers.calibration.library import PROPOSALS
from quickstep_under_test.solvers.exponential import DDIM

from . import models
from .test_calibration_comfy import selected

CONDITION = models.conditioning(1)
SMALL = {
    "AlignYourStepsOnModel": {"levels": 20, "draws": 1},
    "GITS": {"levels": 20},
    "OptimalSteps": {"levels": 12, "images": 2},
    "BOSS": {"levels": 20},
    "Curvature": {"levels": 20},
}
NODES = {node.METHOD.id: node for node in calibration_proposals.NODES}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(calibration, "STARTS", {name: calibration.STARTS[name] for name in ("Karras", "Uniform")})
    monkeypatch.setattr(teacher, "MOST", 80)


def run(id="GITS", kind="flow", *, model=None, steps=5, solver=None, name="mine", minutes=60.0, **settings):
    given = dict(
        model=model or models.gaussian(kind, std=0.7), positive=CONDITION, negative=CONDITION,
        latent={"samples": models.latent(3)}, sampler=sampler(solver or DDIM()), cfg=1.0, steps=steps, samples=4,
        minutes=minutes, seed=5, name=name,
    )  # fmt: skip
    with torch.inference_mode():
        return NODES[id].execute(**given, **{**SMALL[id], **settings}).args


def test_there_is_a_node_for_each_method():
    assert list(NODES) == [method.id for method in PROPOSALS]
    for node in (NODES[id] for id in SMALL):
        schema = node.GET_SCHEMA()
        ids = [item.id for item in schema.inputs]
        own = [name for name in ids if name in SMALL[node.METHOD.id]]
        assert ids[:5] == ["model", "positive", "negative", "latent", "sampler"] and ids[-1] == "prompts"
        assert len(own) == len(SMALL[node.METHOD.id]) and schema.category == "Quickstep/calibration"
        assert [o.display_name for o in schema.outputs] == ["sigmas", "curve", "schedule", "report"]


@pytest.mark.parametrize("kind", ["flow", "eps"])
@pytest.mark.parametrize("id", list(SMALL))
def test_sigmas_are_found_kept_used_and_made_for_other_numbers(folder, searches, id, kind):
    sigmas, curve, drawing, report = run(id, kind)
    model = models.gaussian(kind, std=0.7)
    process = process_of(model)
    assert len(sigmas) == 6 and sigmas[-1] == 0.0 and (sigmas.diff() < 0).all()
    assert float(sigmas[0]) == pytest.approx(process.t_max, rel=1e-6)
    assert curve.shape == drawing.shape == (1, 600, 960, 3)
    found = load(folder / "mine.json", calibration_run.SCHEDULE)
    then, table = found.found_for, found.table
    assert then.solver == "DDIM" and then.steps == 5 and then.loss_after <= then.loss_before
    assert table["proposal"]["id"] == id and table["proposal"]["levels"] == SMALL[id]["levels"] and table["measured"]
    (search,) = searches
    assert table["select_before"] == pytest.approx(min(selected(search, plan) for plan in search.starts.values()))
    assert (
        table["select_after"] == pytest.approx(selected(search, search.best)) and search.best.times == table["sigmas"]
    )
    assert table["select_after"] <= table["select_before"] and (folder / "mine.json").stat().st_size < 60_000
    assert ("Kept: " in report) == (table["share"] > 0.0) and f"{then.loss_after:.4f} after" in report
    same, about = FoundSchedule.execute("mine.json", model, 5).args
    assert torch.equal(same, sigmas) and "DDIM" in about
    assert torch.equal(FoundSchedule.execute("mine.json").args[0], sigmas)
    fewer, about = FoundSchedule.execute("mine.json", model, 3).args
    assert len(fewer) == 4 and fewer[-1] == 0.0 and (fewer.diff() < 0).all() and "for 3 steps" in about
    image, text = InspectCalibration.execute("mine.json").args
    assert image.shape == (1, 600, 960, 3) and NODES[id].METHOD.title in text


def test_what_helps_is_kept(folder):
    """Exact data: a proposal is better than both usual schedules, on samples that nothing was chosen by."""
    run("Curvature", "eps")
    then = load(folder / "mine.json").found_for
    assert then.loss_after < 0.97 * then.loss_before


def test_numbers_of_steps_it_cannot_give_are_one_sentence(folder):
    run("OptimalSteps", "eps")
    table = load(folder / "mine.json").table
    save(folder / "all.json", Artifact(calibration_run.SCHEDULE, {**table, "share": 1.0}))
    model = models.gaussian("eps", std=0.7)
    with pytest.raises(
        ValueError, match=r"all.json has no sigmas for 9 steps. OptimalSteps was measured for at most 5 steps"
    ):
        FoundSchedule.execute("all.json", model, 9)
    with pytest.raises(ValueError, match="connect the model, to compute sigmas for another number"):
        FoundSchedule.execute("all.json", None, 3)
    save(folder / "searched.json", Artifact(calibration_run.SCHEDULE, {"sigmas": table["sigmas"]}))
    with pytest.raises(
        ValueError, match=r"searched.json has no sigmas for 3 steps. It was found for its own number of steps"
    ):
        FoundSchedule.execute("searched.json", model, 3)
    assert len(FoundSchedule.execute("searched.json", model, 0).args[0]) == 6
    odd = {**table, "sigmas": [table["sigmas"][0], 1.0, 0.0], "share": 1.0}
    for name, proposal in (("strange", {"id": "GITS", "gama": 1.0}), ("empty", {})):
        save(folder / f"{name}.json", Artifact(calibration_run.SCHEDULE, {**odd, "proposal": proposal}))
        assert InspectCalibration.execute(f"{name}.json").args[0].shape == (1, 600, 960, 3)
        with pytest.raises(ValueError, match=rf"{name}.json (is damaged|has no sigmas)"):
            FoundSchedule.execute(f"{name}.json", model, 7)


def test_bad_requests_are_refused_before_any_call(folder):
    with pytest.raises(ValueError, match=r"GITS: steps = 21 is more than the 20"):
        run(steps=21)
    with pytest.raises(ValueError, match=r"GITS: .* chooses its own steps"):
        run(solver=DPMSolverAdaptive())
    with pytest.raises(ValueError, match=r"gamma = 9.0 must lie between"):
        run(gamma=9.0)
    assert list(folder.iterdir()) == [] and artifacts.files(calibration_run.SCHEDULE) == ["none"]


def test_interrupted_while_measuring_it_keeps_the_best_usual_schedule(folder, monkeypatch):
    show, seen = calibration_run.Pursuit._show, []

    def stop(self):
        show(self)
        seen.append(self.search)
        if self.search.stage == "search":
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(calibration_run.Pursuit, "_show", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run("OptimalSteps", "eps")
    comfy.model_management.interrupt_current_processing(False)
    table = load(folder / "mine.json").table
    assert table["share"] == 0.0 and table["measured"] is None and len(table["sigmas"]) == 6
    assert (
        seen[-1].trajectories is None and "proposed nothing better" in InspectCalibration.execute("mine.json").args[1]
    )
    model = models.gaussian("eps", std=0.7)
    usual = calibration.STARTS["Karras"] if table["start"]["id"] == "KarrasSchedule" else calibration.STARTS["Uniform"]
    process = process_of(model)
    made = FoundSchedule.execute("mine.json", model, 9).args[0]
    assert torch.allclose(made, torch.tensor(usual(process, process.t_max, process.t_min, 9), dtype=torch.float32))


@pytest.mark.parametrize("id", ["AlignYourStepsOnModel", "OptimalSteps"])
def test_one_step_and_one_picture_leave_the_usual_schedule(folder, id):
    assert len(run(id, "eps", steps=1)[0]) == 2
    assert "Nothing better" in run(id, model=models.gaussian("flow", std=0.0), name="point")[-1]
