"""Statistics of one sample: over all its dimensions, or over the part that is being edited.

In inpainting the kept part of the latent is overwritten by ComfyUI at every call, so a norm or a variance over all of it
would measure the source picture. ``mask`` is 1 where the sample is edited; None means everywhere. Every result has shape
(batch, 1, 1, ...), stays on the device, and one row never depends on another.
"""

from __future__ import annotations

import torch


def mean(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of each sample."""
    dims = tuple(range(1, x.ndim))
    if mask is None:
        return x.mean(dims, keepdim=True)
    mask = mask.to(x).expand_as(x)
    return (x * mask).sum(dims, keepdim=True) / mask.sum(dims, keepdim=True).clamp_min(1.0)


def dot(x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of x y of each sample: the inner product divided by the number of elements."""
    return mean(x * y, mask)


def rms(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Root mean square of each sample."""
    return dot(x, x, mask).sqrt()


def variance(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Variance of the elements of each sample."""
    return mean((x - mean(x, mask)).square(), mask)
