"""What computes a part of a UNet."""

from quickstep_under_test.solvers.caching.deepcache import DeepCache
from quickstep_under_test.solvers.caching.faster_diffusion import FasterDiffusion
from quickstep_under_test.solvers.caching.feature_inheritance import FeatureInheritance

from . import Variant

EVERY = {"key_steps": "uniform", "interval": 3}

VARIANTS = [
    Variant(DeepCache(interval=3, warmup=1), DeepCache(interval=1), models=("unet", "sdxl")),
    Variant(
        FasterDiffusion(**EVERY),
        FasterDiffusion(key_steps="uniform", interval=1),
        models=("unet", "sdxl"),
        name="one by one",
    ),
    Variant(
        FasterDiffusion(**EVERY, parallel_batch=2, noise_injection=0.003),
        FasterDiffusion(key_steps="uniform", interval=1, parallel_batch=4),
        models=("unet",),
        name="together",
    ),
    *(
        Variant(
            FeatureInheritance(inherit=inherit, mode=mode, warmup=1),
            FeatureInheritance(inherit=inherit, mode=mode, interval=1),
            models=("unet", "sdxl"),
            name=inherit,
        )
        for inherit, mode in (("blocks", "together"), ("layers", "in turn"), ("units", "together"))
    ),
]
