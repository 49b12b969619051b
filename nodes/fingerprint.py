"""Which network a MODEL is, so that what was found for one is not used for another unawares."""

from __future__ import annotations

import hashlib

import torch

SAMPLES = 16


def fingerprint(model) -> str:
    """A short name of the network's weights, the same in every session; patches (LoRA) do not change it.

    Made of the names and shapes of all weights, and of a few values of a few of them: a fine-tune is another model, a copy in
    another file is not. Reads less than a kilobyte of weights.
    """
    named = sorted(model.model.diffusion_model.named_parameters())
    digest = hashlib.sha256(repr([(name, tuple(p.shape)) for name, p in named]).encode())
    wide = [(name, p) for name, p in named if p.ndim > 1 and p.is_floating_point()]
    for name, p in wide[:: max(len(wide) // SAMPLES, 1)]:
        # The unpatched weight, where a LoRA is baked into the one in use.
        backup = model.backup.get(f"diffusion_model.{name}")
        value = p if backup is None else backup.weight
        flat = value.detach().flatten()
        few = flat[:: max(flat.numel() // SAMPLES, 1)][:SAMPLES]
        digest.update(few.to(device="cpu", dtype=torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]
