"""A sampler written as a table, saved, loaded and run by the USF node is the same sampler."""

from __future__ import annotations

from dataclasses import replace

import comfy.sample
import folder_paths
import pytest
import torch
from quickstep_under_test.nodes.bridge import process_of, sampler
from quickstep_under_test.nodes.usf import DrawTable, LoadTable, SaveTable, SolverToTable, TableSigmas
from quickstep_under_test.solvers.artifact import FoundFor, load, save
from quickstep_under_test.solvers.exponential import DPMSolverPP, SDEDPMSolverPP
from quickstep_under_test.solvers.pndm import PNDM
from quickstep_under_test.solvers.unipc import UniPC
from quickstep_under_test.solvers.usf import USF
from quickstep_under_test.solvers.usf_table import KIND

from . import models

SIGMAS = {"eps": [14.0, 6.0, 2.5, 1.0, 0.4, 0.1, 0.0], "flow": [1.0, 0.9, 0.7, 0.45, 0.25, 0.1, 0.0]}


def run(model, solver, sigmas):
    condition = models.conditioning(1)
    noise = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    return comfy.sample.sample_custom(
        model, noise, 1.0, sampler(solver), sigmas, condition, condition, torch.zeros(2, 4, 6, 6), disable_pbar=True, seed=0
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize("solver", [DPMSolverPP(), DPMSolverPP(order=3, frame="vef"), UniPC(order=3)], ids=str)
def test_there_and_back_is_the_same_sampler(folder, kind, solver):
    model = models.gaussian(kind)
    sigmas = torch.tensor(SIGMAS[kind])
    table = SolverToTable.execute(model, sampler(solver), sigmas).args[0]
    file = SaveTable.execute(table, "mine", model).args[0]
    assert SaveTable.execute(table, "mine").args[0] == "mine_2.json"  # nothing is overwritten
    folder_paths.filename_list_cache.clear()
    back = LoadTable.execute(file).args[0]
    assert torch.allclose(TableSigmas.execute(back).args[0], sigmas)
    assert torch.allclose(run(model, USF(back), sigmas), run(model, solver, sigmas), atol=1e-4)
    image, words = DrawTable.execute(back).args
    assert image.ndim == 4 and len(words.splitlines()) == len(sigmas) - 1 and "order 2" in words


def test_a_table_says_whether_it_fits_the_model(folder):
    model, other = models.gaussian("eps"), models.gaussian("flow")
    sigmas = torch.tensor(SIGMAS["eps"])
    file = SaveTable.execute(SolverToTable.execute(model, sampler(DPMSolverPP()), sigmas).args[0], "mine", model).args[
        0
    ]
    table, about = LoadTable.execute(file, model).args
    assert table == LoadTable.execute(file).args[0] and "solver schedule" in about and "other weights" not in about
    with pytest.raises(ValueError, match=r"Load Solver Table: mine\.json is for another model"):
        LoadTable.execute(file, other)
    searched = replace(
        load(folder / file, KIND), found_for=FoundFor(process="ve", model="some other", cfg=3.0, steps=6)
    )
    save(folder / "searched.json", replace(searched, table={**searched.table, "sigma": process_of(model).t_max}))
    assert "found for other weights" in LoadTable.execute("searched.json", model).args[1]
    save(folder / "short.json", searched)  # from sigma 14, where this model begins at 14.6
    with pytest.raises(ValueError, match="begins at sigma 14"):
        LoadTable.execute("short.json", model)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: SolverToTable.execute(model, sampler(PNDM()), torch.tensor([1.0, 0.0])), "PNDM is not a multistep"),
        (lambda model: SolverToTable.execute(model, sampler(SDEDPMSolverPP()), torch.tensor([2.0, 1.0, 0.0])), "cannot be written"),
        (lambda model: TableSigmas.execute(USF().table), "names no sigmas"),
        (lambda model: SaveTable.execute(USF().table, "../x"), "must be a plain file name"),
        (lambda model: SaveTable.execute("{", "x"), "USF table"),
        (lambda model: LoadTable.execute("none"), "choose a file"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_sentence(folder, call, words):
    with pytest.raises(ValueError, match=words):
        call(models.gaussian("eps"))
