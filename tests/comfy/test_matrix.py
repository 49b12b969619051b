"""Every solver in the real ComfyUI: model kinds x latent shapes x ways to sample. Finite, right shape and dtype, no state.

``PYTEST -s`` prints how many combinations were run.
"""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import pytest
import torch
from quickstep_under_test.nodes.bridge import process_of, sampler

from ..library import variants
from . import models

KINDS = ("eps", "flow", "v", "zsnr")
SHAPES = {"audio": (2, 4, 30), "image": (2, 4, 6, 6), "video": (1, 4, 3, 6, 6)}
FRACTIONS = (1.0, 0.8, 0.5, 0.25, 0.08)


def first_of_each() -> list:
    """One variant per solver, and each stochastic one."""
    found = {}
    for variant in variants():
        found.setdefault((type(variant.solver), variant.solver.stochastic), variant)
    return list(found.values())


def times_of(process) -> list[float]:
    """A short schedule over the model's whole range."""
    if process.alpha(0.5) < 1.0:
        return [process.t_max * f for f in FRACTIONS] + [0.0]
    low = max(process.t_min, 0.05)
    return [low * (process.t_max / low) ** f for f in FRACTIONS] + [0.0]


def ways(times: list[float]) -> dict[str, tuple[list[float], bool, bool]]:
    """name -> (sigmas, with an inpaint mask, starting from an image)."""
    return {
        "plain": (times, False, False),
        "inpaint": (times, True, True),
        "img2img": (times[2:], False, True),
        "first part": (times[:4], False, False),
        "second part": (times[3:], False, True),
        "one step": ([times[0], 0.0], False, False),
        "two steps": ([times[0], times[3], 0.0], False, False),
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", first_of_each(), ids=str)
def test_every_combination(variant, kind, shape):
    model = models.gaussian(kind)
    made = sampler(variant.solver)
    before = dict(vars(variant.solver))
    size = SHAPES[shape]
    noise = torch.randn(size, generator=torch.Generator().manual_seed(0))
    image = torch.randn(size, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, *size[2:])
    mask[..., : size[-1] // 2] = 1.0
    condition = models.conditioning(1)
    for way, (sigmas, masked, from_image) in ways(times_of(process_of(model))).items():
        out = comfy.sample.sample_custom(
            model, noise, 1.0, made, torch.tensor(sigmas), condition, condition,
            image if from_image else torch.zeros(size), noise_mask=mask if masked else None, disable_pbar=True, seed=5,
        )  # fmt: skip
        assert out.shape == size and out.dtype == torch.float32, way
        assert out.isfinite().all(), way
        # Noise prediction with coefficients of equal steps swings far out where sigma falls from 4518 in four steps.
        assert out.abs().max() < max(50.0, 50.0 * sigmas[-1], sigmas[0]), way
        if masked:
            kept = slice(size[-1] // 2, None)
            assert torch.allclose(out[..., kept], image[..., kept], atol=1e-4), way
    assert vars(variant.solver) == before


def test_how_many():
    combinations = len(first_of_each()) * len(KINDS) * len(SHAPES) * len(ways(times_of(process_of(models.gaussian()))))
    print(f"\n{combinations} combinations of solver, model kind, latent shape and way to sample")
    assert combinations > 0
