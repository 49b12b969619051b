"""Consistency sampling against ComfyUI's lcm, churn against its euler and heun."""

from __future__ import annotations

import pytest
import torch
from comfy.k_diffusion import sampling as core
from quickstep_under_test.nodes.bridge import sampler
from quickstep_under_test.solvers.churn import Churn
from quickstep_under_test.solvers.consistency import ConsistencySampler
from quickstep_under_test.solvers.exponential import DDIM
from quickstep_under_test.solvers.noise import gaussian
from quickstep_under_test.solvers.restart import Restart
from quickstep_under_test.solvers.rho_rk import RhoRK
from quickstep_under_test.solvers.switch import Switch

from .test_solvers_comfy import FLOW, VE, Denoiser, both


@pytest.mark.parametrize("flow", [False, True], ids=["eps", "flow"])
@pytest.mark.parametrize("s_noise", [1.0, 0.9])
def test_consistency_sampling_is_cores_lcm(flow, s_noise):
    got, expected = both(core.sample_lcm, ConsistencySampler(s_noise=s_noise), flow, s_noise=s_noise)
    assert (got - expected).abs().max() < 1e-12


@pytest.mark.parametrize(("theirs", "inside"), [(core.sample_euler, DDIM()), (core.sample_heun, RhoRK())])
@pytest.mark.parametrize("s_churn", [1.5, 40.0])
def test_churn_is_cores_with_noise_from_the_seed(theirs, inside, s_churn, monkeypatch):
    """Core draws from the global generator, so it is given ours."""
    options = {"s_churn": s_churn, "s_tmin": 0.2, "s_tmax": 9.0, "s_noise": 1.003}
    x = torch.empty(2, 1, 2, 2, dtype=torch.float64)
    draw = gaussian(x, 3)
    monkeypatch.setattr(core.torch, "randn_like", lambda x: draw(0.0, 0.0))
    mine = Churn(inside, *options.values())
    sigmas = torch.tensor(VE, dtype=torch.float64)
    x = sigmas[0] * torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = theirs(Denoiser(False), x, sigmas, extra_args={}, disable=True, **options)
    monkeypatch.undo()
    got = sampler(mine).sampler_function(Denoiser(False), x, sigmas, extra_args={"seed": 3}, disable=True)
    assert (got - expected).abs().max() < 1e-5  # core's noise level is float32


@pytest.mark.parametrize("flow", [False, True], ids=["eps", "flow"])
@pytest.mark.parametrize(
    "solver", [Churn(RhoRK()), Restart(DDIM()), Switch(DDIM(), DDIM(eta=1.0)), ConsistencySampler("TCD")]
)
def test_the_seed_alone_decides(solver, flow):
    """Neither the global generator nor an earlier run; one preview per step of the schedule."""
    sigmas = torch.tensor(FLOW if flow else VE)
    x = sigmas[0] * torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    seen = []

    def run(seed):
        seen.clear()
        given = {"extra_args": {"seed": seed}, "disable": True, "callback": lambda d: seen.append(d["i"])}
        return sampler(solver).sampler_function(Denoiser(flow), x, sigmas, **given)

    first = run(3)
    torch.manual_seed(99)
    assert torch.equal(run(3), first) and not torch.equal(run(4), first)
    assert first.isfinite().all() and seen == list(range(8))
