"""Search DC Ratios and Fit DC Cascade in a real ComfyUI, on models whose answer is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quickstep_under_test.nodes import calibration_dc
from quickstep_under_test.nodes.bridge import process_of, sampler
from quickstep_under_test.nodes.calibration_dc import FitDCCascade, SearchDCRatios
from quickstep_under_test.nodes.samplers import NODES
from quickstep_under_test.solvers.adaptive import DPMSolverAdaptive
from quickstep_under_test.solvers.artifact import load, save
from quickstep_under_test.solvers.dc_solver import KIND, DCSolver
from quickstep_under_test.solvers.exponential import DDIM
from quickstep_under_test.solvers.schedules import KarrasSchedule
from quickstep_under_test.solvers.singlestep import DPMSolverSinglestep
from quickstep_under_test.solvers.unipc import UniPC

from . import models

CONDITION = models.conditioning(1)


def sigmas(model, steps: int = 4) -> torch.Tensor:
    process = process_of(model)
    return torch.tensor(KarrasSchedule()(process, process.t_max, process.t_min, steps).tolist())


def searched(model=None, solver=None, steps=4, **options):
    model = model or models.gaussian("eps", std=0.7)
    given = dict(
        model=model, positive=CONDITION, negative=CONDITION, latent={"samples": models.latent(3)},
        sampler=sampler(solver or UniPC()), sigmas=sigmas(model, steps), cfg=1.0, samples=3, minutes=10.0, seed=5, name="mine",
    )  # fmt: skip
    with torch.inference_mode():
        return SearchDCRatios.execute(**{**given, **options}).args


@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_ratios_are_found_kept_and_used(folder, kind):
    how, curve, drawing, report = searched(models.gaussian(kind, std=0.7))
    assert curve.shape == drawing.shape == (1, 600, 960, 3)
    found = load(folder / "mine.json", KIND)
    then = found.found_for
    assert then.solver == "UniPC" and then.steps == 4 and then.cfg == 1.0 and then.loss_after < then.loss_before
    assert how.solver.ratios_at(1.0, 4) == found.table["ratios"] != [1.0] * 4 and "mine.json" in report
    node = next(n for n in NODES if n.GET_SCHEMA().node_id == "Quickstep_DCSolver")
    same = node.execute(sampler=sampler(UniPC()), calibration="mine.json", ratios="", dc_order=2).args[0].solver
    assert same.ratios_at(1.0, 4) == found.table["ratios"]
    again = searched(models.gaussian(kind, std=0.7), resume="mine.json", name="again")[0].solver
    assert again.ratios_at(1.0, 4)[:2] == [1.0, 1.0]
    other = models.gaussian("eps" if kind == "flow" else "flow")
    with pytest.raises(ValueError, match=r"Search DC Ratios: mine.json is for another model"):
        searched(other, resume="mine.json")
    with pytest.raises(ValueError, match="the file to resume has no ratios for 5 steps"):
        searched(models.gaussian(kind, std=0.7), resume="mine.json", steps=5)


def test_what_is_no_better_is_not_kept(folder):
    how, *_, report = searched(models.gaussian("flow", std=0.0))
    assert (
        list(folder.iterdir()) == [] and isinstance(how.solver, DCSolver) and how.solver.ratios_at(1.0, 4) == [1.0] * 4
    )
    assert report.startswith("No ratios are better than the sampler as it is") and "mine.json" not in report


def test_what_cannot_be_searched_is_refused(folder):
    for solver, words in (
        (DPMSolverSinglestep(), "is no multistep sampler"),
        (DDIM(eta=1.0), "adds noise"),
        (DPMSolverAdaptive(), "chooses its own steps"),
    ):
        with pytest.raises(ValueError, match=words):
            searched(solver=solver)
    with pytest.raises(ValueError, match="must run from"):
        searched(sigmas=sigmas(models.gaussian("eps"))[1:])
    assert list(folder.iterdir()) == []


def test_a_cascade_of_several_searches(folder):
    searched()
    found = load(folder / "mine.json", KIND)
    for steps in (4, 5):
        for cfg in (1.0, 2.0):
            table = {**found.table, "ratios": [*found.table["ratios"], 1.0][:steps]}
            save(
                folder / f"mine_{steps}_{cfg:g}.json",
                replace(found, table=table, found_for=replace(found.found_for, cfg=cfg)),
            )
    file, report = FitDCCascade.execute("mine_", "whole").args
    made = load(folder / file, KIND)
    assert file == "whole.json" and "4 searches" in report and "4 to 5 steps and CFG 1 to 2" in report
    assert len(DCSolver(UniPC(), made).ratios_at(1.5, 5)) == 5
    assert len(FitDCCascade.fingerprint_inputs("mine_", "whole")) == 4
    with pytest.raises(ValueError, match="needs ratios found for at least 2"):
        FitDCCascade.execute("nothing", "more")


def test_schemas(folder):
    ids = [node.GET_SCHEMA().node_id for node in calibration_dc.NODES]
    assert ids == ["Quickstep_SearchDCRatios", "Quickstep_FitDCCascade"]
    assert "steps" not in [given.id for given in SearchDCRatios.GET_SCHEMA().inputs]
