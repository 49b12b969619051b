"""Networks of real size with random weights: what they compute is noise, what it costs is real.

sd15     Stable Diffusion 1.5's UNet, 860 M weights
sdxl     SDXL's, 2.6 G
sd3      SD3-medium's MMDiT, width 1536, with 8 of its 24 blocks (0.7 G), all of them where a GPU is at hand
"""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch

_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
}
SD15 = {
    **_UNET,
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
}
SDXL = {
    **_UNET,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "context_dim": 2048,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
SD3 = {
    "input_size": None,
    "pos_embed_max_size": 192,
    "num_patches": 192 * 192,
    "patch_size": 2,
    "in_channels": 16,
    "depth": 24,
    "adm_in_channels": 2048,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
}
MODELS = ("sd15", "sdxl", "sd3")
CONTEXT = {"sd15": (77, 768, None), "sdxl": (77, 2048, 1280), "sd3": (154, 4096, 2048)}
"""Tokens and width of a prompt, width of its pooled vector."""


def fill(network: torch.nn.Module, seed: int = 0) -> None:
    """Random weights of a scale that keeps activations finite. A pattern is repeated: drawing billions takes too long."""
    pattern = torch.randn(2**20, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, p in [*network.named_parameters(), *network.named_buffers()]:
            if p.ndim >= 2:
                scale = 0.02 if name.endswith("pos_embed") else 0.7 / p[0].numel() ** 0.5
                flat = p.view(-1)
                for i in range(0, len(flat), len(pattern)):
                    part = flat[i : i + len(pattern)]
                    part.copy_(pattern[: len(part)] * scale)
            else:  # norms scale by 1: at 0, as unset memory often is, every residual would vanish
                p.fill_(0.0 if name.endswith("bias") else 1.0)


def build(name: str, dtype: torch.dtype, channels: int = 320):
    """A MODEL. channels: of the UNets' outermost blocks; less than 320 only tries a program."""
    everything = torch.cuda.is_available()
    config, family, over = {
        "sd15": (
            {**SD15, "model_channels": channels},
            comfy.supported_models.SD15,
            {"num_heads": 8, "num_head_channels": -1},
        ),
        "sdxl": ({**SDXL, "model_channels": channels}, comfy.supported_models.SDXL, {"num_head_channels": 64}),
        "sd3": (SD3, comfy.supported_models.SD3, {"num_blocks": 24 if everything else 8}),
    }[name]
    made = family({key: list(value) if isinstance(value, list) else value for key, value in config.items()})
    made.unet_config.update(over)
    made.set_inference_dtype(dtype, None)
    model = made.get_model({}, "", device="cpu")
    fill(model.diffusion_model)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.CoreModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def prompt(name: str, seed: int):
    """A CONDITIONING."""
    generator = torch.Generator().manual_seed(seed)
    tokens, width, pooled = CONTEXT[name]
    options = {} if pooled is None else {"pooled_output": torch.randn(1, pooled, generator=generator)}
    return [[torch.randn(1, tokens, width, generator=generator), options]]


def describe(model) -> str:
    network = model.model.diffusion_model
    weights = sum(p.numel() for p in network.parameters()) / 1e6
    blocks = f", {len(network.joint_blocks)} blocks" if hasattr(network, "joint_blocks") else ""
    return f"{type(network).__name__}, {weights:.0f} M weights{blocks}"
