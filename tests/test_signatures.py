"""Parameters and their order are a file format: workflows store widget values by position. They may only be appended.

A change here that is not an addition at the end breaks every saved workflow.
"""

from __future__ import annotations

import pytest
from quickstep_under_test.solvers import library as lib
from quickstep_under_test.solvers import schedules as sc
from quickstep_under_test.solvers.caching.library import ACCELERATORS
from quickstep_under_test.solvers.method import params, parts
from quickstep_under_test.solvers.stitch import Alternate, TStitch, TStitchModel

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


ACCELERATING = {
    "StepForecast": "mode tol share interval order gain adapt forecast "
    "max_skip flex schedule domain coordinate start_percent end_percent warmup tail",
    "EasyCachePaper": "tau repeat start_percent end_percent warmup tail",
    "SADA": "max_interval coefficients lagrange_term lagrange_int middle start_percent end_percent warmup tail",
    "AdaptiveDiffusion": "threshold max_skip start_percent end_percent warmup tail",
    "DeepCache": "interval depth schedule center power "
    "start_percent end_percent warmup max_cache_mb cache_device forecast_order",
    "FasterDiffusion": "key_steps interval steps parallel_batch noise_injection "
    "inject_below start_percent end_percent max_cache_mb cache_device",
    "FeatureInheritance": "inherit interval fresh mode start_percent end_percent warmup tail max_cache_mb cache_device",
    "FirstBlockCache": "threshold max_consecutive forecast_order start_percent "
    "end_percent warmup tail max_cache_mb cache_device",
    "DBCache": "threshold Fn Bn max_consecutive forecast_order "
    "start_percent end_percent warmup tail max_cache_mb cache_device",
    "TeaCache": "calibration threshold polynomial max_consecutive forecast_order "
    "start_percent end_percent warmup tail max_cache_mb cache_device",
    "MagCache": "calibration threshold K start_percent end_percent warmup tail max_cache_mb cache_device",
    "TaylorSeer": "interval order start_percent end_percent warmup tail max_cache_mb cache_device",
    "DeltaDiT": "interval share b forecast_order start_percent end_percent warmup tail max_cache_mb cache_device",
    "FORA": "interval order start_percent end_percent warmup tail max_cache_mb cache_device",
    "PAB": "spatial cross temporal mlp order start_percent end_percent warmup tail max_cache_mb cache_device",
    "TokenCache": "interval ratio start_percent end_percent warmup tail max_cache_mb cache_device",
    "ToDo": "factor levels keep start_percent end_percent",
    "ATEDM": "ratio early_ratio early levels samples start_percent end_percent",
    "GuidanceCache": "interval policy warmup tail start_percent end_percent",
    "AdaptiveGuidance": "threshold policy start_percent end_percent",
    "LinearAG": "calibration start_percent end_percent",
    "GuidanceWindow": "start_percent end_percent",
    "FasterCFG": "interval low high turn radius start_percent end_percent",
    "SeamlessTiles": "tile max_shift fill reset_every overlap seed start_percent end_percent",
    "SkipTuning": "rho_bottom rho_top curve start_percent end_percent",
    "PLADIS": "lam alpha start_percent end_percent",
    "BlockSkip": "calibration budget start_percent end_percent",
    "AutoDiffusion": "calibration",
    "TStitch": "fraction by memory fraction_2 fraction_3",
    "TStitchModel": "fraction by memory",
    "Alternate": "pattern memory",
}


@pytest.mark.parametrize("method", (*ACCELERATORS, TStitch, TStitchModel, Alternate), ids=lambda m: m.id)
def test_parameters_of_accelerators_are_only_appended(method):
    names = [p.name for p in (*parts(method), *params(method))]
    published = ACCELERATING[method.id].split()
    assert names[: len(published)] == published


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
