"""The Compare node: same noise, converged reference, right counts, clear refusals."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from quickstep_under_test.nodes import demo
from quickstep_under_test.nodes.attach import attach
from quickstep_under_test.nodes.bridge import process_of, sampler
from quickstep_under_test.nodes.compare import Candidate, Compare
from quickstep_under_test.solvers.caching.deepcache import DeepCache
from quickstep_under_test.solvers.compare import Row, markdown, rms_per_sample
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP
from quickstep_under_test.solvers.schedules import ExponentialSchedule


@pytest.fixture(scope="module")
def shapes():
    model, clip, vae = demo.load_model("unet_small"), demo.load_clip(), demo.load_vae()

    def prompt(text):
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))

    return model, prompt("a big red circle"), prompt(""), vae


def sigmas(model, steps):
    process = process_of(model)
    return torch.from_numpy(ExponentialSchedule()(process, process.t_max, process.t_min, steps)).float()


def candidate(solver, grid, label="", model=None):
    return Candidate.execute(sampler(solver), grid, label, model).args[0]


def compare(shapes, candidates, reference_steps=16, repeats=1, **more):
    model, positive, negative, vae = shapes
    latent = {"samples": torch.zeros(2, 3, 32, 32)}
    named = {f"candidate{i}": c for i, c in enumerate(candidates)}
    return Compare.execute(
        model, positive, negative, latent, vae, 1, 3.0, reference_steps, repeats, candidates=named, **more
    ).args


def cells(table):
    return {row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]] for row in table.splitlines()[2:]}


@pytest.mark.smoke
def test_table_pictures_and_plot(shapes):
    model = shapes[0]
    third = DPMSolverPP(order=3, third_order="exact", lower_order_final="never")
    pictures, plot, table = compare(
        shapes,
        [
            candidate(third, sigmas(model, 16), "the reference again"),
            candidate(DDIM(), sigmas(model, 4), "ddim"),
            candidate(DDIM(), sigmas(model, 8), "ddim 8"),
            candidate(DDIM(), sigmas(model, 4), "cached", attach(model, DeepCache(interval=2, warmup=0))),
            candidate(DDIM(), sigmas(model, 4), "interval 1", attach(model, DeepCache(interval=1))),
        ],
    )
    rows = cells(table)
    assert list(rows)[:2] == ["reference", "reference, half"]
    assert rows["reference"][0] == "16" and rows["reference"][3] == "-"
    assert rows["the reference again"][3] == "0.0000"
    assert rows["ddim"][0] == "4" and rows["ddim"][1] == "100 %"
    assert float(rows["ddim 8"][3]) < float(rows["ddim"][3])
    assert rows["interval 1"][3:] == rows["ddim"][3:]
    assert int(rows["cached"][1].split()[0]) < 100 and float(rows["cached"][3]) > 0
    assert pictures.ndim == 4 and pictures.shape[-1] == 3 and plot.shape[1:] == (600, 960, 3)
    assert not model.wrappers and not model.attachments  # the user's model is not wrapped


def test_own_reference(shapes):
    grid = sigmas(shapes[0], 8)
    _, _, table = compare(shapes, [candidate(DDIM(), grid)], reference=candidate(DDIM(), grid))
    assert cells(table)["DDIM"][3] == "0.0000"
    assert cells(table)["reference, half"][0] == "4"


def test_refusals(shapes):
    model = shapes[0]
    with pytest.raises(ValueError, match="no candidates"):
        compare(shapes, [])
    with pytest.raises(ValueError, match="must end in 0"):
        candidate(DDIM(), sigmas(model, 8)[:4])
    with pytest.raises(ValueError, match="at least two sigmas"):
        candidate(DDIM(), torch.tensor([1.0]))
    low = candidate(DDIM(), torch.tensor([3.0, 1.0, 0.0]), "late")
    for bad in ([14.6, float("nan"), 0.0], [14.6, 20.0, 0.0]):
        with pytest.raises(ValueError, match="Candidate 'bad': sigmas"):
            compare(shapes, [candidate(DDIM(), torch.tensor(bad), "bad")])
    with pytest.raises(ValueError, match="fewer than 4"):
        compare(shapes, [candidate(DDIM(), sigmas(model, 8))], reference=candidate(DDIM(), sigmas(model, 2)))
    with pytest.raises(ValueError, match="'late' starts at sigma 3, the reference at"):
        compare(shapes, [candidate(DDIM(), sigmas(model, 4)), low])


def test_rms_and_table():
    a = torch.zeros(2, 3, 4)
    assert rms_per_sample(a + torch.tensor([1.0, 2.0])[:, None, None], a) == [1.0, 2.0]
    with pytest.raises(ValueError, match="cannot be compared"):
        rms_per_sample(a, a[:1])
    row = Row("x", 8, 0.5, 1.234, (0.1, 0.2, 0.6))
    assert row.mean == pytest.approx(0.3) and row.median == 0.2 and row.paid == 4.0
    assert "| x | 8 | 50 % | 1.23 | 0.3000 | 0.2000 |" in markdown([row])


def test_latent_with_mask_and_another_sampler(shapes):
    model, positive, negative, vae = shapes
    latent = {"samples": torch.full((1, 3, 32, 32), 0.2), "noise_mask": torch.zeros(1, 32, 32)}
    euler = Candidate.execute(comfy.samplers.sampler_object("euler"), sigmas(model, 3)).args[0]
    assert euler.label == "euler"
    _, _, table = Compare.execute(
        model, positive, negative, latent, vae, 1, 3.0, 4, 1, candidates={"candidate0": euler}
    ).args
    assert cells(table)["euler"][3] == "0.0000"  # all masked: everything stays what it was
