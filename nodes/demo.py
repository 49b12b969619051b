"""The demo model as MODEL, CLIP and VAE, through ComfyUI's own classes and without touching its registries."""

from __future__ import annotations

from pathlib import Path

import comfy.clip_model
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import torch
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel, SDTokenizer
from comfy_api.latest import io
from safetensors import SafetensorError, safe_open

from ..demo import networks, world
from ..demo.text import TEXT_CONFIG

FOLDER = Path(__file__).resolve().parent.parent / "demo"
NETWORKS = {
    "unet": "UNet (4.6 M, v-prediction)",
    "unet_small": "small UNet (1.2 M)",
    "dit": "DiT (2.9 M, flow matching)",
}


class _Words:
    """The tokenizer interface ComfyUI expects, over the demo's word list."""

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        return cls()

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [world.START, *world.words_to_ids(text), world.END]}

    def get_vocab(self) -> dict[str, int]:
        return world.VOCABULARY

    def decode(self, ids, **kwargs) -> str:
        return " ".join(world.WORDS[int(i)] for i in ids)


class _Tokenizer(SDTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(
            "",
            max_length=world.MAX_TOKENS,
            pad_with_end=False,
            pad_token=world.PAD,
            embedding_directory=embedding_directory,
            embedding_size=TEXT_CONFIG["hidden_size"],
            embedding_key="shapes",
            tokenizer_class=_Words,
            tokenizer_data=tokenizer_data or {},
        )


class ShapesTokenizer(SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(embedding_directory, tokenizer_data or {}, name="shapes", tokenizer=_Tokenizer)


class _TextModel(comfy.clip_model.CLIPTextModel):
    """ComfyUI's CLIP text model with our vocabulary; the stock class always makes 49408 rows."""

    def __init__(self, config, dtype, device, operations):
        super().__init__(config, dtype, device, operations)
        self.text_model.embeddings = comfy.clip_model.CLIPEmbeddings(
            config["hidden_size"],
            config["vocab_size"],
            world.MAX_TOKENS,
            dtype=dtype,
            device=device,
            operations=operations,
        )


class _TextEncoder(SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device,
            dtype=dtype,
            max_length=world.MAX_TOKENS,
            textmodel_json_config=dict(TEXT_CONFIG),
            special_tokens={"start": world.START, "end": world.END, "pad": world.PAD},
            model_class=_TextModel,
            return_projected_pooled=False,
            model_options=model_options or {},
        )


class ShapesTextEncoder(SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device, dtype=dtype, model_options=model_options or {}, name="shapes", clip_model=_TextEncoder
        )


class Pixels(comfy.latent_formats.LatentFormat):
    """Latents are the RGB pixels themselves, in [-1, 1]."""

    latent_channels = 3
    spacial_downscale_ratio = 1
    latent_rgb_factors = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    latent_rgb_factors_bias = (0.0, 0.0, 0.0)


class DemoConfig(comfy.supported_models_base.BASE):
    """One of ``networks.CONFIGS`` as ComfyUI's model config."""

    unet_extra_config = {}
    latent_format = Pixels
    memory_usage_factor = 0.1
    supported_inference_dtypes = (torch.float32,)
    sampling_settings = {"shift": 1.0, "multiplier": 1000}

    def __init__(self, network: str):
        super().__init__({**networks.CONFIGS[network]})
        self.network = network

    def get_model(self, state_dict, prefix="", device=None):
        types = comfy.model_base.ModelType
        if self.network == "dit":
            return comfy.model_base.SD3(self, model_type=types.FLOW, device=device)
        return comfy.model_base.BaseModel(
            self, model_type=types.V_PREDICTION, device=device, unet_model=networks.PatchUNet
        )


def weights(name: str) -> dict[str, torch.Tensor]:
    """The tensors of ``demo/<name>.safetensors``; one clear sentence if the file is missing, broken or another's."""
    path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"Quickstep's demo weights {path} are missing. Reinstall the pack, or train them with `make train-demo`."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no iterator
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}). Reinstall the pack.") from error
    part = {"text_encoder": "text"}.get(name, name)
    made_for = {"format": "quickstep-demo", "world": world.WORLD_VERSION, "part": part}
    if any(metadata.get(key) != value for key, value in made_for.items()):
        raise ValueError(f"{path} is not this version's weights file of Quickstep's demo {part}. Reinstall the pack.")
    return tensors


def load_model(network: str, disable_dynamic: bool = False):
    """MODEL of one demo network, under ComfyUI's memory management."""
    state = weights(network)
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    config = DemoConfig(network)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(state, device=offload)
    patcher = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    made = patcher(model, load_device=device, offload_device=offload)
    model.load_model_weights({k: v.float() for k, v in state.items()}, "model.diffusion_model.")
    made.cached_patcher_init = (load_model, (network,))  # lets ComfyUI make an independent copy
    return made


def load_clip() -> comfy.sd.CLIP:
    """CLIP: the text encoder that all demo networks share."""
    state = {f"shapes.transformer.{key}": value for key, value in weights("text_encoder").items()}
    target = comfy.supported_models_base.ClipTarget(ShapesTokenizer, ShapesTextEncoder)
    return comfy.sd.CLIP(target, state_dict=state)


def load_vae() -> comfy.sd.VAE:
    """VAE: ComfyUI's pixel-space identity."""
    return comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})


class DemoModel(io.ComfyNode):
    """A small text-to-image model that comes with the pack: coloured shapes, 32 x 32 pixels.

    Made to try and to measure samplers without downloading anything. It understands sentences such as "a big red circle on
    the left on a white background": sizes small, big; colours red, yellow, green, cyan, blue, pink; shapes circle,
    square, triangle, cross, ring; places in the middle, on the left, on the right, at the top, at the bottom;
    backgrounds white, grey, black. Use it in the standard graph with an Empty Latent Image of 32 x 32 and a CFG of about 3.

    The three networks share one text encoder and one pixel space: ``unet`` (ComfyUI's UNet, v-prediction),
    ``unet_small`` (the same at half the width, for stitching), ``dit`` (SD3's MMDiT, flow matching).
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Quickstep_DemoModel",
            display_name="Demo Model (Quickstep)",
            category="Quickstep/demo",
            description="A small text-to-image model of coloured shapes that comes with the pack, to try samplers on.",
            search_aliases=["shapes", "toy model", "test model"],
            inputs=[
                io.Combo.Input(
                    "network",
                    options=list(NETWORKS),
                    default="unet",
                    tooltip="; ".join(f"{key}: {text}" for key, text in NETWORKS.items()) + ".",
                )
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.Vae.Output(display_name="vae"),
            ],
        )

    @classmethod
    def execute(cls, network):
        if network not in NETWORKS:
            raise ValueError(f"network = {network!r} is not one of {', '.join(NETWORKS)}.")
        return io.NodeOutput(load_model(network), load_clip(), load_vae())


NODES = [DemoModel]
