"""Noise-prediction multistep methods against ComfyUI's own samplers, on the same float64 problem."""

from __future__ import annotations

import math

import pytest
from comfy.k_diffusion import sampling as core
from quickstep_under_test.solvers import kernel
from quickstep_under_test.solvers.deis import DEIS
from quickstep_under_test.solvers.gradient_estimation import GradientEstimation
from quickstep_under_test.solvers.pndm import IPNDM

from .test_solvers_comfy import both


@pytest.mark.smoke
@pytest.mark.parametrize("flow", [False, True], ids=["eps", "flow"])
@pytest.mark.parametrize(
    ("theirs", "mine", "options"),
    [
        (core.sample_lms, DEIS(points=4, variable="rho"), {"order": 4}),
        (core.sample_lms, IPNDM(points=3, coefficients="exact"), {"order": 3}),
        (core.sample_ipndm, IPNDM(points=4), {"max_order": 4}),
        (core.sample_ipndm, IPNDM(points=2), {"max_order": 2}),
        (core.sample_ipndm_v, IPNDM(points=2, coefficients="exact"), {"max_order": 2}),
        (core.sample_gradient_estimation, GradientEstimation(), {}),
        (core.sample_gradient_estimation, GradientEstimation(gamma=1.3), {"ge_gamma": 1.3}),
    ],
)
def test_parity_with_core(theirs, mine, flow, options):
    got, expected = both(theirs, mine, flow, **options)
    assert (got - expected).abs().max() < 1e-9


@pytest.mark.smoke
@pytest.mark.parametrize("flow", [False, True], ids=["eps", "flow"])
@pytest.mark.parametrize("points", [2, 3, 4])
def test_deis_is_that_of_core_in_cores_time(points, flow, monkeypatch):
    """Core's DEIS takes the VP process whose sigma goes from 0.002 to 80 over [0.001, 1]; weights by a float32 sum."""
    low, high = (math.log1p(sigma**2) for sigma in (0.002, 80.0))
    slope = 2 * (low / 0.001 - high) / (0.001 - 1)
    monkeypatch.setattr(kernel, "_BETA_0", high - slope / 2)
    monkeypatch.setattr(kernel, "_BETA_1", high + slope / 2)
    got, expected = both(core.sample_deis, DEIS(points, "vp"), flow, max_order=points)
    assert (got - expected).abs().max() < 5e-5
    monkeypatch.undo()
    assert (both(core.sample_deis, DEIS(points, "vp"), flow, max_order=points)[0] - expected).abs().max() > 1e-4


@pytest.mark.parametrize("order", [3, 4])
def test_core_ipndm_v_has_wrong_coefficients(order):
    """From three points on, core's iPNDM_v is another method, and a worse one: see IPNDM."""
    got, expected = both(core.sample_ipndm_v, IPNDM(points=order, coefficients="exact"), False, max_order=order)
    assert (got - expected).abs().max() > 1e-3
