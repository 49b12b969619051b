"""Search Solver and its worker in a real ComfyUI, on models whose answer is known."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import comfy.model_management
import folder_paths
import pytest
import torch
from quickstep_under_test.nodes import calibration, calibration_study_run, live, worker
from quickstep_under_test.nodes.bridge import process_of
from quickstep_under_test.nodes.calibration_found import InspectCalibration
from quickstep_under_test.nodes.calibration_study import SearchSolver
from quickstep_under_test.nodes.usf import LoadTable, TableSigmas
from quickstep_under_test.solvers.artifact import load
from quickstep_under_test.solvers.usf_table import KIND, parse

from . import models

CONDITION = models.conditioning(1)


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch, folder):
    """Two usual schedules; studies in a folder of the test's own."""
    monkeypatch.setattr(calibration, "STARTS", {name: calibration.STARTS[name] for name in ("Karras", "Uniform")})
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    return tmp_path


def searched(model=None, **options):
    given = dict(
        model=model or models.gaussian("flow", std=0.7), positive=CONDITION, negative=CONDITION,
        latent={"samples": models.latent(2)}, cfg=1.0, steps=3, samples=6, minutes=10.0, seed=5, name="mine", trials=20,
    )  # fmt: skip
    with torch.inference_mode():
        return SearchSolver.execute(**{**given, **options}).args


@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_a_solver_is_found_kept_and_used(folder, kind):
    how, sigmas, table, curve, drawing, report = searched(models.gaussian(kind, std=0.7))
    assert curve.shape == drawing.shape == (1, 600, 960, 3)
    assert float(sigmas[0]) == pytest.approx(process_of(models.gaussian(kind)).t_max, rel=1e-6) and sigmas[-1] == 0.0
    found = load(folder / "mine.json", KIND)
    then = found.found_for
    assert (
        then.solver == "USF"
        and then.steps == 3
        and then.cfg == 1.0
        and then.model
        and then.loss_after <= then.loss_before
    )
    assert LoadTable.execute("mine.json").args[0] == table == how.solver.table
    assert torch.equal(TableSigmas.execute(table).args[0], sigmas)
    assert "mine.json" in report and f"{then.loss_after:.4f} after" in report
    assert "solver_schedule" in InspectCalibration.execute("mine.json").args[1]


def test_the_next_run_goes_on_with_the_study(folder, places):
    searched(trials=4, minutes=10.0)
    (database,) = (places / "user" / "quickstep").glob("*.db")
    assert database.name == "mine.db" and len(list(database.parent.glob("teacher-*"))) == 1
    report = searched(trials=8, minutes=10.0, name="again", study="mine")[-1]
    assert re.search(r"Study 'mine' .* [34] ran here", report) and (folder / "again.json").exists()


def test_a_worker_runs_trials_and_writes_no_file(folder):
    searched(trials=2, minutes=10.0)
    (folder / "mine.json").unlink()
    report = searched(trials=5, role="worker", minutes=10.0)[-1]
    assert re.search(r" [23] ran here", report) and list(folder.iterdir()) == []
    with pytest.raises(ValueError, match=r"of another search: its cfg is 1\.0, and here it is 2\.0"):
        searched(role="worker", cfg=2.0)
    with pytest.raises(ValueError, match="The study 'mine' is of another search: its model is "):
        searched(models.unet(), role="worker")


def test_error_against_calls_has_a_file_for_each_number(folder):
    *_, report = searched(search="nsga-ii", fewest=2, trials=12)
    files = sorted(path.name for path in folder.iterdir())
    assert len(files) >= 2 and all(re.fullmatch(r"mine_\d\.json", name) for name in files)
    for name in files:
        steps = len(parse(LoadTable.execute(name).args[0]).steps)
        assert f"\n{name[5]} calls: " in report and steps <= int(name[5])
    with pytest.raises(ValueError, match="fewest = 3 must be below steps = 3"):
        searched(search="nsga-ii")


def test_stopped_by_the_user_it_keeps_the_best(folder, monkeypatch):
    tick = calibration_study_run.Watch.tick

    def stop(self):
        if self.study.ran > 2:
            comfy.model_management.interrupt_current_processing()
        tick(self)

    monkeypatch.setattr(calibration_study_run.Watch, "tick", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        searched()
    comfy.model_management.interrupt_current_processing(False)
    assert load(folder / "mine.json", KIND).found_for.loss_after is None


def test_a_refused_study_leaves_no_file(folder, monkeypatch):
    """Before anything is compared, and when the teacher's pictures are."""
    searched(trials=2)
    (folder / "mine.json").unlink()
    monkeypatch.setattr(live, "SAVE", 0.0)
    monkeypatch.setattr(live, "PREVIEW", 0.0)
    with pytest.raises(ValueError, match="its cfg is"):
        searched(cfg=2.0)
    with pytest.raises(ValueError, match="another model or other prompts"):
        searched(models.gaussian("flow", mean=3.0, std=0.7))
    assert list(folder.iterdir()) == []


def test_time_for_the_report_is_put_aside_until_it_begins(folder):
    report, space = SimpleNamespace(size=8), SimpleNamespace(most=5)
    study = SimpleNamespace(report=report, space=space, teacher={"steps": 40}, calls=400, lead=True)
    watch, left = calibration_study_run.Watch(study, None, 10.0, "mine"), {}
    watch.live.began -= 60.0
    for study.stage in ("search", "times", "report"):
        left[study.stage] = watch.left()
    assert left["search"] == pytest.approx(left["times"], abs=1e-3) == pytest.approx(0.8, abs=1e-3)
    assert left["report"] == pytest.approx(0.9, abs=1e-3)


def test_names_are_plain(folder):
    with pytest.raises(ValueError, match="study = 'a/b' must be a plain name"):
        searched(study="a/b")
    with pytest.raises(ValueError, match="plain file name"):
        searched(name="../outside", study="x")


# Worker


SEARCH = {"class_type": "Quickstep_SearchSolver", "inputs": {"storage": "", "study": "", "role": "lead"}}


def test_a_worker_takes_the_api_format():
    prompt, node = worker._prompt(
        {"1": {"class_type": "X", "inputs": {}}, "7": json.loads(json.dumps(SEARCH))}, "sqlite:///s", "n"
    )
    assert node == "7" and prompt["7"]["inputs"] == {"storage": "sqlite:///s", "study": "n", "role": "worker"}
    for count in (0, 2):
        with pytest.raises(ValueError, match=f"it has {count} Search Solver nodes"):
            worker._prompt({str(i): SEARCH for i in range(count)}, "", "")


def test_a_worker_takes_the_interfaces_format(monkeypatch):
    nodes = type("Nodes", (), {"NODE_CLASS_MAPPINGS": {"Quickstep_SearchSolver": SearchSolver}})
    monkeypatch.setattr(worker.importlib, "import_module", lambda name: nodes)
    values = [4.0, 8, 16, 10.0, 0, "fixed", "mine", "rms", "tpe", 300, 3, 3, True, True, True, True, "", "", "lead"]
    workflow = {
        "nodes": [{"id": 3, "type": "Quickstep_SearchSolver", "widgets_values": values, "inputs": []}],
        "links": [],
    }
    prompt, node = worker._prompt(workflow, "sqlite:///s", "n")
    inputs = prompt[node]["inputs"]
    assert (
        inputs["role"] == "worker" and inputs["trials"] == 300 and inputs["search"] == "tpe" and inputs["times"] is True
    )


def test_a_worker_says_what_is_wrong(tmp_path, capsys):
    file = tmp_path / "w.json"
    asked = ["--storage", "sqlite:///s", "--study", "n", "--workflow", str(file)]
    assert worker.main(asked) == 1 and "No such file" in capsys.readouterr().err
    file.write_text("{}")
    assert worker.main([*asked, "--comfyui", str(tmp_path)]) == 1 and "is no ComfyUI folder" in capsys.readouterr().err
