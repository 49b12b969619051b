"""Choosing among measured trials, and the recipes' table."""

import json

import pytest
from quickstep_under_test.solvers.caching import budget
from quickstep_under_test.solvers.caching.budget import Trial
from quickstep_under_test.solvers.caching.composition import conflict
from quickstep_under_test.solvers.caching.library import ACCELERATORS, RECIPES

PART = ("DeepCache", {"interval": 3})
TRIALS = [
    Trial((("DeepCache", {"interval": 2}),), 20, 0.62, 0.02, 1.0),
    Trial((PART,), 20, 0.50, 0.05, 0.8),
    Trial((("DeepCache", {"interval": 5}),), 20, 0.40, 0.20, 0.7),
    Trial((("DeepCache", {"interval": 9}),), 20, 0.99, 0.0, 0.7),  # switched itself off
    Trial((), 10, 0.50, 0.04, 0.9),
    Trial((), 7, 0.35, 0.10, 0.6),
]


@pytest.mark.parametrize(("work", "expected"), [(0.7, 0.62), (0.5, 0.50), (0.49, 0.50), (0.45, 0.40), (0.1, 0.40)])
def test_the_least_error_within_the_work(work, expected):
    assert budget.cheapest_enough(TRIALS, work).work == expected


@pytest.mark.parametrize(("error", "expected"), [(0.5, 0.40), (0.1, 0.50), (0.03, 0.62)])
def test_the_least_work_within_the_error(error, expected):
    assert budget.close_enough(TRIALS, error).work == expected


def test_nothing_that_helps():
    off = [t for t in TRIALS if not t.parts or t.work > 0.9]
    assert budget.cheapest_enough(off, 0.5) is None and budget.close_enough(TRIALS, 0.001) is None
    assert budget.fewer_steps(TRIALS[:3], 0.5) is None
    assert budget.fewer_steps(TRIALS, 0.37).steps == 7


def test_trials_survive_a_file():
    assert budget.from_table(json.loads(json.dumps(budget.to_table(TRIALS)))) == TRIALS
    for bad in ({}, {"trials": [{}]}, {"trials": [{"parts": [1]}]}, {"trials": 3}):
        with pytest.raises(ValueError, match="plan is damaged"):
            budget.from_table(bad)


def test_every_recipe_can_be_made():
    """Its accelerators exist, with the settings it gives, and no two of one recipe exclude each other."""
    assert RECIPES
    for parts in RECIPES:
        made = [budget.made(part) for part in parts]
        assert made and len({type(a) for a in made}) == len(made)
        for i, a in enumerate(made):
            assert all(conflict(type(a), type(b)) is None for b in made[:i])
    assert {a.id for a in ACCELERATORS} >= {name for parts in RECIPES for name, _ in parts}


def test_a_plan_of_another_version_says_what_is_missing():
    with pytest.raises(ValueError, match="called 'Nothing', which this version does not have"):
        budget.made(("Nothing", {}))
    with pytest.raises(ValueError, match="sets colour of DeepCache"):
        budget.made(("DeepCache", {"colour": 3}))
    with pytest.raises(ValueError, match="interval = 0"):
        budget.made(("DeepCache", {"interval": 0}))


def test_recipes_are_those_of_the_model():
    every = budget.recipes([a.id for a in ACCELERATORS])
    assert len(every) == len(RECIPES) and budget.recipes([]) == []
    few = budget.recipes(["DeepCache"])
    assert few and all(name == "DeepCache" for parts in few for name, _ in parts)
