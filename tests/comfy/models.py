"""Small real models for tests: ComfyUI's own classes with random weights, and one whose answer is known exactly.

    unet(), sdxl(), sd3(), flux(), gaussian("flow" | "eps" | "v" | "zsnr")  ->  MODEL
    conditioning(...), latent(...), sample(...)              ->  what KSampler needs and does

Random networks do not know anything about pictures: use them for equalities, not for quality.
"""

from __future__ import annotations

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.samplers
import comfy.supported_models
import torch

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [1, 1, 1],
    "transformer_depth": [1, 1, 0],
    "transformer_depth_output": [1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "context_dim": 64,
    "legacy": False,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
}
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 32,
    "context_in_dim": 32,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 3,
    "axes_dim": [16, 24, 24],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
}
SD3 = {
    "image_model": None,
    "input_size": None,
    "patch_size": 2,
    "in_channels": 16,
    "depth": 2,
    "adm_in_channels": 32,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}},
    "num_patches": 64,
    "pos_embed_max_size": 8,
}


def randomize(network: torch.nn.Module, seed: int = 0) -> None:
    """Weights of a scale at which every layer matters; norms 1; buffers with numbers in them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.ndim >= 2:
                fan_in = p[0].numel()
                p.copy_(torch.randn(p.shape, generator=generator) * 0.7 / fan_in**0.5)
            elif "norm" in name and name.endswith(("weight", "scale")):
                p.fill_(1.0)
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
        for name, b in network.named_buffers():
            if name.endswith("pos_embed"):  # SD3's comes with the checkpoint; until then it is unset memory
                b.copy_(torch.randn(b.shape, generator=generator) * 0.02)


def build(family, config: dict, seed: int = 0, **over):
    """A MODEL of one of ``comfy.supported_models``, as small as ``config`` says; ``over`` wins over the family."""
    made = family({k: list(v) if isinstance(v, list) else v for k, v in config.items()})
    made.unet_config.update(over)
    made.set_inference_dtype(torch.float32, None)
    model = made.get_model({}, "", device="cpu")
    randomize(model.diffusion_model, seed)
    return _patcher(model)


def _patcher(model):
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.CoreModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def unet(seed: int = 0):
    """SD 1.5's topology: attention in the outermost blocks, six input and six output blocks."""
    return build(comfy.supported_models.SD15, UNET, seed, num_heads=4, num_head_channels=-1)


def sdxl(seed: int = 0):
    """SDXL's: no attention outermost, a class embedding. Conditionings need ``pooled=1280``."""
    config = {
        **UNET,
        "transformer_depth": [0, 1, 2],
        "transformer_depth_output": [0, 0, 1, 1, 2, 2],
        "transformer_depth_middle": 2,
        "adm_in_channels": 1280 + 6 * 256,
        "num_classes": "sequential",
    }
    return build(comfy.supported_models.SDXL, config, seed, num_heads=-1, num_head_channels=16)


def sd3(seed: int = 0):
    """A DiT of the SD3 family, 16 latent channels. Conditionings need ``width=32, pooled=32``."""
    config = {k: v for k, v in SD3.items() if k != "image_model"}
    return build(comfy.supported_models.SD3, config, seed)


def flux(seed: int = 0):
    """A DiT of the Flux family, 16 latent channels. Conditionings need ``width=32, pooled=32``."""
    return build(comfy.supported_models.FluxSchnell, FLUX, seed)


class GaussNet(torch.nn.Module):
    """The exact network for data N(mean, std^2), every number independent."""

    def __init__(self, kind, mean=0.5, std=0.5, device=None, operations=None, dtype=None, **unused):
        super().__init__()
        self.dtype = torch.float32
        self.kind, self.mean, self.std = kind, mean, std
        self.gain = torch.nn.Parameter(torch.ones((), device=device), requires_grad=False)

    def forward(self, x, timestep, context=None, control=None, transformer_options=None, **unused):
        sigma = self.sampling.sigma(timestep.float()).view(-1, *[1] * (x.ndim - 1))
        alpha = 1.0 - sigma if self.kind == "flow" else 1.0
        if self.kind != "flow":
            x = x * (1 + sigma**2) ** 0.5  # EPS models see x / sqrt(1 + sigma^2)
        x0 = (self.mean * sigma**2 + alpha * self.std**2 * x) / (alpha**2 * self.std**2 + sigma**2)
        if self.kind in ("v", "zsnr"):
            return self.gain * (x / (1 + sigma**2) - x0) * (1 + sigma**2) ** 0.5 / sigma
        return self.gain * (x - x0) / sigma  # the velocity of a flow model, eps of an EPS model


class _GaussConfig:
    manual_cast_dtype = None
    custom_operations = comfy.ops.manual_cast
    optimizations: dict = {}
    memory_usage_factor = 0.1
    sampling_settings: dict = {}

    def __init__(self, **unet_config):
        self.unet_config = unet_config
        self.latent_format = comfy.latent_formats.LatentFormat()


def gaussian(kind: str = "flow", mean: float = 0.5, std: float = 0.5):
    """A MODEL whose probability-flow ODE is known in closed form: flow, eps, v or zsnr (v with zero terminal SNR).

    All but flow round sigma to one of 1000.
    """
    types = comfy.model_base.ModelType
    model_type = {"flow": types.FLOW, "eps": types.EPS}.get(kind, types.V_PREDICTION)
    config = _GaussConfig(kind=kind, mean=mean, std=std)
    config.sampling_settings = {"zsnr": True} if kind == "zsnr" else {}
    model = comfy.model_base.BaseModel(config, model_type, device=torch.device("cpu"), unet_model=GaussNet)
    object.__setattr__(model.diffusion_model, "sampling", model.model_sampling)
    return _patcher(model)


def conditioning(seed: int = 1, width: int = 64, tokens: int = 8, pooled: int | None = None, **extra):
    """A CONDITIONING with one entry."""
    generator = torch.Generator().manual_seed(seed)
    options = dict(extra)
    if pooled is not None:
        options["pooled_output"] = torch.randn(1, pooled, generator=generator)
    return [[torch.randn(1, tokens, width, generator=generator), options]]


def latent(batch: int = 1, channels: int = 4, size: int = 8) -> torch.Tensor:
    return torch.zeros(batch, channels, size, size)


def sample(
    model,
    sampler: str = "euler",
    steps: int = 8,
    cfg: float = 4.0,
    seed: int = 0,
    positive=None,
    negative=None,
    x=None,
    noise=None,
    mask=None,
    denoise: float | None = None,
) -> torch.Tensor:
    """What KSampler does, on the CPU, without previews."""
    x = latent() if x is None else x
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) if noise is None else noise
    positive = conditioning(1) if positive is None else positive
    negative = conditioning(2) if negative is None else negative
    ks = comfy.samplers.KSampler(model, steps, model.load_device, sampler, "normal", denoise, model.model_options)
    with torch.inference_mode():
        return ks.sample(
            noise, positive, negative, cfg, latent_image=x, denoise_mask=mask, disable_pbar=True, seed=seed
        ).cpu()
