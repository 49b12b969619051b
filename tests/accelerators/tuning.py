"""Tuning: Skip-Tuning, PLADIS, Block Skip, AutoDiffusion. None keeps anything between calls."""

from quickstep_under_test.solvers.artifact import Artifact
from quickstep_under_test.solvers.caching.auto_diffusion import KIND as SKIPS
from quickstep_under_test.solvers.caching.auto_diffusion import AutoDiffusion
from quickstep_under_test.solvers.caching.block_skip import KIND, BlockSkip
from quickstep_under_test.solvers.caching.pladis import PLADIS
from quickstep_under_test.solvers.caching.skip_tuning import SkipTuning

from . import Variant


def scores(name, whole):
    """Of one part of the small networks of ``tests/comfy/models.py``."""
    return Artifact(KIND, {"units": [{"name": name, "whole": whole, "work": 0.05, "scores": [0.1, 0.2, 0.3]}]})


def skips(top, scores):
    """Of the first step alone, which begins at ``top`` in runs of any number of steps."""
    units = scores.table["units"]
    return Artifact(SKIPS, {"sigmas": [top, top / 2, 0.0], "left_out": [[units[0]["name"]], []], "units": units})


LAYER = scores("middle_block.1.transformer_blocks.0.ff", False)
BLOCK = scores("single_blocks.1", True)

VARIANTS = [
    Variant(SkipTuning(rho_bottom=0.7), SkipTuning(rho_bottom=1.0), models=("unet", "sdxl")),
    Variant(PLADIS(), PLADIS(lam=0.0), models=("unet", "sdxl")),
    Variant(BlockSkip(LAYER, start_percent=0.0), BlockSkip(LAYER, budget=0.0), models=("unet", "sdxl")),
    Variant(BlockSkip(BLOCK, start_percent=0.0), BlockSkip(BLOCK, budget=0.0), models=("flux",), name="blocks"),
    Variant(AutoDiffusion(skips(14.614642, LAYER)), AutoDiffusion(), models=("unet", "sdxl")),
    Variant(AutoDiffusion(skips(1.0, BLOCK)), AutoDiffusion(), models=("flux",), name="blocks"),
]
