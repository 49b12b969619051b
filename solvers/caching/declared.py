"""Parameters that accelerators share. Call them in a class body: ``start_percent: float = START()``."""

from __future__ import annotations

from typing import Any

from ..method import param


def START(default: float = 0.0, **more: Any) -> Any:
    return param(default, "Before this fraction of sampling nothing is accelerated.", min=0.0, max=1.0, step=0.01,
                 advanced=True, **more)  # fmt: skip


def END(default: float = 1.0, **more: Any) -> Any:
    return param(default, "After this fraction of sampling nothing is accelerated.", min=0.0, max=1.0, step=0.01,
                 advanced=True, **more)  # fmt: skip


def WARMUP(default: int = 3, **more: Any) -> Any:
    return param(default, "The first calls of a run that are computed in full in any case.", min=0, max=100,
                 advanced=True, **more)  # fmt: skip


def TAIL(default: int = 1, **more: Any) -> Any:
    return param(default, "The last steps of a run that are computed in full in any case; skipping the very last "
                 "leaves noise in the picture.", min=0, max=100, advanced=True, **more)  # fmt: skip


def CACHE_MB(default: int = 0, **more: Any) -> Any:
    return param(default, "The most memory the cache may take, in MB; what does not fit is computed instead. "
                 "0: no limit.", min=0, max=1_000_000, advanced=True, **more)  # fmt: skip


def CACHE_DEVICE(default: str = "main", **more: Any) -> Any:
    return param(default, "Where the cache is kept: beside the model, or in the computer's memory (slower; for large "
                 "videos).", options=("main", "cpu"), advanced=True, **more)  # fmt: skip


def room(max_cache_mb: int) -> int | None:
    """``CACHE_MB``'s value as a store's limit."""
    return max_cache_mb * 2**20 or None


def place(cache_device: str) -> str | None:
    """``CACHE_DEVICE``'s value as a store's device."""
    return None if cache_device == "main" else cache_device
