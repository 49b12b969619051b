"""Parameters and their order are a file format: workflows store widget values by position. They may only be appended.

A change here that is not an addition at the end breaks every saved workflow.
"""

from __future__ import annotations

import pytest
from quickstep_under_test.solvers import schedules as sc
from quickstep_under_test.solvers.caching.deepcache import DeepCache
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP, SDEDPMSolverPP
from quickstep_under_test.solvers.method import params

PUBLISHED = {
    DDIM: ["eta", "s_noise", "noise"],
    DPMSolverPP: ["order", "correction", "third_order", "lower_order_final"],
    SDEDPMSolverPP: ["order", "eta", "correction", "third_order", "s_noise", "lower_order_final", "noise"],
    DeepCache: ["interval", "depth", "schedule", "center", "power", "start_percent", "end_percent", "warmup"],
    sc.KarrasSchedule: ["rho", "shift", "space", "sigma_cut"],
    sc.ExponentialSchedule: ["shift", "space", "sigma_cut"],
    sc.PolyexponentialSchedule: ["rho", "shift", "space", "sigma_cut"],
    sc.CosineSchedule: ["c", "shift"],
    sc.UniformSchedule: ["spacing", "shift"],
    sc.BetaSchedule: ["alpha", "beta", "space", "shift", "sigma_cut"],
    sc.LinearQuadraticSchedule: ["threshold_noise", "linear_steps", "shift"],
    sc.AlignYourSteps: ["table", "shift"],
}


@pytest.mark.parametrize("method", PUBLISHED, ids=lambda m: m.id)
def test_parameters_are_only_appended(method):
    names = [p.name for p in params(method)]
    published = PUBLISHED[method]
    assert names[: len(published)] == published


def test_every_method_is_listed():
    assert {*sc.CLOSED_FORMS} <= PUBLISHED.keys()
