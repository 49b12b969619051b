"""Statistics of one sample: over all its dimensions, or over the part that is being edited.

In inpainting the kept part of the latent is overwritten by ComfyUI at every call, so a norm or a variance over all of it
would measure the source picture. ``mask`` is 1 where the sample is edited; None means everywhere. Every result has shape
(batch, 1, 1, ...), stays on the device, and one row never depends on another.
"""

from __future__ import annotations

import torch


def mean(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of each sample, summed in single precision at least: half precision ends at 65504."""
    dims = tuple(range(1, x.ndim))
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if mask is None:
        return wide.mean(dims, keepdim=True).to(x)
    edit = mask.to(wide).expand_as(x)
    return ((wide * edit).sum(dims, keepdim=True) / edit.sum(dims, keepdim=True).clamp_min(1.0)).to(x)


def dot(x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of x y of each sample: the inner product divided by the number of elements."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return mean(x.to(wide) * y, mask).to(x)


def rms(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Root mean square of each sample."""
    return dot(x, x, mask).sqrt()


def variance(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Variance of the elements of each sample."""
    return mean((x - mean(x, mask)).square(), mask)


def quantile(x: torch.Tensor, q: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The q-quantile of the elements of each sample, between two of them by linear interpolation; float32 at least.

    By sorting: ``torch.quantile`` takes no mask and no more than 2^24 elements, fewer than a batch of video latents has.
    """
    rows = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    if mask is None:
        left_out = rows.new_zeros(len(rows), 1)
    else:
        kept = mask.to(x.device).expand_as(x).flatten(1) <= 0.0
        rows = rows.masked_fill(kept, torch.finfo(rows.dtype).min)  # sorted to the front
        left_out = kept.sum(1, keepdim=True).to(rows).clamp_max(rows.shape[1] - 1)
    last = rows.shape[1] - 1
    place = left_out + q * (last - left_out)
    low = place.long()
    ordered = rows.sort(1).values
    below, above = ordered.gather(1, low), ordered.gather(1, (low + 1).clamp_max(last))
    return torch.lerp(below, above, place - low).view(-1, *[1] * (x.ndim - 1))


def edited(new: torch.Tensor, old: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """``new`` where the sample is edited, ``old`` where it is kept."""
    return new if mask is None else torch.lerp(old, new, mask.to(new))
