"""What computes a part of a UNet."""

from quickstep_under_test.solvers.caching.deepcache import DeepCache

from . import Variant

VARIANTS = [Variant(DeepCache(interval=3, warmup=1), DeepCache(interval=1), models=("unet", "sdxl"))]
