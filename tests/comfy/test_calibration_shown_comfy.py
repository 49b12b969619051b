"""Files of calibrations in words and as drawings, whatever their kind."""

from __future__ import annotations

import re

import pytest
import torch
from quickstep_under_test.nodes import calibration_shown as shown
from quickstep_under_test.nodes.entry import MODULES
from quickstep_under_test.solvers.artifact import Artifact, FoundFor
from quickstep_under_test.solvers.method import parts

NODES = [node for module in MODULES for node in module.NODES]
TITLES = [node.GET_SCHEMA().display_name.removesuffix(" (Quickstep)") for node in NODES]
LAM = torch.linspace(-3.0, 3.0, 4)
MADE = {
    "model_statistics": Artifact("model_statistics", {}, {"lam": LAM, **{n: torch.rand(4, 2, 1, 1) for n in "lsb"}}),
    "score_mean": Artifact("score_mean", {}, {"lam": LAM, "eta": torch.rand(4, 2, 1, 1)}),
    "exposure": Artifact("exposure", {"lambda": LAM.tolist(), "factor": [1.0, 1.01, 1.02, 1.0]}),
    "gaussian": Artifact("gaussian", {"jump_sigma": [9.0, 3.0, 1.0], "jump_error": [0.0, 0.1, 0.2]}),
}


@pytest.mark.parametrize("kind", shown.WORDS)
def test_every_kind_says_which_node_takes_it(kind):
    text = shown.in_words(Artifact(kind, {}, {}, FoundFor(cfg=4.0)))
    what, use = shown.WORDS[kind]
    assert what in text and kind in text and use in text and "CFG 4" in text
    named = re.match(r"Use (.+?)(?: with this file|; for| and Found|\\.|$)", use)
    for name in re.split(" or | and ", named.group(1)) if named else ["Compare"]:
        assert any(title.startswith(name) for title in TITLES), name


def test_every_file_that_a_node_takes_has_words():
    methods = [node.METHOD for node in NODES if getattr(node, "METHOD", None) is not None]
    taken = {part.kind for method in methods for part in parts(method) if part.kind != "solver"}
    assert taken and taken <= shown.WORDS.keys()


@pytest.mark.parametrize("kind", MADE)
def test_statistics_are_drawn(kind):
    found = MADE[kind]
    drawn = shown.drawing(found)
    other = Artifact(kind, {**found.table, "factor": [1.0, 0.9, 0.9, 1.0], "jump_error": [0.3, 0.1, 0.0]},
                     {name: value.flip(0) if name != "lam" else value for name, value in found.tensors.items()})  # fmt: skip
    assert drawn.tobytes() != shown.drawing(other).tobytes()
    with pytest.raises(ValueError, match="it has no"):
        shown.drawing(Artifact(kind, {}, {}))
