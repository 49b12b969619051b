"""UniPC and SA-Solver against ComfyUI's own, where its own are right; DC-Solver learns the guidance scale from the guider."""

from __future__ import annotations

import comfy.extra_samplers.uni_pc as core_unipc
import pytest
import torch
from comfy.k_diffusion import sa_solver as core_tau
from comfy.k_diffusion import sampling as core
from quickstep_under_test.nodes.bridge import process_from, sampler
from quickstep_under_test.solvers.artifact import Artifact
from quickstep_under_test.solvers.dc_solver import KIND, DCSolver, cascade
from quickstep_under_test.solvers.noise import SOURCES
from quickstep_under_test.solvers.sa import SASolver
from quickstep_under_test.solvers.unipc import UniPC

from . import models
from .test_solvers_comfy import FLOW, VE, Denoiser, Eps, Flow, run

NEVER = {"lower_order_final": "never"}
KINDS = pytest.mark.parametrize("flow", [False, True], ids=["eps", "flow"])


def both(theirs, mine, flow, sigmas, **options):
    """Results of a core sampler function and of one of ours over the same sigmas, float64, with the same noise."""
    sigmas = torch.tensor(sigmas, dtype=torch.float64)
    x = sigmas[0] * torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = Denoiser(flow)
    if theirs in (core.sample_sa_solver, core.sample_sa_solver_pece):
        draw = SOURCES["brownian"](x, 3, sigmas.tolist())
        options["noise_sampler"] = lambda s, t: draw(float(s), float(t))
    expected = theirs(model, x, sigmas.clone(), extra_args={}, disable=True, **options)
    got = sampler(mine).sampler_function(model, x, sigmas, extra_args={"seed": 3}, disable=True)
    return got, expected


def core_window(flow, start_percent, end_percent, eta):
    sampling = (Flow if flow else Eps)()
    ends = (float(sampling.percent_to_sigma(percent)) for percent in (start_percent, end_percent))
    return core_tau.get_tau_interval_func(*ends, eta=eta)


@pytest.fixture
def float64_by_default():
    """Core's UniPC makes its coefficients in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.smoke
@KINDS
@pytest.mark.parametrize("simple", [False, True], ids=["exact", "simple"])
@pytest.mark.parametrize("mode", ["PEC", "PECE"])
@pytest.mark.parametrize("orders", [(1, 0), (2, 2), (2, 3), (3, 4)], ids=str)
def test_sa_solver_is_that_of_core(orders, mode, simple, flow):
    """Over a run that ends above 0. The window's edges lie between the sigmas: see the test of the window."""
    window = {"start_percent": 0.21, "end_percent": 0.79}
    mine = SASolver(*orders, mode=mode, simple_order_2=simple, **window, **NEVER)
    options = dict(
        predictor_order=orders[0],
        corrector_order=orders[1],
        use_pece=mode == "PECE",
        simple_order_2=simple,
        tau_func=core_window(flow, *window.values(), 1.0),
    )
    got, expected = both(core.sample_sa_solver, mine, flow, (FLOW if flow else VE)[:-1], **options)
    assert (got - expected).abs().max() < 1e-9


@KINDS
def test_sa_solver_to_zero_and_with_another_window(flow):
    """Core's last orders are one lower than diffusers' and ours where a run ends at 0; without a choice they agree."""
    sigmas = FLOW if flow else VE
    options = dict(predictor_order=1, corrector_order=2, tau_func=core_window(flow, 0.4, 1.0, 0.7))
    mine = SASolver(1, 2, 0.7, 0.4, 1.0, **NEVER)
    got, expected = both(core.sample_sa_solver, mine, flow, sigmas, **options)
    assert (got - expected).abs().max() < 1e-9
    got, expected = both(
        core.sample_sa_solver, SASolver(2, 2, **NEVER), flow, sigmas, predictor_order=2, corrector_order=2
    )
    assert (got - expected).abs().max() > 1e-4


@KINDS
def test_the_window_is_where_core_has_it(flow):
    """tau changes at core's percent_to_sigma; on flow models training times are counted from 1, so within a 1000th."""
    sampling = (Flow if flow else Eps)()
    process = process_from(sampling)
    for percent in (0.1, 0.2, 0.5, 0.8, 0.95):
        theirs = float(sampling.percent_to_sigma(percent))
        assert float(process.t_of_u(1.0 - percent)) == pytest.approx(theirs, rel=1e-5, abs=1e-3 if flow else 0.0)


@pytest.mark.smoke
@KINDS
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_is_that_of_core(variant, flow, float64_by_default):
    """Core's counts in log sigma on flow models too, and stops at 0.001 instead of 0."""
    theirs = core_unipc.sample_unipc if variant == "bh1" else core_unipc.sample_unipc_bh2
    sigmas = [*(FLOW if flow else VE)[:-1], 0.001]
    mine = UniPC(3, variant, lower_order_final="always", frame="vef")
    got, expected = both(theirs, mine, flow, sigmas)
    assert (got - expected).abs().max() < 1e-6
    other = UniPC(3, "bh2" if variant == "bh1" else "bh1", lower_order_final="always", frame="vef")
    assert (both(theirs, other, flow, sigmas)[0] - expected).abs().max() > 1e-4
    if flow:
        true_snr = UniPC(3, variant, lower_order_final="always")
        assert (both(theirs, true_snr, flow, sigmas)[0] - expected).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_a_cascade_gets_the_guidance_scale_of_the_run(kind):
    model = models.gaussian(kind)
    sigmas = FLOW if kind == "flow" else VE
    numbers = torch.zeros(4, 3, 3)
    numbers[0, 2, 2], numbers[1, 1, 1] = 1.0, 2.0
    file = Artifact(KIND, {"cascade": numbers.tolist()})
    ends = {}
    for cfg in (1.0, 6.0):
        ends[cfg] = run(model, DCSolver(UniPC(2), file), sigmas, cfg=cfg)
        ratios = " ".join(map(str, cascade(numbers.tolist(), cfg, len(sigmas) - 1)))
        assert torch.equal(ends[cfg], run(model, DCSolver(UniPC(2), None, ratios), sigmas, cfg=cfg))
    assert not torch.equal(ends[1.0], ends[6.0])
