"""Parts of a network that take over what they gave before: which of the two ways an accelerator asks for."""

from __future__ import annotations

from collections.abc import Callable

from ...solvers.caching.feature_inheritance import FeatureInheritance
from .modules import modules
from .unet_inheritance import feature_inheritance


def parts(model, settings, key: str, forward_key: str) -> dict[str, Callable]:
    """The wrappers of an accelerator that gives modules another ``forward``."""
    mount = feature_inheritance if isinstance(settings, FeatureInheritance) else modules
    return mount(model, settings, key, forward_key)
