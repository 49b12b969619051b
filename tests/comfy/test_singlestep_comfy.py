"""Single-step and adaptive solvers against ComfyUI's own, on the same float64 problem and noise."""

from __future__ import annotations

import pytest
import torch
from comfy.k_diffusion import sampling as core
from quickstep_under_test.nodes.bridge import sampler
from quickstep_under_test.solvers.adaptive import DPMSolverAdaptive
from quickstep_under_test.solvers.rho_rk import RhoRK
from quickstep_under_test.solvers.seeds import SEEDS
from quickstep_under_test.solvers.singlestep import DPMSolverSinglestep

from .test_solvers_comfy import VE, Denoiser, both

DPM_2 = DPMSolverSinglestep(2, "noise")
EXP_HEUN = DPMSolverSinglestep(2, correction="taylor", r1=1.0)


@pytest.mark.parametrize("flow", [False, True], ids=["eps", "flow"])
@pytest.mark.parametrize(
    ("theirs", "mine", "options"),
    [
        (core.sample_dpm_2, DPM_2, {}),
        (core.sample_heun, RhoRK("2heun"), {}),
        (core.sample_dpmpp_2s_ancestral, DPMSolverSinglestep(2), {"eta": 0.0}),
        (core.sample_exp_heun_2_x0, EXP_HEUN, {}),
        (core.sample_seeds_2, DPMSolverSinglestep(2), {"eta": 0.0}),
        (core.sample_seeds_3, DPMSolverSinglestep(3), {"eta": 0.0}),
        (core.sample_seeds_2, SEEDS(2), {}),
        (core.sample_seeds_2, SEEDS(2, 0.6, "taylor", 0.3), {"eta": 0.6, "solver_type": "phi_2", "r": 0.3}),
        (core.sample_exp_heun_2_x0_sde, SEEDS(2, 1.0, "taylor", 1.0), {}),
        (core.sample_seeds_3, SEEDS(3), {}),
        (core.sample_seeds_3, SEEDS(3, 0.6), {"eta": 0.6}),
    ],
)
def test_parity_with_core(theirs, mine, options, flow):
    got, expected = both(theirs, mine, flow, **options)
    assert (got - expected).abs().max() < 1e-9


def test_noise_scale_of_the_model():
    got, expected = both(core.sample_seeds_3, SEEDS(3), True, noise_scale=8.0)
    assert (got - expected).abs().max() < 1e-9
    assert (both(core.sample_seeds_3, SEEDS(3), True)[0] - got).abs().max() > 1e-3


def test_the_parity_test_can_fail():
    got, expected = both(core.sample_seeds_2, SEEDS(2, correction="taylor"), False)
    assert (got - expected).abs().max() > 1e-4


@pytest.mark.parametrize("mine", [SEEDS(2), SEEDS(3), DPMSolverSinglestep(3)], ids=str)
def test_from_pure_noise_core_differs_by_its_clamp_only(mine, monkeypatch):
    """At sigma = 1 core moves the time to just below and leaves x as it is; ours takes that short step exactly."""
    from . import test_solvers_comfy

    monkeypatch.setattr(test_solvers_comfy, "FLOW", [1.0, *test_solvers_comfy.FLOW[1:]])
    theirs = core.sample_seeds_2 if mine.order == 2 else core.sample_seeds_3
    got, expected = both(theirs, mine, True, **({} if mine.stochastic else {"eta": 0.0}))
    assert (got - expected).abs().max() < 5e-3


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(("rtol", "pid"), [(0.05, (0.0, 1.0, 0.0)), (0.002, (0.2, 0.8, 0.1))])
def test_adaptive_parity_with_core(order, rtol, pid):
    """Core's sees the batch as one sample, ends above zero, and makes its coefficients in the default precision."""
    model = Denoiser(flow=False)
    names = dict(zip(("pcoeff", "icoeff", "dcoeff"), pid, strict=True))
    x = VE[0] * torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        expected, info = core.sample_dpm_adaptive(
            model, x, VE[-2], VE[0], order=order, rtol=rtol, disable=True, return_info=True, **names
        )
    finally:
        torch.set_default_dtype(torch.float32)
    calls = []
    mine = DPMSolverAdaptive(order, rtol, algorithm="noise", controller_type="pid", max_calls=1000, **names)

    class Counting(Denoiser):
        def __call__(self, x, sigma, **unused):
            calls.append(sigma)
            return super().__call__(x, sigma)

    got = sampler(mine).sampler_function(
        Counting(flow=False), x, torch.tensor(VE[:-1], dtype=torch.float64), disable=True
    )
    assert (got - expected).abs().max() < 1e-9
    assert len(calls) == info["nfe"] - info["n_reject"]  # a rejected trial's prediction at its start is used again
