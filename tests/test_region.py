"""Statistics of one sample."""

from __future__ import annotations

import pytest
import torch
from quickstep_under_test.solvers import region


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_masked_mean_of_many_elements_is_finite_in_half_precision(dtype):
    x = torch.full((2, 16, 2, 64, 64), 3.0, dtype=dtype)  # ComfyUI's --fp16-intermediates; 131072 elements
    mask = torch.ones(2, 16, 2, 64, 64)
    mask[..., :16] = 0.0
    x[..., :16] = 100.0
    assert torch.allclose(region.mean(x, mask).float(), torch.tensor(3.0), rtol=0.02)
    assert torch.allclose(region.rms(x, mask).float(), torch.tensor(3.0), rtol=0.02)


def test_nothing_edited_has_a_mean_of_zero():
    assert (region.mean(torch.ones(1, 4, 8, 8), torch.zeros(1, 1, 8, 8)) == 0.0).all()
