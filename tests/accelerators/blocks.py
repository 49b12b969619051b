"""Caches of transformer blocks."""

from quickstep_under_test.solvers.artifact import Artifact
from quickstep_under_test.solvers.caching.delta_dit import DeltaDiT
from quickstep_under_test.solvers.caching.first_block import DBCache, FirstBlockCache
from quickstep_under_test.solvers.caching.magcache import MagCache
from quickstep_under_test.solvers.caching.profile import KIND
from quickstep_under_test.solvers.caching.taylorseer import TaylorSeer
from quickstep_under_test.solvers.caching.teacache import TeaCache

from . import Variant

DITS = ("sd3", "flux")
ALWAYS = {"threshold": 2.0, "warmup": 1, "max_consecutive": 2}
"""So much may change that a network with random weights never passes it."""

PROFILE = Artifact(
    KIND,
    {
        "network": "OpenAISignatureMMDITWrapper",
        "blocks": 2,
        "polynomial": [1.0, 0.0],
        "span": [0.0, 1.0],
        "at": [-10.0, 5.0],
        "log_size": [0.0, -0.1],
    },
)

VARIANTS = [
    Variant(FirstBlockCache(**ALWAYS), FirstBlockCache(threshold=0.0), models=DITS),
    Variant(DBCache(Fn=1, Bn=0, forecast_order=0, **ALWAYS), DBCache(Fn=1, threshold=0.0), models=DITS),
    Variant(DBCache(Fn=2, Bn=2, **ALWAYS), DBCache(Fn=1, threshold=0.0), models=("flux",), name="both ends"),
    Variant(TeaCache(**{**ALWAYS, "threshold": 5.0}), TeaCache(threshold=0.0), models=DITS),
    Variant(
        MagCache(calibration=PROFILE, threshold=1.0, K=2, start_percent=0.0),
        MagCache(calibration=PROFILE, threshold=0.0, start_percent=0.0),
        models=("sd3",),
    ),
    Variant(TaylorSeer(warmup=1, order=2), TaylorSeer(interval=1), models=DITS),
    Variant(DeltaDiT(warmup=1), DeltaDiT(interval=1), models=DITS),
]
