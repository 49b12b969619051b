"""Search AutoDiffusion and its plan inside a real ComfyUI, on small networks with random weights."""

from __future__ import annotations

import logging

import comfy.model_management
import comfy.sample
import pytest
import torch
from quickstep_under_test.nodes import attach, calibration, calibration_run
from quickstep_under_test.nodes.accelerators import NODES
from quickstep_under_test.nodes.bridge import sampler
from quickstep_under_test.nodes.calibration_found import FoundSchedule, InspectCalibration
from quickstep_under_test.nodes.calibration_skips import SearchAutoDiffusion
from quickstep_under_test.nodes.fingerprint import fingerprint
from quickstep_under_test.solvers.artifact import Artifact, FoundFor, load, save
from quickstep_under_test.solvers.caching import block_skip
from quickstep_under_test.solvers.caching.auto_diffusion import KIND, AutoDiffusion, skips_of
from quickstep_under_test.solvers.calibration import levenberg, teacher
from quickstep_under_test.solvers.exponential import DPMSolverPP
from quickstep_under_test.solvers.rho_rk import RhoRK
from quickstep_under_test.solvers.solver import sample

from . import models

MAKERS = {"unet": models.unet, "flux": models.flux}
WIDTH = {"unet": {}, "flux": {"width": 32, "pooled": 32}}
LAYERS = [f"input_blocks.1.1.transformer_blocks.0.{part}" for part in ("attn1", "attn2", "ff")]
BLOCKS = ["double_blocks.1", "single_blocks.0", "single_blocks.1"]
PARTS = {"unet": LAYERS, "flux": BLOCKS}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One start, a short teacher, a step or two of each improvement of sigmas, one thread."""
    monkeypatch.setattr(calibration, "STARTS", {"Karras": calibration.STARTS["Karras"]})
    monkeypatch.setattr(teacher, "STEPS", 6)
    monkeypatch.setattr(teacher, "MOST", 12)
    for constant, value in {"_TRIES": 1, "_STALE": 1, "_ENOUGH": 1.0}.items():
        monkeypatch.setattr(levenberg, constant, value)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def scored(folder):
    """Files of scores, ``unet.json`` and ``flux.json``."""
    for name, parts in PARTS.items():
        rows = [{"name": p, "whole": name == "flux", "work": 0.1, "scores": [0.1, 0.2, 0.3]} for p in parts]
        save(folder / f"{name}.json", Artifact(block_skip.KIND, {"units": rows}))
    return folder


def latent(name: str, batch: int = 2) -> torch.Tensor:
    return models.latent(batch, 16 if name == "flux" else 4)


def searched(network: str, model=None, solver=None, **options):
    given = dict(
        model=model or MAKERS[network](), positive=models.conditioning(1, **WIDTH[network]),
        negative=models.conditioning(2, **WIDTH[network]), latent={"samples": latent(network)},
        sampler=sampler(solver or DPMSolverPP()), scores=f"{network}.json", cfg=2.0, steps=3, samples=2, minutes=10.0, seed=5,
        name="mine", budget=0.8, trials=6,
    )  # fmt: skip
    with torch.inference_mode():
        return SearchAutoDiffusion.execute(**{**given, **options}).args


def made(name: str, model) -> Artifact:
    """A plan for two steps."""
    units = [{"name": p, "whole": name == "flux", "work": 0.1, "scores": [0.1]} for p in PARTS[name]]
    table = {"sigmas": [3.0, 2.0, 0.0], "left_out": [PARTS[name][:2], PARTS[name][2:]], "units": units}
    return Artifact(KIND, table, found_for=FoundFor(model=fingerprint(model)))


def picture(model, name: str, sigmas: torch.Tensor) -> torch.Tensor:
    positive, negative = (models.conditioning(i, **WIDTH[name]) for i in (1, 2))
    noise = torch.cat([comfy.sample.prepare_noise(latent(name, 1), 5 + r) for r in range(2)])
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model, noise, 2.0, sampler(DPMSolverPP()), sigmas, positive, negative, latent(name), disable_pbar=True, seed=5
        )  # fmt: skip


def attributes(model) -> dict:
    return {module: set(vars(module)) for module in model.model.diffusion_model.modules()}


@pytest.mark.parametrize("name", ["unet", "flux"])
def test_a_plan_is_found_kept_and_used(scored, name, monkeypatch):
    runs = []

    def kept(pursuit, run=calibration_run.Pursuit.run):
        """The best run's end on the first samples of the fit, by the search's own means, when it is over."""
        run(pursuit)
        best = pursuit.search.best
        visit = lambda problem, x: sample(problem, best.solver, x, best.times)  # noqa: E731
        runs.append(torch.cat([batch(visit) for batch in pursuit.search.fit.batches])[:2])

    monkeypatch.setattr(calibration_run.Pursuit, "run", kept)
    model = MAKERS[name]()
    plainly, before = picture(model, name, torch.tensor([1.0, 0.5, 0.0])), attributes(model)
    on, sigmas, curve, drawing, left, report = searched(name, model)
    assert curve.shape == drawing.shape == (1, 600, 960, 3) and left.ndim == 4 and left.shape[-1] == 3
    found = load(scored / "mine.json", KIND)
    skips, then = skips_of(found), found.found_for
    assert skips.kept <= 0.8 + 1e-9 and [u.name for u in skips.units] == PARTS[name] and len(sigmas) == 4
    assert (
        then.solver == "DPMSolverPP"
        and then.steps == 3
        and then.cfg == 2.0
        and then.model
        and then.loss_after is not None
    )
    assert (
        torch.equal(sigmas, torch.tensor(skips.sigmas)) and "mine.json" in report and "2 whole steps, Karras" in report
    )
    # The network is as it was, and the plan is what the search ran.
    assert attributes(model) == before and torch.equal(picture(model, name, torch.tensor([1.0, 0.5, 0.0])), plainly)
    end = picture(on, name, sigmas)
    whole, own = picture(model, name, sigmas), model.model.process_latent_out(runs[0]).cpu()
    assert (end - own).abs().max() < 0.01 * (end - whole).abs().max()
    assert attach.ledger_of(on).runs[-1].work == pytest.approx(skips.kept)
    # In a fresh graph, from the files alone.
    node = next(n for n in NODES if n.GET_SCHEMA().node_id == "Quickstep_AutoDiffusion")
    again, about = FoundSchedule.execute("mine.json", model).args
    fresh = node.execute(model=MAKERS[name](), calibration="mine.json").args[0]
    assert torch.equal(picture(fresh, name, again), end) and "parts of the network" in about
    assert FoundSchedule.GET_SCHEMA().inputs[0].options.count("mine.json") == 1
    assert InspectCalibration.execute("mine.json").args[0].shape == left.shape


def test_a_search_goes_on_from_its_file_and_within_another_budget(scored):
    searched("flux", trials=2)
    report = searched("flux", budget=0.9, trials=2, resume="mine.json", name="again")[-1]
    assert skips_of(load(scored / "again.json", KIND)).kept <= 0.9 + 1e-9 and "again.json" in report
    with pytest.raises(ValueError, match="the file to resume is for 3 steps, and steps = 4"):
        searched("flux", resume="mine.json", steps=4)


def test_a_budget_of_1_leaves_nothing_out(scored):
    model = MAKERS["flux"]()
    on, sigmas, *_ = searched("flux", model, budget=1.0)
    assert torch.equal(picture(on, "flux", sigmas), picture(model, "flux", sigmas))


def test_stopped_by_the_user_the_network_is_whole_and_the_best_is_kept(scored):
    model, calls = MAKERS["flux"](), []
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    plainly, before = picture(model, "flux", sigmas), attributes(model)
    parts, left = [model.model.diffusion_model.get_submodule(name) for name in BLOCKS], []

    def stop(*_):
        calls.append(None)
        left.append(any("forward" in vars(part) for part in parts))
        if len(calls) > 150 and left[-1]:
            comfy.model_management.interrupt_current_processing()
            raise comfy.model_management.InterruptProcessingException

    handle = model.model.diffusion_model.register_forward_pre_hook(stop)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            searched("flux", model, trials=100_000)
    finally:
        handle.remove()
        comfy.model_management.interrupt_current_processing(False)
    assert left[-1] and attributes(model) == before and torch.equal(picture(model, "flux", sigmas), plainly)
    assert skips_of(load(scored / "mine.json", KIND)).kept <= 0.8 + 1e-9


def test_other_sigmas_are_computed_whole_and_that_is_said(scored):
    model = MAKERS["unet"]()
    on = attach.attach(model, AutoDiffusion(made("unet", model)))
    other = torch.tensor([5.0, 1.0, 0.0])
    assert torch.equal(picture(on, "unet", other), picture(model, "unet", other))
    assert "calls at other sigmas than those of its file" in attach.ledger_of(on).runs[-1].line()
    picture(on, "unet", torch.tensor([3.0, 2.0, 0.0]))
    assert attach.ledger_of(on).runs[-1].work == pytest.approx(1.0 - (0.2 + 0.1) / 2)  # each step its own
    assert "other sigmas" not in attach.ledger_of(on).runs[-1].line()


def test_what_cannot_be_searched_is_refused_before_any_call(scored, caplog):
    refused = [
        ({"scores": "none"}, "choose scores"),
        ({"scores": "flux.json"}, "has no part 'double_blocks.1'; the scores were made for another model"),
        ({"budget": 0.5}, r"budget = 0.5 cannot be met: all 3 parts .* come to 30\.0%"),
        ({"budget": 0.85, "parts": 1}, "all 1 parts"),
        ({"solver": RhoRK()}, "calls the network more than once in a step"),
        ({"model": attach.attach(models.unet(), AutoDiffusion())}, "found plan is on the model; take it off"),
        ({"scores": "wrong.json"}, "there is no file 'wrong.json'"),
        ({"resume": "flow.json"}, "flow.json is for another model. It was found for a flow model"),
    ]
    flow = Artifact(KIND, {"sigmas": [1.0, 0.5, 0.0]}, found_for=FoundFor(process="flow"))
    save(scored / "flow.json", flow)
    for options, words in refused:
        with pytest.raises(ValueError, match=words):
            searched("unet", **options)
    assert not (scored / "mine.json").exists()


def test_files_of_another_model_are_refused_or_reported(scored, caplog):
    found = made("flux", models.flux())
    with pytest.raises(
        ValueError, match=r"has no part 'double_blocks.1'; the sets of parts were made for another model"
    ):
        attach.attach(models.unet(), AutoDiffusion(found))
    with caplog.at_level(logging.WARNING):
        attach.attach(models.flux(seed=1), AutoDiffusion(found))
    assert "the sets of parts may not fit" in caplog.text
    with pytest.raises(ValueError, match=f"the file holds {KIND}, but {block_skip.KIND} is needed"):
        block_skip.BlockSkip(found)
