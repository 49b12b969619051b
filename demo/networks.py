"""The three picture networks of the demo model, built from ComfyUI's own classes.

All work on RGB pixels in ``[-1, 1]`` and read the text encoder of ``text``: a UNet (v-prediction), a smaller UNet of
the same kind for model stitching, and a DiT (SD3's MMDiT, flow matching).
"""

from __future__ import annotations

import torch
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch.nn import functional as F

from .text import TEXT_CONFIG

PATCH = 2  # the UNets see 2 x 2 pixel patches: a quarter of the places, four times the channels, far faster on a CPU

_UNET = {
    "image_size": 16,
    "in_channels": 3 * PATCH**2,
    "out_channels": 3 * PATCH**2,
    "channel_mult": [1, 1, 2],
    "num_res_blocks": [1, 1, 1],
    "transformer_depth": [0, 1, 1],
    "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "context_dim": TEXT_CONFIG["hidden_size"],
    "num_heads": 4,
    "legacy": False,
    "adm_in_channels": None,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
}
CONFIGS = {
    "unet": {**_UNET, "model_channels": 64},
    "unet_small": {**_UNET, "model_channels": 32},
    "dit": {
        "input_size": None,
        "patch_size": 4,
        "in_channels": 3,
        "depth": 2,  # ComfyUI derives the width, 64 per head, from this number
        "num_blocks": 5,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": TEXT_CONFIG["hidden_size"], "out_features": 128},
        },
        "qk_norm": "rms",
    },
}


class PatchUNet(UNetModel):
    """ComfyUI's UNet on pixel patches: ``(n, 3, h, w)`` in and out, ``(n, 12, h/2, w/2)`` inside."""

    def forward(self, x, *args, **kwargs):
        h, w = x.shape[-2:]
        x = F.pad(x, (0, -w % PATCH, 0, -h % PATCH), mode="replicate")
        return F.pixel_shuffle(super().forward(F.pixel_unshuffle(x, PATCH), *args, **kwargs), PATCH)[..., :h, :w]


CLASSES = {"unet": PatchUNet, "unet_small": PatchUNet, "dit": OpenAISignatureMMDITWrapper}


def build(name: str, operations, dtype=torch.float32, device="cpu") -> torch.nn.Module:
    """The network ``name`` of ``CONFIGS`` with uninitialised weights."""
    config = {key: list(value) if isinstance(value, list) else value for key, value in CONFIGS[name].items()}
    return CLASSES[name](**config, operations=operations, dtype=dtype, device=device)
