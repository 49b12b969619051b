"""Small networks of many DiT families: ComfyUI's own classes with random weights, and what to call each with.

DITS[name]()  ->  Dit: .model is a MODEL, .call(options, ...) one pass through it as the samplers make it
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path

import comfy.supported_models as known
import torch
from comfy.ldm.anima.model import Anima


def _models():
    full = "quickstep_tests_comfy_models"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name("models.py"))
        sys.modules[full] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full])
    return sys.modules[full]


M = _models()
TOKENS = 6


@dataclass
class Dit:
    """shape: of one latent. width: of the text's tokens. more: further conditioning, made for a batch."""

    model: object
    shape: tuple[int, ...] = (16, 8, 8)
    width: int = 32
    more: dict = field(default_factory=dict)

    @property
    def network(self):
        return self.model.model.diffusion_model

    def inputs(self, seed: int = 0, batch: int = 2, sigma: float = 0.6):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, *self.shape, generator=g)
        context = torch.randn(batch, TOKENS, self.width, generator=g)
        return x, torch.full((batch,), sigma), context

    def call(self, x, t, context, options=None, control=None):
        """The denoised prediction. options: extends ``transformer_options``."""
        sides = list(range(len(x)))
        made = {"uuids": sides, "cond_or_uncond": sides, "sample_sigmas": torch.linspace(1, 0, 9), "sigmas": t[:1]}
        more = {k: v[: len(x)].clone() if isinstance(v, torch.Tensor) else v for k, v in self.more.items()}
        control = {k: [None if c is None else c.clone() for c in v] for k, v in control.items()} if control else None
        with torch.inference_mode():
            return self.model.model.apply_model(
                x.clone(), t.clone(), c_crossattn=context.clone(), control=control,
                transformer_options={**made, **(options or {})}, **more,
            )  # fmt: skip


def _flux():
    return Dit(M.flux(), more={"y": torch.ones(4, 32)})


FLUX = {**M.FLUX, "hidden_size": 64, "axes_dim": [8, 12, 12]}


def _flux2():
    over = dict(vec_in_dim=None, txt_ids_dims=[3], axes_dim=[8, 8, 8, 8], patch_size=1, global_modulation=True)
    over.update(mlp_silu_act=True, ops_bias=False, qkv_bias=False, default_ref_method="index", image_model="flux2")
    return Dit(M.build(known.Flux2, FLUX, **over))


def _chroma():
    config = {k: v for k, v in FLUX.items() if k != "guidance_embed"}
    over = dict(in_dim=64, out_dim=64, hidden_dim=32, n_layers=1, image_model="chroma", in_channels=64, out_channels=64)
    return Dit(M.build(known.Chroma, config, **over), more={"guidance": torch.zeros(4)})


def _sd3():
    return Dit(M.sd3(), more={"y": torch.ones(4, 32)})


def _sd35():
    config = {k: v for k, v in M.SD3.items() if k != "image_model"}
    config["context_embedder_config"] = {
        **config["context_embedder_config"],
        "params": {"in_features": 32, "out_features": 192},
    }
    return Dit(
        M.build(known.SD3, config, depth=3, qk_norm="rms", x_block_self_attn_layers=[0, 1]),
        more={"y": torch.ones(4, 32)},
    )


WAN = dict(
    image_model="wan2.1", dim=48, ffn_dim=96, freq_dim=32, text_dim=32, out_dim=16, in_dim=16, num_heads=2, num_layers=4,
    patch_size=(1, 2, 2),
)  # fmt: skip


def _wan():
    return Dit(M.build(known.WAN21_T2V, {**WAN, "model_type": "t2v"}), (16, 2, 8, 8))


def _vace():
    """Wan with a second chain of blocks, whose results are added between the first one's."""
    made = M.build(known.WAN21_Vace, {**WAN, "model_type": "vace", "vace_layers": 2, "vace_in_dim": 8})
    return Dit(made, (16, 2, 8, 8), more={"vace_context": torch.ones(4, 1, 8, 2, 8, 8), "vace_strength": [1.0]})


def _lumina(**over):
    config = dict(
        image_model="lumina2", patch_size=2, in_channels=16, dim=48, cap_feat_dim=32, n_layers=4, qk_norm=True
    )
    config.update(
        n_heads=2, n_kv_heads=1, axes_dims=[8, 8, 8], axes_lens=[64, 64, 64], n_refiner_layers=1, multiple_of=16
    )
    config.update(over)
    return Dit(M.build(known.Lumina2, config), more={"num_tokens": TOKENS})


def _zimage():
    return _lumina(
        dim=256, n_layers=2, n_heads=4, n_kv_heads=4, axes_dims=[32, 16, 16], z_image_modulation=True, time_scale=1000.0,
        pad_tokens_multiple=32, ffn_dim_multiplier=0.5,
    )  # fmt: skip


def _qwen():
    config = dict(image_model="qwen_image", num_layers=4, attention_head_dim=24, num_attention_heads=2, in_channels=64)
    config.update(joint_attention_dim=32, axes_dims_rope=(8, 8, 8))
    return Dit(M.build(known.QwenImage, config), (16, 1, 8, 8))


def _ltxv():
    config = dict(
        image_model="ltxv", num_layers=4, attention_head_dim=24, num_attention_heads=2, cross_attention_dim=48
    )
    config.update(caption_channels=32, in_channels=16)
    return Dit(M.build(known.LTXV, config), (16, 2, 4, 4), more={"attention_mask": None})


def _hunyuan_video():
    config = dict(image_model="hunyuan_video", in_channels=16, out_channels=16, vec_in_dim=32, context_in_dim=32)
    config.update(
        hidden_size=64, mlp_ratio=4.0, num_heads=2, depth=2, depth_single_blocks=3, axes_dim=[8, 12, 12], theta=256
    )
    config.update(
        patch_size=[1, 2, 2], qkv_bias=True, guidance_embed=False, byt5=False, meanflow=False, vision_in_dim=None
    )
    config.update(use_cond_type_embedding=False, meanflow_sum=False)
    return Dit(M.build(known.HunyuanVideo, config), (16, 2, 8, 8), more={"y": torch.ones(4, 32)})


def _aura():
    config = dict(dim=48, n_layers=5, n_double_layers=2, n_heads=2, global_conddim=48, cond_seq_dim=32, max_seq=64)
    return Dit(M.build(known.AuraFlow, config), (4, 8, 8))


def _pixart():
    config = dict(
        image_model="pixart_sigma", hidden_size=48, depth=4, num_heads=2, caption_channels=32, micro_condition=False
    )
    config.update(model_max_length=TOKENS, input_size=48)
    return Dit(M.build(known.PixArtSigma, config), (4, 48, 48))


def _hunyuan_dit():
    config = dict(image_model="hydit", hidden_size=48, depth=6, num_heads=2, mlp_ratio=2.0, text_states_dim=32)
    config.update(text_states_dim_t5=16, text_len=4, text_len_t5=3)
    more = {"text_embedding_mask": torch.ones(4, TOKENS), "encoder_hidden_states_t5": torch.ones(4, 3, 16)}
    more.update(text_embedding_mask_t5=torch.ones(4, 3), image_meta_size=torch.ones(4, 6))
    return Dit(M.build(known.HunyuanDiT, config), (4, 8, 8), more=more)


COSMOS = dict(
    max_img_h=16, max_img_w=16, max_frames=8, in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1,
    model_channels=48, num_blocks=4, num_heads=2, concat_padding_mask=True, pos_emb_cls="rope3d", use_adaln_lora=True,
    adaln_lora_dim=16, crossattn_emb_channels=32, pos_emb_interpolation="crop", extra_per_block_abs_pos_emb=False,
)  # fmt: skip


def _cosmos():
    over = dict(image_model="cosmos", block_config="FA-CA-MLP", block_x_format="THWBD", affline_emb_norm=True)
    over.update(extra_per_block_abs_pos_emb=True, extra_per_block_abs_pos_emb_type="learnable", pos_emb_learnable=False)
    more = {"padding_mask": torch.zeros(4, 1, 8, 8), "fps": torch.full((4,), 24.0)}
    return Dit(M.build(known.CosmosT2V, {**COSMOS, **over}), (16, 2, 8, 8), more=more)


def _predict2():
    config = {**COSMOS, "image_model": "cosmos_predict2", "pos_emb_learnable": True, "min_fps": 1, "max_fps": 30}
    return Dit(M.build(known.CosmosT2IPredict2, config), (16, 1, 8, 8), more={"padding_mask": torch.zeros(4, 1, 8, 8)})


def _anima():
    made = _predict2()
    made.network.__class__ = Anima  # that only prepares the text, with a large network of its own
    return made


DITS = {
    "flux": _flux,
    "flux2": _flux2,
    "chroma": _chroma,
    "sd3": _sd3,
    "sd35": _sd35,
    "wan": _wan,
    "vace": _vace,
    "lumina": _lumina,
    "zimage": _zimage,
    "qwen": _qwen,
    "ltxv": _ltxv,
    "hunyuan_video": _hunyuan_video,
    "aura": _aura,
    "pixart": _pixart,
    "hunyuan_dit": _hunyuan_dit,
    "cosmos": _cosmos,
    "predict2": _predict2,
    "anima": _anima,
}
