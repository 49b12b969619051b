"""Which part inherits in which call, without a network."""

import pytest
import torch
from quickstep_under_test.solvers.caching.accelerator import Plan, Run
from quickstep_under_test.solvers.caching.feature_inheritance import LEVELS, FeatureInheritance
from quickstep_under_test.solvers.caching.work import part_work

CPU = torch.device("cpu")


def grid(steps):
    return [float(steps - i) for i in range(steps + 1)]


def calls(settings, steps=12, parts=3, **more):
    """For each call its plan and which of the parts were computed."""
    times = grid(steps)
    session, made = settings.start(Run(times, **more)), []
    for t in times[:-1]:
        with session.call(t):
            branches, computed = session.branches(["c"]), []
            for part in range(parts) if session.plan is not Plan.PLAIN else ():
                if session.kept(part, branches, CPU) is None:
                    computed.append(part)
                    session.keep(part, branches, torch.ones(1))
            made.append((session.plan, computed))
    return made, session


def test_together_all_parts_are_computed_in_the_same_calls():
    made, _ = calls(FeatureInheritance(interval=3, warmup=3, tail=1))
    assert [plan for plan, _ in made[:2]] == [Plan.PLAIN] * 2 and made[-1][0] is Plan.PLAIN
    assert [(p, bool(c)) for p, c in made[2:8]] == [
        (Plan.FULL, True), (Plan.PARTIAL, False), (Plan.PARTIAL, False)] * 2  # fmt: skip
    assert made[2][1] == [0, 1, 2]


def test_in_turn_every_part_is_computed_once_in_interval_calls():
    made, _ = calls(FeatureInheritance(interval=3, mode="in turn", warmup=0, tail=0), parts=4)
    assert [c for _, c in made[:5]] == [[0, 1, 2, 3], [2], [1], [0, 3], [2]]
    assert {plan for plan, _ in made} == {Plan.PARTIAL}


def test_interval_one_and_outside_the_window_nothing_is_kept():
    made, session = calls(FeatureInheritance(interval=1))
    assert {plan for plan, _ in made} == {Plan.PLAIN} and session.store.peak == 0
    made, _ = calls(FeatureInheritance(warmup=0, tail=0), window=(9.0, 4.0))
    assert [plan is Plan.PLAIN for plan, _ in made] == [True] * 3 + [False] * 5 + [True] * 4


def test_few_steps_are_left_alone():
    assert {plan for plan, _ in calls(FeatureInheritance(), steps=3)[0]} == {Plan.PLAIN}


@pytest.mark.parametrize("mode", ["together", "in turn"])
def test_what_is_too_old_is_not_inherited(mode):
    """A branch that was away for a while finds nothing."""
    session = FeatureInheritance(interval=3, mode=mode, warmup=0, tail=0).start(Run(grid(12)))
    had = []
    for t in grid(12)[:8]:
        with session.call(t):
            branches = session.branches(["away"])
            if t == 12.0:
                session.keep(1, branches, torch.ones(1))
            elif session.inherits(1):
                had.append((t, session.kept(1, branches, CPU) is not None))
    assert all(found is (t >= 10.0) for t, found in had) and {found for _, found in had} == {True, False}
    assert session.store.nbytes == 0


def test_after_added_noise_everything_is_computed():
    session = FeatureInheritance(interval=4, warmup=0).start(Run(grid(8)))
    for t, plan in ((8.0, Plan.FULL), (7.0, Plan.PARTIAL), (7.5, Plan.FULL), (6.0, Plan.PARTIAL)):
        with session.call(t):
            assert session.plan is plan


def test_levels():
    assert FeatureInheritance(inherit="units").kinds == ("attn1", "attn2", "ff")
    assert set(LEVELS["layers"]) == {*LEVELS["resnets"], *LEVELS["transformers"]}
    with pytest.raises(ValueError, match="Feature Inheritance: inherit = 'everything' is not one of"):
        FeatureInheritance(inherit="everything")


def test_the_work_of_a_part_has_what_is_inside_it():
    layer = {"": 0.0, "proj_in": 1.0, "blocks.0.attn1": 2.0, "blocks.0.attn1.to_q": 4.0, "blocks.0.attn10": 8.0}
    assert part_work(layer, "blocks.0.attn1") == 6.0 and part_work(layer, "") == 15.0
