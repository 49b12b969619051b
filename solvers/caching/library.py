"""All accelerators, in the order of the menu, and the recipes that Accelerate tries."""

from __future__ import annotations

from typing import Any

from .accelerator import Accelerator
from .adaptive_diffusion import AdaptiveDiffusion
from .adaptive_guidance import AdaptiveGuidance
from .at_edm import ATEDM
from .auto_diffusion import AutoDiffusion
from .block_skip import BlockSkip
from .deepcache import DeepCache
from .delta_dit import DeltaDiT
from .easycache import EasyCachePaper
from .faster_cfg import FasterCFG
from .faster_diffusion import FasterDiffusion
from .feature_inheritance import FeatureInheritance
from .first_block import DBCache, FirstBlockCache
from .fora import FORA
from .guidance_cache import GuidanceCache
from .guidance_window import GuidanceWindow
from .linear_ag import LinearAG
from .magcache import MagCache
from .pab import PAB
from .pladis import PLADIS
from .sada import SADA
from .seamless_tiles import SeamlessTiles
from .skip_tuning import SkipTuning
from .step_forecast import StepForecast
from .taylorseer import TaylorSeer
from .teacache import TeaCache
from .token_cache import TokenCache
from .token_merge import ToDo

ACCELERATORS: tuple[type[Accelerator], ...] = (
    StepForecast,
    EasyCachePaper,
    SADA,
    AdaptiveDiffusion,
    DeepCache,
    FasterDiffusion,
    FeatureInheritance,
    FirstBlockCache,
    DBCache,
    TeaCache,
    MagCache,
    TaylorSeer,
    DeltaDiT,
    FORA,
    PAB,
    TokenCache,
    ToDo,
    ATEDM,
    GuidanceCache,
    AdaptiveGuidance,
    LinearAG,
    GuidanceWindow,
    FasterCFG,
    SeamlessTiles,
    SkipTuning,
    PLADIS,
    BlockSkip,
    AutoDiffusion,
)

_FORECAST = {share: ("StepForecast", {"mode": "budget", "share": share}) for share in (0.75, 0.6, 0.5, 0.35)}
_GUIDANCE = ("GuidanceCache", {"interval": 3})

RECIPES: tuple[tuple[tuple[str, dict[str, Any]], ...], ...] = (
    (_FORECAST[0.75],),
    (_FORECAST[0.5],),
    (_FORECAST[0.35],),
    (("DeepCache", {"interval": 2}),),
    (("DeepCache", {"interval": 3}),),
    (("TaylorSeer", {"interval": 2}),),
    (("TaylorSeer", {"interval": 3}),),
    (("TeaCache", {}),),
    (_GUIDANCE,),
    (_FORECAST[0.6], _GUIDANCE),
    (("DeepCache", {"interval": 2}), _GUIDANCE),
    (("TaylorSeer", {"interval": 2}), _GUIDANCE),
)
"""Each ``((accelerator id, settings), ...)``."""
