"""Defects of published methods that ComfyUI does not have: the formula as published, restated, and its number."""

from __future__ import annotations

import math

import torch
from _defect import PUBLISHED, defect
from _exact import VE, weak_order


@defect(
    "LML sampler at its default kappa 0", PUBLISHED, "relative change of the noise prediction {exact:.0e} in float64, "
    "{single:.2f} in float32 (SD 1.5's size, lambda 0.001)", "not 0; the same in both", "`LML`, kappa 0.3 by default",
    lambda n: n["exact"] < 1e-6 and n["single"] > 0.05,
)  # fmt: skip
def lml_identity():
    """The correction is parallel to the prediction, whose norm is then restored: in exact arithmetic nothing changes. What
    the released code changes in single precision is rounding error, blown up to the old norm. (Restated from
    zituitui/LML-diffusion-sampler, scheduling_ddim_lm.py.)"""
    noise = torch.randn(4 * 64 * 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def change(dtype) -> float:
        n = noise.to(dtype)
        turned = n - n * (n * n).sum() / (0.001 + (n * n).sum())
        turned = turned * (n * n).sum().sqrt() / (turned * turned).sum().sqrt()
        return ((turned - n).norm() / n.norm()).item()

    return {"exact": change(torch.float64), "single": change(torch.float32)}


@defect(
    "SEEDS-3 in data prediction", PUBLISHED, "the weight is {weight:.2f} at step length 0.01; weak order {order:.2f} "
    "({right:.2f} with the right weight)", "0.01; 2", "`SEEDS`, order 3: weak order 2", lambda n: n["order"] < n["right"] - 0.5,
)  # fmt: skip
def seeds_3_weight():
    """The released code divides the second weight of the third stage by half of what it should and takes it at the
    second node: it tends to -1 for short steps, where it should vanish. (Restated for VE from nfsrules/SEEDS,
    etd_serk.py; their noise is kept.)"""

    def published(h: float) -> float:
        return math.expm1(-2.0 * h / 3.0) / (h / 3.0) + 1.0

    def right(h: float) -> float:
        return math.expm1(-4.0 * h / 3.0) / (4.0 * h / 3.0) + 1.0

    def sampler(weight):
        def sample(model, x, sigmas, extra_args, callback, disable, noise_sampler):
            for s, t in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
                x = seeds_3_step(model, x, s, t, weight, noise_sampler)
            return x

        return sample

    return {
        "weight": published(0.01),
        "order": weak_order(sampler(published), VE),
        "right": weak_order(sampler(right), VE),
    }


def seeds_3_step(model, x, s: float, t: float, weight, noise):
    """One step of SEEDS-3, data prediction, alpha = 1; ``weight(h)`` is phi_{2,3}."""
    h = math.log(s / t)
    u, v = s * math.exp(-h / 3.0), s * math.exp(-2.0 * h / 3.0)

    def spread(a: float) -> float:
        return math.sqrt(-math.expm1(-2.0 * a * h))

    def at(x, sigma):
        return model(x, x.new_full((x.shape[0],), sigma), denoise_mask=None)

    third = math.exp(-h / 3.0)
    n1 = spread(1 / 3) * noise(s, u)
    n2 = third * n1 + spread(1 / 3) * noise(u, v)
    n3 = third * n2 + spread(1 / 3) * noise(v, t)
    d1 = at(x, s)
    d2 = at((u / s) ** 2 * x - math.expm1(-2.0 * h / 3.0) * d1 + u * n1, u)
    d3 = at((v / s) ** 2 * x - math.expm1(-4.0 * h / 3.0) * d1 + 2.0 * weight(h) * (d2 - d1) + v * n2, v)
    phi = math.expm1(-2.0 * h) / (2.0 * h) + 1.0
    return (t / s) ** 2 * x - math.expm1(-2.0 * h) * d1 + 1.5 * phi * (d3 - d1) + t * n3
