"""ER-SDE against ComfyUI's er_sde. Every solver inside the real ComfyUI is in test_matrix.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
from comfy.k_diffusion import sampling as core
from quickstep_under_test.solvers.er_sde import ERSDE, NoiseScaled

from .test_solvers_comfy import both

SCALERS = {
    "exp_root": None,  # core's default
    "ode": lambda x: x,
    "reverse_sde": lambda x: x**2,
    "power_1.5": lambda x: x**1.5,
}
FLOW = pytest.mark.parametrize("flow", [False, True], ids=["eps", "flow"])


def difference(order, phi, flow, third_order="reference", **options):
    options |= {"max_stage": order, "noise_scaler": SCALERS[phi]} | ({"s_noise": 0.0} if phi == "ode" else {})
    got, expected = both(core.sample_er_sde, ERSDE(order, phi, third_order), flow, **options)
    return (got - expected).abs().max()


@FLOW
@pytest.mark.parametrize("phi", SCALERS)
def test_first_order_is_cores(phi, flow):
    assert difference(1, phi, flow) < 1e-9
    assert difference(1, phi, flow, noise_scale=8.0) < 1e-9


def riemann(self, process, s, t, k, kappa):
    """The moments with core's integrals: left sums over 200 points."""
    rho_s, rho_t = math.exp(-process.lam(s)), math.exp(-process.lam(t))
    rho = rho_t + np.arange(200) * (rho_s - rho_t) / 200
    u = (rho - rho_s) / (rho_t - rho_s)
    ratio = np.array([rho_t / r * math.exp(self.scale(rho_t) - self.scale(r)) for r in rho])
    return [1 - kappa * rho_t / rho_s, 1 - ratio.mean(), 1 - 2 * (ratio * u).mean()][:k]


@FLOW
@pytest.mark.parametrize("phi", SCALERS)
@pytest.mark.parametrize("order", [2, 3])
def test_higher_orders_are_cores_up_to_its_quadrature(order, phi, flow, monkeypatch):
    assert 1e-4 < difference(order, phi, flow) < 3e-3
    monkeypatch.setattr(NoiseScaled, "moments", riemann)
    assert difference(order, phi, flow) < 1e-6  # core's points are float32


@FLOW
def test_the_exact_third_order_is_not_cores(flow):
    assert difference(3, "exp_root", flow, "exact") > 1e-2
