"""All accelerators, in the order of the menu, and the recipes that Accelerate tries."""

from __future__ import annotations

from typing import Any

from .accelerator import Accelerator
from .deepcache import DeepCache
from .fora import FORA
from .pab import PAB
from .token_cache import TokenCache

ACCELERATORS: tuple[type[Accelerator], ...] = (DeepCache, FORA, PAB, TokenCache,)

RECIPES: tuple[tuple[float, tuple[tuple[str, dict[str, Any]], ...]], ...] = (
    (0.55, (("DeepCache", {"interval": 2}),)),
    (0.40, (("DeepCache", {"interval": 3}),)),
    (0.30, (("DeepCache", {"interval": 5}),)),
)
"""``(least share of the work it may come to, ((accelerator id, settings), ...))``."""
