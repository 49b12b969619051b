"""Noise sources: rows, paths, laws. Every bound on a statistic is at a fixed seed and wide (5 standard errors or more)."""

from __future__ import annotations

import gc
import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from quickstep_under_test.solvers.noise import SOURCES, _levy, _octave, _rounded, brownian, gaussian
from scipy.stats import kstest

TIMES = (14.6, 7.3, 3.1, 1.7, 1.1, 0.9, 0.33, 0.029, 0.0)
LATTICE = [_rounded(t) for t in TIMES]

each = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())


def run(noise, times=TIMES):
    return torch.stack([noise(s, t) for s, t in pairwise(times)])


def raw(noise, s, t):
    """The increment of the path, for times on the lattice."""
    return noise(s, t) * math.sqrt(s - t)


@each
@pytest.mark.parametrize("shape", [(5,), (3, 4), (4, 8, 8), (2, 3, 4, 5)], ids=str)
def test_a_row_depends_on_its_place_not_on_the_batch_size(source, shape):
    alone, three, seven = (run(source(torch.zeros(n, *shape), 7, TIMES)) for n in (1, 3, 7))
    assert torch.equal(seven[:, :3], three)
    assert torch.equal(three[:, :1], alone)


@each
def test_no_two_rows_steps_or_seeds_are_alike(source):
    seeds = (0, 1, 5, 5 + 2**31, 5 + 2**32, 5 + 2**40, 2**63, 2**64 - 1)
    drawn = [row for seed in seeds for z in run(source(torch.zeros(3, 40), seed, TIMES)) for row in z]
    for a, b in combinations(drawn, 2):
        assert not torch.equal(a, b)
    correlations = np.corrcoef(torch.stack(drawn).numpy()) - np.eye(len(drawn))
    assert abs(correlations).max() < 0.85  # 18 000 pairs of 40 numbers: 5.3 standard errors


@each
def test_noise_is_not_the_initial_noise(source):
    for seed in (0, 1, 2**64 - 1):
        initial = torch.randn(2, 1000, generator=torch.Generator().manual_seed(seed))
        for z in run(source(torch.zeros(2, 1000), seed, TIMES)):
            assert abs(np.corrcoef(initial.numpy().ravel(), z.numpy().ravel())[0, 1]) < 0.12


@each
def test_global_generator_is_untouched(source):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a = run(source(torch.zeros(2, 6), 1, TIMES))
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(9)
    assert torch.equal(run(source(torch.zeros(2, 6), 1, TIMES)), a)


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_precision_does_not_change_the_noise(source, dtype):
    single = run(source(torch.zeros(2, 50), 1, TIMES))
    other = run(source(torch.zeros(2, 50, dtype=dtype), 1, TIMES))
    assert other.dtype == dtype
    assert torch.equal(other, single.to(dtype)) or (dtype == torch.float64 and (other - single).abs().max() < 1e-5)


@each
def test_a_draw_is_the_callers_to_change(source):
    changed, kept = source(torch.zeros(2, 5), 1, TIMES), source(torch.zeros(2, 5), 1, TIMES)
    for s, t in [*pairwise(TIMES), *pairwise(TIMES[-4:])]:
        z = changed(s, t)
        assert torch.equal(z, kept(s, t))
        z.zero_()


@each
def test_draws_are_standard_normal_and_independent(source):
    drawn = run(source(torch.zeros(2, 20_000), 11, TIMES)).flatten(1).numpy()  # 8 steps of 40 000
    assert (drawn.mean(1) ** 2 * 40_000).max() < 25
    assert ((drawn.var(1) - 1) ** 2 * 20_000).max() < 25
    correlations = np.corrcoef(drawn) - np.eye(len(drawn))
    assert abs(correlations).max() < 5 / 200
    for z in drawn:
        assert kstest(z, "norm").pvalue > 1e-4


def test_gaussian_is_fresh_at_every_call():
    noise = gaussian(torch.zeros(1, 30), 1)
    a, b = noise(2.0, 1.0), noise(2.0, 1.0)
    assert not torch.equal(a, b)


def test_steps_add_up_to_one_path_whatever_the_order_of_questions():
    def fresh():
        return brownian(torch.zeros(2, 30, dtype=torch.float64), 3, TIMES)

    pairs = list(combinations(LATTICE, 2))
    once = {pair: raw(fresh(), *pair) for pair in pairs}
    for order in (pairs, pairs[::-1], sorted(pairs, key=lambda p: p[1])):
        noise = fresh()
        for pair in order:
            assert torch.equal(raw(noise, *pair), once[pair])
    for s, m, t in combinations(LATTICE, 3):
        assert (once[s, m] + once[m, t] - once[s, t]).abs().max() < 1e-13


@pytest.mark.parametrize("n", [4, 64, 1000])
def test_refined_steps_add_up_in_single_precision(n):
    x = torch.zeros(1, 30)
    fine = [float(t) for t in np.geomspace(10.0, 0.02, 4 * n + 1)]
    noise = brownian(x, 2, fine)
    for s, t in list(zip(fine[::4], fine[4::4], strict=False))[:: max(n // 30, 1)]:
        cuts = [u for u in fine if t <= u <= s]
        parts = sum(noise(a, b).double() * math.sqrt(a - b) for a, b in pairwise(cuts))
        # Times are rounded to 2e-6 of themselves and z is normalised by what that leaves of a - b.
        assert (parts / math.sqrt(s - t) - noise(s, t)).abs().max() < 2e-5 * s / (s - t)


def test_the_path_does_not_depend_on_the_range():
    x = torch.zeros(1, 10)
    assert torch.equal(brownian(x, 1, (80.0, 0.0))(2.0, 1.3), brownian(x, 1, (2.0, 1.3))(2.0, 1.3))


def test_covariance_of_the_construction_is_that_of_brownian_motion():
    """Without drawing: the factors on the named normals give E[W_s W_t] = min(s, t) on the unit interval."""
    points = [0.0, 2**-18, 0.1, 1 / 3, 1 / 3 + 2**-18, 0.5, 0.7, 0.75, 1 - 2**-18]
    points = [round(u * 2**18) / 2**18 for u in points]
    rows = [dict(_levy(u)) for u in points]
    for u, a in zip(points, rows, strict=True):
        assert len(a) <= 19
        for v, b in zip(points, rows, strict=True):
            assert sum(a[name] * b[name] for name in a.keys() & b.keys()) == pytest.approx(min(u, v), abs=1e-15)


def test_short_and_far_steps_have_unit_variance():
    x = torch.zeros(1, 40_000)
    steps = [(14.0, 14.0 - 1e-4), (1.0, 1.0 - 1e-5), (16.0, 0.0), (1e-3, 0.0), (1e-5, 0.0), (900.0, 1e-3), (0.5, 0.25)]
    for s, t in steps:
        z = brownian(x, 4)(s, t)
        assert abs(z.mean()) < 5 / 200 and abs(z.var() - 1) < 5 * math.sqrt(2) / 200, (s, t)


def test_octaves_and_rounding():
    assert _octave(0.0) == (0.0, 2**-10) and _octave(2**-10) == (2**-10, 2**-10)
    assert _octave(0.999) == (0.5, 0.5) and _octave(1.0) == (1.0, 1.0) and _octave(700.0) == (512.0, 512.0)
    times = np.geomspace(1e-2, 1e3, 1000)
    rounded = np.array([_rounded(t) for t in times])
    assert abs(rounded / times - 1).max() < 2**-18.9
    assert all(_rounded(t) == t for t in (*rounded, 0.0, 1.0, 80.0))
    assert _rounded(-1e-12) == 0.0  # a zero that rounding pushed below


def test_times_rounded_to_one_get_noise_of_their_own():
    x = torch.zeros(2, 20_000)
    noise = brownian(x, 1)
    s, m, t = 3.0 + 2e-7, 3.0 + 1e-7, 3.0
    assert _rounded(s) == _rounded(t)
    drawn = torch.stack([noise(s, m), noise(m, t), noise(s, t), noise(4.0, s), noise(t, 2.0)]).flatten(1).numpy()
    assert np.isfinite(drawn).all()
    assert abs(np.corrcoef(drawn) - np.eye(5)).max() < 5 / 200
    assert ((drawn.var(1) - 1) ** 2 * 20_000).max() < 25
    assert torch.equal(noise(s, m), brownian(x, 1)(s, m))


@each
def test_memory_is_three_times_that_of_x(source):
    noise = source(torch.zeros(1, 777), 1, TIMES)
    for s, t in pairwise(np.linspace(10, 0, 40)):
        noise(float(s), float(t))
    gc.collect()
    kept = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.shape == (1, 777)]
    assert len(kept) <= 3


def test_a_step_draws_little(monkeypatch):
    """A step that starts where the last one ended costs one path down, not two."""
    calls = []
    plain = torch.Tensor.normal_
    monkeypatch.setattr(torch.Tensor, "normal_", lambda *a, **k: (calls.append(1), plain(*a, **k))[1])
    noise = brownian(torch.zeros(1, 20), 1)
    noise(10.3, 6.1)
    del calls[:]
    noise(6.1, 4.3)
    noise(6.1, 4.3)
    assert len(calls) == 19
    noise(4.3, 0.11)  # six octaves down
    assert len(calls) == 19 + 19 + 6
