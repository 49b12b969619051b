"""DMN, HSO and kinetic optimal paths: as nodes in a real ComfyUI, on models whose answer is known."""

from __future__ import annotations

import pytest
import torch
from quickstep_under_test.nodes import calibration, calibration_proposals, calibration_run
from quickstep_under_test.nodes.bridge import process_of, sampler
from quickstep_under_test.nodes.calibration_diffusion_time import DiffusionTime
from quickstep_under_test.nodes.calibration_found import FoundSchedule, InspectCalibration
from quickstep_under_test.solvers.artifact import Artifact, load, save
from quickstep_under_test.solvers.calibration import teacher
from quickstep_under_test.solvers.calibration.gaussian import KIND, GaussianStatistics
from quickstep_under_test.solvers.exponential import DDIM

from . import models

NODES = {node.METHOD.id: node for node in calibration_proposals.NODES}
MINE = {"DMN": ["order", "p", "trunc", "gap"], "KineticOptimal": ["levels", "draws"], "HSO": ["p", "spacing"]}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(calibration, "STARTS", {name: calibration.STARTS[name] for name in ("Karras", "Uniform")})
    monkeypatch.setattr(teacher, "MOST", 80)


def run(id: str, kind: str = "flow", steps: int = 5, **settings):
    condition = models.conditioning(1)
    with torch.inference_mode():
        return NODES[id].execute(
            model=models.gaussian(kind, std=0.7), positive=condition, negative=condition,
            latent={"samples": models.latent(3)}, sampler=sampler(DDIM()), cfg=1.0, steps=steps, samples=4, minutes=60.0,
            seed=5, name="mine", **settings,
        ).args  # fmt: skip


@pytest.mark.parametrize("id", list(MINE))
def test_there_is_a_node_with_its_parameters(id):
    ids = [item.id for item in NODES[id].GET_SCHEMA().inputs]
    assert [name for name in ids if name in MINE[id]] == MINE[id] and ids[-1] == "prompts"


@pytest.mark.parametrize("kind", ["flow", "eps"])
@pytest.mark.parametrize("id", list(MINE))
def test_sigmas_are_found_kept_used_and_made_for_other_numbers(folder, id, kind):
    sigmas, _, _, report = run(id, kind)
    model = models.gaussian(kind, std=0.7)
    process = process_of(model)
    assert len(sigmas) == 6 and sigmas[-1] == 0.0 and (sigmas.diff() < 0).all()
    assert float(sigmas[0]) == pytest.approx(process.t_max, rel=1e-6)
    found = load(folder / "mine.json", calibration_run.SCHEDULE)
    then, table = found.found_for, found.table
    assert then.loss_after <= then.loss_before and f"{then.loss_after:.4f} after" in report
    assert table["proposal"]["id"] == id and table["measured"] is not None
    assert torch.equal(FoundSchedule.execute("mine.json", model, 5).args[0], sigmas)
    save(folder / "all.json", Artifact(calibration_run.SCHEDULE, {**table, "share": 1.0}))
    for steps in (2, 9):
        others = FoundSchedule.execute("all.json", model, steps).args[0]
        assert len(others) == steps + 1 and others[-1] == 0.0 and (others.diff() < 0).all()
    assert NODES[id].METHOD.title in InspectCalibration.execute("mine.json").args[1]


def test_bad_requests_are_refused_before_any_call(folder):
    with pytest.raises(ValueError, match="DMN: steps = 61 is more than the 60"):
        run("DMN", steps=61)
    with pytest.raises(ValueError, match=r"spacing = 3.0 must lie between 0.0 and 2.0"):
        run("HSO", spacing=3.0)
    with pytest.raises(ValueError, match=r"levels = 2 must lie between 8 and 200"):
        run("KineticOptimal", levels=2)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("kind", ["flow", "eps"])
def test_a_run_begins_where_noise_is_near_enough(folder, kind):
    """On centred data of std 0.7; with a mean of 2 in all numbers, nothing is near enough at the first sigma of a VE model."""
    model, z = models.gaussian(kind, std=0.7), torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    process = process_of(model)
    given = {"model": model, "latent": {"samples": models.latent(2, size=8)}, "nats": 0.5}
    times = torch.tensor(calibration.STARTS["Karras"](process, process.t_max, process.t_min, 8), dtype=torch.float32)
    for name, x in (("centred", 0.7 * (z - z.mean(0))), ("bright", 2.0 + z)):
        save(folder / f"{name}.safetensors", Artifact(KIND, {}, GaussianStatistics.measured(x, 2).tensors()))
    made, sigma, report = DiffusionTime.execute(**given, sigmas=times, file="centred.safetensors").args
    assert float(made[0]) == pytest.approx(sigma) and sigma < float(times[0]) and "instead of" in report
    assert torch.equal(made[1:], times[times < sigma]) and made.dtype == times.dtype
    assert f"\n{sigma:.4g}: 0.5; 50%" in report
    made, sigma, report = DiffusionTime.execute(**given, sigmas=made, file="centred.safetensors").args
    assert float(made[0]) == pytest.approx(sigma) and "as before" in report
    if kind == "eps":
        made, _, report = DiffusionTime.execute(**given, sigmas=times, file="bright.safetensors").args
        assert torch.equal(made, times) and "no lower sigma is within 0.5 nats" in report
    with pytest.raises(ValueError, match="latents with 4 channels, and this latent has 16"):
        wide = {"samples": torch.ones(1, 16, 8, 8)}
        DiffusionTime.execute(**{**given, "latent": wide}, sigmas=times, file="centred.safetensors")
    with pytest.raises(ValueError, match="choose a file of Measure Gaussian"):
        DiffusionTime.execute(**given, sigmas=times, file="none")
