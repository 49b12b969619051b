"""Forecasts: exact where they claim to be, never NaN, bounded."""

import math

import pytest
import torch
from quickstep_under_test.solvers.caching.forecast import (
    bounded,
    chebyshev,
    combine,
    damped,
    distinct,
    lagrange,
    reuse,
    taylor,
)

UNEVEN = [0.1, 0.45, 0.6, 1.3, 1.5]
KINDS = {
    "reuse": reuse,
    **{f"lagrange{m}": lagrange(m) for m in range(4)},
    **{f"taylor{m}": taylor(m) for m in range(4)},
    "damped": damped(lagrange(2), 0.5),
    "chebyshev": chebyshev(4, (0.0, 2.0)),
}


def polynomial(degree, c):
    return sum((k + 1.5) * c**k for k in range(degree + 1))


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_lagrange_is_exact_on_polynomials_at_uneven_nodes(degree):
    w = lagrange(degree)(1.9, UNEVEN)
    assert sum(a * polynomial(degree, c) for a, c in zip(w, UNEVEN, strict=True)) == pytest.approx(
        polynomial(degree, 1.9)
    )


def test_lagrange_is_not_exact_one_degree_higher():
    w = lagrange(1)(1.9, UNEVEN)
    assert abs(sum(a * polynomial(2, c) for a, c in zip(w, UNEVEN, strict=True)) - polynomial(2, 1.9)) > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [[0.5], [0.1, 0.5], UNEVEN, [1.0, 0.8, 0.5, 0.1, -0.3, -0.4]])
def test_a_constant_stays(kind, nodes):
    w = KINDS[kind](nodes[-1] + 0.3 * (nodes[-1] - nodes[0]), nodes)
    assert len(w) == len(nodes) and sum(w) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [[0.5, 0.5], [0.1, 0.1, 0.5, 0.5], [0.1, 0.2, 0.4, 0.6, 0.6], [0.0, 0.0, 0.0]])
def test_coinciding_nodes_give_numbers_and_the_newer_counts(kind, nodes):
    w = KINDS[kind](0.7, nodes)
    assert all(map(math.isfinite, w))
    assert all(w[i] == 0.0 for i in range(len(nodes) - 1) if nodes[i] == nodes[i + 1])


def test_distinct_keeps_the_newer_of_two():
    assert distinct([0.0, 1.0, 1.0, 2.0]) == [0, 2, 3]


def test_too_far_lowers_the_order():
    assert lagrange(2)(100.0, [0.0, 1.0, 2.0]) == [0.0, 0.0, 1.0]
    assert lagrange(2)(2.0 + 3.5, [0.0, 1.0, 2.0]) != [0.0, 0.0, 1.0]


def test_taylor_reproduces_the_published_recursion_and_its_error():
    """Even spacing N = 3: f = F + k D1 + k^2 / 2 D2, D1 = (F - F_1) / 3, D2 = (F - 2 F_1 + F_2) / 9."""
    w, k = taylor(2)(8.0, [0.0, 3.0, 6.0]), 2.0
    assert w == pytest.approx([k**2 / 18, -k / 3 - k**2 / 9, 1 + k / 3 + k**2 / 18])
    square = sum(a * c**2 for a, c in zip(w, [0.0, 3.0, 6.0], strict=True))
    assert square - 64.0 == pytest.approx(-k * 3.0)  # a parabola is missed by k N
    assert taylor(1)(8.0, [0.0, 3.0, 6.0]) == pytest.approx(lagrange(1)(8.0, [0.0, 3.0, 6.0]))


def test_damped_goes_part_of_the_way():
    assert damped(lagrange(1), 0.25)(2.0, [0.0, 1.0]) == pytest.approx([-0.25, 1.25])


def test_chebyshev_fits_a_smooth_curve_and_is_a_line_with_few_anchors():
    nodes = [0.2 * i for i in range(8)]
    w = chebyshev(4, (0.0, 2.0), ridge=1e-6, blend=1.0)(1.6, nodes)
    assert sum(a * math.sin(c) for a, c in zip(w, nodes, strict=True)) == pytest.approx(math.sin(1.6), abs=3e-3)
    assert chebyshev(4, (0.0, 2.0))(0.6, [0.0, 0.2, 0.4]) == pytest.approx(lagrange(1)(0.6, [0.0, 0.2, 0.4]))


def test_a_forecast_that_grows_or_is_no_number_is_the_newest_value_of_that_sample():
    newest = torch.ones(3, 2, 2)
    wild = torch.stack([torch.full((2, 2), 1.2), torch.full((2, 2), 1.6), torch.full((2, 2), math.nan)])
    assert torch.equal(bounded(wild, newest), torch.stack([wild[0], newest[1], newest[2]]))


def test_combine_keeps_the_dtype_and_gives_a_new_tensor():
    a, b = torch.ones(2, dtype=torch.float16), torch.full((2,), 3.0, dtype=torch.float16)
    assert combine([0.0, 1.0], [a, b]) is not b
    made = combine([-1.0, 2.0], [a, b])
    assert made.dtype == torch.float16 and made.tolist() == [5.0, 5.0]
