"""Parameters that several solvers share, declared once: ``frame: str = param(**FRAME)``."""

from __future__ import annotations

from typing import Any

from .noise import SOURCES

FRAME: dict[str, Any] = dict(
    default="auto",
    help="Variable in which the past is interpolated on flow models: snr is the true signal-to-noise ratio, vef takes the "
    "sigmas as they are. No difference on other models. auto: what this method is best known with.",
    options=("auto", "snr", "vef"),
    advanced=True,
)
LOWER_ORDER_FINAL: dict[str, Any] = dict(
    default="auto",
    help="Fall back to lower order in the last steps, which steadies short runs. auto: below 15 steps.",
    options=("auto", "always", "never"),
    advanced=True,
)
S_NOISE: dict[str, Any] = dict(
    default=1.0,
    help="Factor on the injected noise; 1 keeps the exact variance.",
    min=0.0,
    max=2.0,
    step=0.01,
    advanced=True,
)
NOISE: dict[str, Any] = dict(
    default="brownian",
    help="brownian: one path per seed, so that more steps converge to the same picture. gaussian: independent noise per step.",
    options=tuple(SOURCES),
    advanced=True,
)
