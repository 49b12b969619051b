"""Skip-Tuning's scales and Block Skip's choice, without a network."""

import pytest
import torch
from quickstep_under_test.solvers.artifact import Artifact
from quickstep_under_test.solvers.caching.accelerator import Plan, Run
from quickstep_under_test.solvers.caching.block_skip import KIND, BlockSkip, Unit, change, choose
from quickstep_under_test.solvers.caching.skip_tuning import SkipTuning

GRID = [4.0, 3.0, 2.0, 1.0, 0.0]


def at(settings, t):
    session = settings.start(Run(GRID))
    for each in [x for x in GRID if x > t]:
        with session.call(each):
            pass
    with session.call(t):
        return session, session.plan


def test_scales_go_from_the_deepest_to_the_outermost_block():
    session, plan = at(SkipTuning(rho_bottom=0.6, rho_top=1.0), 4.0)
    assert plan is Plan.FULL
    assert [round(session.rho(i, 5), 9) for i in range(5)] == [0.6, 0.7, 0.8, 0.9, 1.0]
    assert at(SkipTuning(rho_bottom=0.6, rho_top=0.6), 4.0)[0].rho(0, 1) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("curve", "expected"), [("constant", [1, 1, 1, 1]), ("early", [1, 2 / 3, 1 / 3, 0]), ("late", [0, 1 / 3, 2 / 3, 1]),
                            ("middle", [0, 3**0.5 / 2, 3**0.5 / 2, 0])]
)  # fmt: skip
def test_curves_over_the_run(curve, expected):
    settings = SkipTuning(rho_bottom=0.5, rho_top=0.5, curve=curve)
    for t, w in zip(GRID, expected, strict=False):
        session, plan = at(settings, t)
        assert session.rho(0, 4) == pytest.approx(1 - 0.5 * w, abs=1e-9)
        assert plan is (Plan.PLAIN if session.w == 0.0 else Plan.FULL)


def test_scales_of_1_are_plain():
    assert at(SkipTuning(rho_bottom=1.0, rho_top=1.0), 4.0)[1] is Plan.PLAIN


UNITS = [Unit("a", False, 0.10, (1.0, 3.0)), Unit("b", False, 0.04, (0.1, 0.1)), Unit("c", False, 0.05, (0.1, 0.3)),
         Unit("d", False, 0.0, (0.0,)), Unit("e", False, 0.005, (0.05,))]  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "expected"), [(0.0, ""), (0.003, ""), (0.05, "be"), (0.09, "bc"), (0.14, "bce"), (0.195, "bcea")]
)
def test_the_cheapest_change_per_work_goes_first_within_the_budget(budget, expected):
    assert "".join(unit.name for unit in choose(UNITS, budget)) == expected


def test_the_score_does_not_know_the_noise_level():
    g = torch.Generator().manual_seed(0)
    d, e = torch.randn(9, generator=g), torch.randn(9, generator=g)
    x0 = torch.randn(9, generator=g)
    scores = [change(x0 + s * d, x0, x0 + s * 0.1 * e) for s in (0.1, 10.0)]
    assert scores == pytest.approx([float(0.01 * e.square().sum() / d.square().sum())] * 2, rel=1e-3)


def table(**more):
    return {"units": [{"name": "a", "whole": False, "work": 0.1, "scores": [1.0]} | more]}


def test_bad_files_are_refused():
    for artifact in (
        Artifact(KIND, {}),
        Artifact(KIND, table(work="much")),
        Artifact(KIND, table(scores=None)),
        Artifact("x", {}),
    ):
        with pytest.raises(ValueError, match=r"is damaged; run Block Sensitivity again|is needed here"):
            BlockSkip(calibration=artifact)


def test_nothing_to_leave_out_is_plain():
    run = Run(GRID)
    for settings in (BlockSkip(budget=0.0), BlockSkip(calibration=Artifact(KIND, table()), budget=0.05)):
        session = settings.start(run)
        with session.call(4.0):
            assert session.plan is Plan.PLAIN
    session = BlockSkip(calibration=Artifact(KIND, table()), budget=0.1).start(run)
    with session.call(4.0):
        assert session.plan is Plan.FULL
