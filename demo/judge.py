"""The judge: a small classifier that reads colour, shape, size, place and background off a picture.

Trained on the pictures of ``world``, never on generated ones. Its agreement with the caption is the demo model's
quality metric, and its 128 features serve for feature distances.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from .world import ATTRIBUTES

WEIGHTS = Path(__file__).parent / "judge.safetensors"


def _conv(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())


class Judge(nn.Module):
    """Pictures ``(n, 3, 32, 32)`` in ``[0, 1]`` -> ``(features (n, 128), {attribute: logits})``."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(
            _conv(3, 24, 1), _conv(24, 32, 2), _conv(32, 48, 1), _conv(48, 64, 2), _conv(64, 64, 1), _conv(64, 64, 2),
            nn.Flatten(), nn.Linear(64 * 16, 128),
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(words)) for name, words in ATTRIBUTES.items()})

    def forward(self, pictures):
        features = self.trunk(pictures * 2 - 1)
        hidden = F.relu(features)
        return features, {name: head(hidden) for name, head in self.heads.items()}


def load_judge(path: Path = WEIGHTS) -> Judge:
    """The shipped judge, in evaluation mode."""
    from safetensors.torch import load_file

    judge = Judge()
    judge.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()}
    )
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def agreement(judge: Judge, pictures: torch.Tensor, attributes: dict[str, torch.Tensor]) -> dict[str, float]:
    """Share of pictures whose attribute the judge reads as asked, per attribute, and ``colour+shape`` for both at once.

    pictures: ``(n, 3, 32, 32)`` in ``[0, 1]``; attributes: ``{name: int64 (n,)}``, any subset of ``world.ATTRIBUTES``.
    """
    _, logits = judge(pictures.clamp(0, 1))
    right = {name: logits[name].argmax(1) == wanted.to(pictures.device) for name, wanted in attributes.items()}
    share = {name: hit.float().mean().item() for name, hit in right.items()}
    if {"colour", "shape"} <= right.keys():
        share["colour+shape"] = (right["colour"] & right["shape"]).float().mean().item()
    return share
