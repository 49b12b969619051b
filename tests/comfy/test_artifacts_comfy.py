"""Calibration files inside ComfyUI: listed by kind, read into the node that uses them, and said when they do not fit."""

from __future__ import annotations

import logging

import comfy.sample
import comfy.samplers
import folder_paths
import pytest
import torch
from quickstep_under_test.nodes import artifacts
from quickstep_under_test.nodes.bridge import sampler, transformed
from quickstep_under_test.nodes.samplers import NODES
from quickstep_under_test.solvers.artifact import Artifact, FoundFor, save
from quickstep_under_test.solvers.calibration import exposure
from quickstep_under_test.solvers.calibration.exposure import FoundEpsilonScaling
from quickstep_under_test.solvers.dc_solver import KIND, DCSolver
from quickstep_under_test.solvers.exponential import DDIM
from quickstep_under_test.solvers.transform import Transformed
from quickstep_under_test.solvers.unipc import UniPC

from . import models

RATIOS = Artifact(KIND, {"ratios": [1.0, 1.0, 1.05, 0.97]}, found_for=FoundFor(process="ve", steps=4, cfg=1.0))


def node(id):
    return next(n for n in NODES if n.GET_SCHEMA().node_id == f"Quickstep_{id}")


def test_files_are_listed_by_kind(folder):
    assert artifacts.files(KIND) == ["none"]
    save(folder / "mine.json", RATIOS)
    save(folder / "other.json", Artifact("something_else", {}))
    (folder / "broken.json").write_text("{")
    folder_paths.filename_list_cache.clear()
    assert artifacts.files(KIND) == ["none", "mine.json"]
    (dropdown,) = (
        item for item in node("DCSolver").GET_SCHEMA().inputs if "mine.json" in (item.as_dict().get("options") or [])
    )
    assert dropdown.id == "calibration"


def test_the_node_uses_the_file(folder):
    save(folder / "mine.json", RATIOS)
    made = (
        node("DCSolver")
        .execute(sampler=sampler(UniPC()), calibration="mine.json", ratios="", dc_order=2)
        .args[0]
        .solver
    )
    assert made.calibration.table == RATIOS.table
    plain = node("DCSolver").execute(sampler=sampler(UniPC()), calibration="none", ratios="", dc_order=2).args[0].solver
    assert plain.calibration is None


@pytest.mark.parametrize("name", ["missing.json", "../outside.json"])
def test_a_missing_file_is_one_sentence(folder, name):
    (folder.parent / "outside.json").write_text("{}")
    with pytest.raises(ValueError, match=r"DC-Solver: there is no file .* in ComfyUI's models/quickstep folder"):
        node("DCSolver").execute(sampler=sampler(UniPC()), calibration=name, ratios="", dc_order=2)


@pytest.mark.parametrize(
    ("kind", "cfg", "words"), [("eps", 1.0, None), ("flow", 1.0, "a flow model"), ("eps", 5.0, "CFG 5")]
)
def test_what_it_was_not_made_for_is_said_once(folder, caplog, kind, cfg, words):
    model = models.gaussian(kind)
    top = 1.0 if kind == "flow" else 10.0
    condition = models.conditioning(1)
    with caplog.at_level(logging.WARNING, logger=artifacts.log.name):
        comfy.sample.sample_custom(
            model, torch.randn(1, 4, 6, 6), cfg, sampler(DCSolver(UniPC(), RATIOS)),
            torch.tensor([1.0, 0.5, 0.2, 0.1, 0.0]) * top, condition, condition, torch.zeros(1, 4, 6, 6),
            disable_pbar=True, seed=0,
        )  # fmt: skip
    said = [record.getMessage() for record in caplog.records if "calibration may not fit" in record.getMessage()]
    assert len(said) == (words is not None) and all(words in sentence for sentence in said)


FACTORS = FoundFor(process="flow", solver="DDIM", steps=3, cfg=1.0)
AROUND = FoundEpsilonScaling(Artifact(exposure.KIND, {"lambda": [-1.0, 1.0], "factor": [1.0, 1.0]}, {}, FACTORS))
EULER = comfy.samplers.sampler_object("euler")


@pytest.mark.parametrize(
    ("around", "steps", "words"),
    [
        (sampler(DDIM()), 3, []),
        (sampler(DDIM()), 4, ["3 steps, and this is 4 steps"]),
        (sampler(UniPC()), 3, ["the sampler DDIM, and this is the sampler UniPC"]),
        (sampler(Transformed(DDIM(), AROUND)), 3, ["the sampler DDIM, and this is the sampler DDIM_"]),
        (sampler(DCSolver(UniPC(), RATIOS)), 4, ["a variance-exploding model", "3 steps, and", "the sampler DDIM"]),
        (EULER, 3, []),
        (EULER, 4, ["3 steps, and this is 4 steps"]),
    ],
)
def test_a_calibration_inside_a_transform_is_checked_too(caplog, around, steps, words):
    """Against the sampler that it is around, if that is one of ours; and that of the sampler itself as before."""
    condition = models.conditioning(1)
    with caplog.at_level(logging.WARNING, logger=artifacts.log.name):
        comfy.sample.sample_custom(
            models.gaussian("flow"), torch.randn(1, 4, 6, 6), 1.0, transformed(around, AROUND),
            torch.linspace(1.0, 0.0, steps + 1), condition, condition, torch.zeros(1, 4, 6, 6), disable_pbar=True, seed=0,
        )  # fmt: skip
    said = [record.getMessage() for record in caplog.records if "calibration may not fit" in record.getMessage()]
    assert len(said) == len(words) and all(any(word in sentence for sentence in said) for word in words)
