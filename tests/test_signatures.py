"""Parameters and their order are a file format: workflows store widget values by position. They may only be appended.

A change here that is not an addition at the end breaks every saved workflow.
"""

from __future__ import annotations

import pytest
from quickstep_under_test.solvers import library as lib
from quickstep_under_test.solvers import schedules as sc
from quickstep_under_test.solvers.caching.deepcache import DeepCache
from quickstep_under_test.solvers.method import params, parts

PUBLISHED = {
    lib.DDIM: ["eta", "s_noise", "noise"],
    lib.DPMSolverPP: ["order", "correction", "third_order", "lower_order_final", "frame"],
    lib.UniPC: ["order", "variant", "corrector", "from_step", "algorithm", "lower_order_final", "frame"],
    lib.DEIS: ["points", "variable", "frame"],
    lib.IPNDM: ["points", "coefficients"],
    lib.PNDM: ["method"],
    lib.GHVB: ["order"],
    lib.GradientEstimation: ["gamma", "second_order"],
    lib.DPMSolverV3: ["statistics", "order", "use_corrector", "p_pseudo", "c_pseudo", "lower_order_final"],
    lib.USF: ["statistics", "table"],
    lib.FittedSolver: ["calibration", "elsewhere"],
    lib.DPMSolverSinglestep: ["order", "algorithm", "plan", "correction", "r1", "frame"],
    lib.RhoRK: ["method", "frame"],
    lib.DPMSolverAdaptive: [
        "order",
        "rtol",
        "atol",
        "algorithm",
        "max_calls",
        "controller_type",
        "h_init",
        "theta",
        "pcoeff",
        "icoeff",
        "dcoeff",
        "frame",
    ],
    lib.AdaptiveRK: ["method", "rtol", "atol", "max_calls", "variable"],
    lib.SDEDPMSolverPP: ["order", "eta", "correction", "third_order", "s_noise", "lower_order_final", "noise"],
    lib.SASolver: [
        "predictor_order",
        "corrector_order",
        "eta",
        "start_percent",
        "end_percent",
        "simple_order_2",
        "mode",
        "s_noise",
        "lower_order_final",
        "noise",
    ],
    lib.ERSDE: ["order", "phi", "third_order", "s_noise", "noise"],
    lib.SEEDS: ["order", "eta", "correction", "c2", "s_noise", "noise"],
    lib.MLSDE: ["eta", "variance", "data_std", "s_noise", "noise"],
    lib.SiTSDE: ["sampling_method", "diffusion_form", "diffusion_norm", "last_step", "noise"],
    lib.ScoreSDE: ["predictor", "corrector", "n_steps", "snr"],
    lib.ConsistencySampler: ["preset", "gamma", "s_noise"],
    lib.HB: ["solver", "beta", "nesterov"],
    lib.LML: ["solver", "kappa", "lam_rel", "freeze"],
    lib.DCSolver: ["solver", "calibration", "ratios", "dc_order"],
    lib.Churn: ["solver", "S_churn", "S_tmin", "S_tmax", "S_noise"],
    lib.Restart: ["solver", "preset", "segments", "S_noise"],
    lib.Switch: ["solver", "inside", "start_percent", "end_percent"],
    DeepCache: [
        "interval",
        "depth",
        "schedule",
        "center",
        "power",
        "start_percent",
        "end_percent",
        "warmup",
        "max_cache_mb",
        "cache_device",
        "forecast_order",
    ],
    sc.KarrasSchedule: ["rho", "shift", "space", "sigma_cut"],
    sc.ExponentialSchedule: ["shift", "space", "sigma_cut"],
    sc.PolyexponentialSchedule: ["rho", "shift", "space", "sigma_cut"],
    sc.CosineSchedule: ["c", "shift"],
    sc.UniformSchedule: ["spacing", "shift"],
    sc.BetaSchedule: ["alpha", "beta", "space", "shift", "sigma_cut"],
    sc.LinearQuadraticSchedule: ["threshold_noise", "linear_steps", "shift"],
    sc.AlignYourSteps: ["table", "shift"],
    sc.RecipeSchedule: ["end", "shift", "sigma_cut"],
}


@pytest.mark.parametrize("method", PUBLISHED, ids=lambda m: m.id)
def test_parameters_are_only_appended(method):
    names = [p.name for p in (*parts(method), *params(method))]
    published = PUBLISHED[method]
    assert names[: len(published)] == published


def test_every_method_is_listed():
    assert {*sc.CLOSED_FORMS, *lib.SOLVERS, *lib.WRAPPERS} <= PUBLISHED.keys()


def test_names_of_solvers_are_kept():
    """The titles stand in the dropdown of Quickstep Sampler, whose choice a workflow stores by name."""
    assert [s.title for s in lib.SOLVERS] == [
        "DDIM",
        "DPM-Solver++",
        "UniPC",
        "DEIS",
        "iPNDM",
        "PNDM",
        "GHVB",
        "Gradient estimation",
        "DPM-Solver-v3",
        "USF (solver schedule)",
        "Fitted solver",
        "DPM-Solver singlestep",
        "rhoRK-DEIS",
        "DPM-Solver adaptive",
        "Adaptive Runge-Kutta",
        "SDE-DPM-Solver++",
        "SA-Solver",
        "ER-SDE",
        "SEEDS",
        "Maximum-likelihood SDE",
        "SiT SDE",
        "Score-SDE predictor-corrector",
        "Consistency sampler (LCM, TCD, CTM)",
    ]
