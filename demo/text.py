"""The demo model's text encoder in plain torch, for training.

ComfyUI runs the shipped weights in its own ``CLIPTextModel``; that class adds in place and cannot be differentiated,
so training uses this twin with the same parameter names. A test asserts that both give the same embeddings.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .world import ATTRIBUTES, END, MAX_TOKENS, WORDS

TEXT_CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": MAX_TOKENS,
    "eos_token_id": END,
    "vocab_size": len(WORDS),
}


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = (
            layer(x).view(b, n, self.heads, c // self.heads).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out.transpose(1, 2).reshape(b, n, c))


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn, self.mlp = _Attention(width, heads), _Mlp(width, inner)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextEncoder(nn.Module):
    """Token ids ``(n, 16)`` -> embeddings ``(n, 16, 64)``; causal, as CLIP's."""

    def __init__(self):
        super().__init__()
        c = TEXT_CONFIG
        width = c["hidden_size"]
        self.text_model = nn.Module()
        self.text_model.embeddings = nn.Module()
        self.text_model.embeddings.token_embedding = nn.Embedding(c["vocab_size"], width)
        self.text_model.embeddings.position_embedding = nn.Embedding(MAX_TOKENS, width)
        self.text_model.encoder = nn.Module()
        self.text_model.encoder.layers = nn.ModuleList(
            _Layer(width, c["num_attention_heads"], c["intermediate_size"]) for _ in range(c["num_hidden_layers"])
        )
        self.text_model.final_layer_norm = nn.LayerNorm(width)

    def forward(self, ids):
        model = self.text_model
        x = model.embeddings.token_embedding(ids) + model.embeddings.position_embedding.weight
        for layer in model.encoder.layers:
            x = layer(x)
        return model.final_layer_norm(x)


class AttributeReader(nn.Module):
    """What the text encoder is trained on: say from the end token which attributes the sentence named.

    Each attribute has one more class, "not said". With this objective every later token, the padding included, carries
    the whole sentence, and the encoder can be frozen and shared before any picture network is trained.
    """

    def __init__(self):
        super().__init__()
        width = TEXT_CONFIG["hidden_size"]
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(words) + 1) for name, words in ATTRIBUTES.items()})

    def forward(self, end):
        return {name: head(end) for name, head in self.heads.items()}
