"""Reuse of single layers: FORA, PAB, Token Cache."""

from quickstep_under_test.solvers.caching.fora import FORA
from quickstep_under_test.solvers.caching.pab import PAB
from quickstep_under_test.solvers.caching.token_cache import TokenCache

from . import Variant

MODELS = ("unet", "sdxl", "sd3", "flux")

VARIANTS = [
    Variant(FORA(interval=3, warmup=1), FORA(interval=1), models=MODELS),
    Variant(
        FORA(interval=3, order=1, warmup=1, cache_device="cpu"), FORA(interval=1), models=("unet", "sd3"), name="line"
    ),
    Variant(
        PAB(spatial=2, cross=4, mlp=2, warmup=1, start_percent=0.0, end_percent=1.0),
        PAB(spatial=1, cross=1, temporal=1),
        models=MODELS,
    ),
    Variant(TokenCache(interval=3, ratio=0.25, warmup=1), TokenCache(interval=1), models=MODELS),
]
