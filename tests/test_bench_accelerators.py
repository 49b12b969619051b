"""The arithmetic of ``make bench-accelerators``: fronts, curves, verdicts, the table of candidates. No ComfyUI, no networks."""

import importlib.util
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def _load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


curves = _load("_accelerators_curves")
candidates = _load("_accelerators_candidates")


def test_front_keeps_what_nothing_beats():
    points = [(0.5, 0.2), (0.3, 0.4), (0.4, 0.5), (0.5, 0.1), (0.8, 0.1), (1.0, 0.0)]
    assert curves.front(points) == [(0.3, 0.4), (0.5, 0.1), (1.0, 0.0)]
    assert curves.front([]) == []


def test_a_power_law_is_interpolated_exactly():
    law = [(c, 0.01 * c**-2) for c in (0.2, 0.5, 1.0)]
    for cost in (0.2, 0.3, 0.47, 0.5, 0.9, 1.0):
        assert curves.at(reversed(law), cost) == pytest.approx(0.01 * cost**-2, rel=1e-12)


def test_ends_of_a_curve():
    law = [(0.25, 0.4), (0.5, 0.1), (1.0, 0.0)]
    assert curves.at(law, 0.2) is None  # it was never that fast
    assert curves.at(law, 0.25) == 0.4
    assert curves.at(law, 0.75) == pytest.approx(0.05)  # towards an error of 0 there is no power law
    assert curves.at(law, 1.3) == 0.0
    assert curves.at([], 1.0) is None


def test_each_picture_has_its_own_curve():
    curve = [(0.5, [0.4, 0.2]), (1.0, [0.1, 0.2])]
    middle = math.sqrt(0.5)
    assert curves.at_each(curve, middle) == pytest.approx([0.2, 0.2])
    assert curves.at_each(curve, 0.4) is None
    assert curves.at_each([], 0.5) is None


def test_best_is_the_closest_that_is_fast_enough():
    points = {"slow": (0.7, 0.01), "two": (0.5, 0.05), "nearly": (0.51, 0.04), "fast": (0.3, 0.2)}
    assert curves.best(points, 1.3) == "slow"
    assert curves.best(points, 2.0) == "nearly"  # 1.96x counts as 2x
    assert curves.best(points, 2.5) == "fast"
    assert curves.best(points, 4.0) is None


@pytest.mark.parametrize(
    ("ratios", "word"),
    [
        ((0.5, 0.99), "better"),
        ((1.2, 1.0), "worse"),
        ((0.5, 1.5), "mixed"),
        ((1.02, 0.97), "equal"),
        ((None, 0.9), "better"),
    ],
)
def test_verdict(ratios, word):
    assert curves.verdict(*ratios) == word
    assert curves.verdict(None, None) == "-"


@dataclass(frozen=True)
class Fake:
    interval: int = 2
    order: int = 1

    def __post_init__(self):
        if self.interval < 1:
            raise ValueError("interval = 0, but it must be at least 1.")


def test_a_row_of_the_table_is_every_combination():
    rows = candidates.sweep("Fake", interval=[2, 3], order=1)
    assert [row.label for row in rows] == ["Fake, interval 2, order 1", "Fake, interval 3, order 1"]
    assert rows[1].make({"Fake": Fake}) == [Fake(3, 1)]
    both = candidates.together(rows, candidates.sweep("Other"))
    assert both[0].label == "Fake, interval 2, order 1 + Other" and both[0].method == "Fake + Other"
    assert candidates.Candidate().label == "plain"


def test_what_is_missing_or_refused_is_said_and_the_rest_runs():
    rows = [
        *candidates.sweep("Fake", interval=[0, 2]),
        *candidates.sweep("Absent", tol=[0.1, 0.2]),
        *candidates.sweep("Fake", unknown=1),
        *candidates.sweep("Fake", interval=2),
    ]
    found, refused = candidates.usable(rows, {"Fake": Fake})
    assert [row.label for row in found] == ["Fake, interval 2"]
    assert refused.keys() == {"Fake, interval 0", "Absent", "Fake, unknown 1"}
    assert refused["Absent"] == "there is no accelerator Absent"
