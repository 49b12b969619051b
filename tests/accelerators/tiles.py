"""Tiles."""

from quickstep_under_test.solvers.caching.seamless_tiles import SeamlessTiles

from . import Variant

NEUTRAL = SeamlessTiles(tile=64)  # larger than the law's pictures

VARIANTS = [
    Variant(SeamlessTiles(tile=4, max_shift=3), NEUTRAL, ("unet", "sdxl", "sd3", "flux")),
    Variant(SeamlessTiles(tile=4, max_shift=3, fill="wrap"), NEUTRAL, ("unet", "sdxl"), name="wrap"),
    Variant(SeamlessTiles(tile=6, max_shift=3, fill="extra", overlap=2), NEUTRAL, ("unet",), name="extra"),
]
