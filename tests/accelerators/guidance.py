"""The level of guidance."""

from quickstep_under_test.solvers.artifact import Artifact
from quickstep_under_test.solvers.caching.adaptive_guidance import AdaptiveGuidance
from quickstep_under_test.solvers.caching.faster_cfg import FasterCFG
from quickstep_under_test.solvers.caching.guidance_cache import GuidanceCache
from quickstep_under_test.solvers.caching.guidance_window import GuidanceWindow
from quickstep_under_test.solvers.caching.linear_ag import KIND, LinearAG
from quickstep_under_test.solvers.caching.linear_ag_fit import fit

from . import Variant

# Of reuse, for any schedule of eight steps: the laws about runs of other lengths find it off.
FITTED = Artifact(KIND, {"times": [], "steps": fit([], 8, interval=3, warmup=1, history=2)})
MODELS = ("unet", "sdxl", "sd3", "flux")

VARIANTS = [
    Variant(GuidanceCache(interval=3, warmup=2, start_percent=0.0), GuidanceCache(interval=1), MODELS),
    Variant(GuidanceCache(interval=2, warmup=1, policy="drop"), GuidanceCache(interval=1), name="drop"),
    Variant(AdaptiveGuidance(threshold=-1.0, start_percent=0.2), AdaptiveGuidance(threshold=1.01)),
    Variant(AdaptiveGuidance(threshold=-1.0, policy="reuse"), AdaptiveGuidance(threshold=1.01), name="reuse"),
    Variant(GuidanceWindow(), GuidanceWindow(start_percent=0.0, end_percent=1.0)),
    Variant(FasterCFG(interval=3, start_percent=0.0), FasterCFG(interval=1)),
    Variant(LinearAG(FITTED), LinearAG()),
]
