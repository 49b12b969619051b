"""A sampler written as a table, saved, loaded and run by the USF node is the same sampler."""

from __future__ import annotations

import comfy.sample
import folder_paths
import pytest
import torch
from quickstep_under_test.nodes.bridge import sampler
from quickstep_under_test.nodes.usf import DrawTable, LoadTable, SaveTable, SolverToTable, TableSigmas
from quickstep_under_test.solvers.exponential import DPMSolverPP, SDEDPMSolverPP
from quickstep_under_test.solvers.pndm import PNDM
from quickstep_under_test.solvers.unipc import UniPC
from quickstep_under_test.solvers.usf import USF

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
