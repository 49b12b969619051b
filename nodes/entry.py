"""The pack as ComfyUI loads it."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import (
    accelerate,
    accelerators,
    artifacts,
    calibrate_blocks,
    calibrate_linear_ag,
    calibrate_sensitivity,
    calibration,
    calibration_boundary,
    calibration_dc,
    calibration_diffusion_time,
    calibration_ld3,
    calibration_proposals,
    calibration_skips,
    calibration_statistics,
    calibration_study,
    compare,
    demo,
    disa,
    front,
    samplers,
    schedules,
    stitch,
    usf,
)

MODULES = (
    front,
    samplers,
    usf,
    schedules,
    accelerate,
    accelerators,
    calibrate_blocks,
    calibrate_linear_ag,
    calibrate_sensitivity,
    calibration,
    calibration_dc,
    calibration_ld3,
    calibration_proposals,
    calibration_statistics,
    calibration_diffusion_time,
    calibration_study,
    calibration_skips,
    calibration_boundary,
    disa,
    stitch,
    compare,
    demo,
)


class QuickstepExtension(ComfyExtension):
    """The pack, as ComfyUI asks for it."""

    async def on_load(self) -> None:
        artifacts.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [node for module in MODULES for node in module.NODES]
