"""All accelerators, in the order of the menu."""

from __future__ import annotations

from .accelerator import Accelerator
from .deepcache import DeepCache

ACCELERATORS: tuple[type[Accelerator], ...] = (DeepCache,)
