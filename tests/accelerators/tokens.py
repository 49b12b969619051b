"""Fewer tokens: ToDo and AT-EDM. Both keep nothing between calls."""

from quickstep_under_test.solvers.caching.at_edm import ATEDM
from quickstep_under_test.solvers.caching.token_merge import ToDo

from . import Variant

MODELS = ("unet", "sdxl")

VARIANTS = [
    Variant(ToDo(), ToDo(factor=1), models=MODELS),
    Variant(ToDo(levels=2, keep="similar"), ToDo(factor=1), models=("unet",), name="similar"),
    Variant(ATEDM(), ATEDM(ratio=0.0, early_ratio=0.0), models=MODELS),
]
