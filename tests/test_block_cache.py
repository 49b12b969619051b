"""When block caches hit, and what they give instead: their sessions without any network."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from quickstep_under_test.solvers.artifact import Artifact, load, save
from quickstep_under_test.solvers.caching.accelerator import Plan, Run
from quickstep_under_test.solvers.caching.block_cache import WATCHED, change, sampled
from quickstep_under_test.solvers.caching.delta_dit import DeltaDiT
from quickstep_under_test.solvers.caching.first_block import DBCache, FirstBlockCache
from quickstep_under_test.solvers.caching.magcache import MagCache
from quickstep_under_test.solvers.caching.profile import KIND, BlockProfile, expected, fitted
from quickstep_under_test.solvers.caching.profiling import BlockProfiler
from quickstep_under_test.solvers.caching.taylorseer import TaylorSeer
from quickstep_under_test.solvers.caching.teacache import PUBLISHED, TeaCache
from quickstep_under_test.solvers.caching.work_dit import Work

CPU = torch.device("cpu")
TIMES = [float(t) for t in np.geomspace(10.0, 0.1, 12)] + [0.0]
LAMBDA = [-math.log(t) for t in TIMES[:-1]]


def walk(
    settings, watched=lambda i: torch.ones(1, 4), residual=lambda i: torch.full((1, 3), float(i)), keys=("k",), run=None
):
    """A run of one pass per call: for every call what it hit with, None where it was computed, "plain" where it was left alone."""
    session = settings.start(run or Run(TIMES))
    found = []
    for i, t in enumerate(TIMES[:-1]):
        with session.call(t):
            if session.plan is Plan.PLAIN:
                found.append("plain")
                continue
            hit = session.hit(keys, watched(i), CPU)
            if hit is None:
                session.keep(keys, residual(i), watched(i))
            found.append(hit)
    return found, session


def pattern(found):
    return "".join("p" if isinstance(f, str) else "F" if f is None else "." for f in found)


LOOSE = dict(warmup=1, tail=1)


def test_change_is_that_of_the_row_that_changes_most():
    old = torch.tensor([[1.0, 1.0], [2.0, -2.0]])
    new = torch.tensor([[1.0, 1.5], [2.0, -1.0]])
    assert float(change(new, old)) == pytest.approx(0.25)
    assert float(change(new.half(), old.half())) == pytest.approx(0.25)
    assert math.isnan(float(change(new * math.nan, old)))


def test_what_is_looked_at_is_a_copy_of_some_tokens():
    hidden = torch.randn(2, 4096, 3)
    few = sampled(hidden)
    assert WATCHED / 2 < few.shape[1] <= WATCHED and torch.equal(few[:, 1], hidden[:, 17])
    small = torch.randn(2, 16, 3)
    kept = sampled(small)
    small.zero_()
    assert kept.abs().sum() > 0


def test_the_first_block_decides_and_its_reference_is_of_the_last_full_call():
    # It grows by 4% of the first value per call: 10% after three.
    found, session = walk(
        FirstBlockCache(threshold=0.1, forecast_order=0, max_consecutive=9, **LOOSE),
        watched=lambda i: torch.full((1, 4), 1.0 + 0.04 * i),
    )
    assert pattern(found) == "F..F..F...Fp"
    assert [float(f[0, 0]) for f in found[1:3]] == [0.0, 0.0] and float(found[4][0, 0]) == 3.0
    assert session.store.peak > 0


def test_not_a_number_is_computed():
    found, _ = walk(FirstBlockCache(threshold=2.0, **LOOSE), watched=lambda i: torch.full((1, 4), math.nan))
    assert pattern(found) == "F" * 11 + "p"


@pytest.mark.parametrize(
    "settings",
    [
        FirstBlockCache(threshold=2.0, max_consecutive=2, **LOOSE),
        DBCache(threshold=2.0, max_consecutive=2, **LOOSE),
        TeaCache(threshold=5.0, max_consecutive=2, **LOOSE),
        TaylorSeer(interval=3, **LOOSE),
        DeltaDiT(interval=3, **LOOSE),
    ],
    ids=lambda s: s.id,
)
def test_no_more_hits_in_a_row_than_allowed(settings):
    assert pattern(walk(settings)[0]) == "F..F..F..F.p"
    assert pattern(walk(settings, run=Run(TIMES, window=(5.0, 1.0)))[0]).startswith("pp")
    assert walk(settings, run=Run(TIMES, window=(5.0, 1.0)))[0][-4:] == ["plain"] * 4


@pytest.mark.parametrize(
    "settings",
    [
        FirstBlockCache(threshold=0.0),
        DBCache(threshold=0.0),
        TeaCache(threshold=0.0),
        TaylorSeer(interval=1),
        DeltaDiT(interval=1),
    ],
    ids=lambda s: s.id,
)
def test_switched_off_it_keeps_nothing(settings):
    found, session = walk(settings)
    assert pattern(found) == "p" * 12 and session.store.peak == 0


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_taylorseer_is_exact_on_polynomials_of_its_order(order):
    def residual(i):
        x = torch.tensor([LAMBDA[i]], dtype=torch.float64)
        return torch.stack([sum((k + 1) * x**k for k in range(order + 1))], 1)

    found, _ = walk(TaylorSeer(interval=3, order=order, warmup=order + 1), residual=residual)
    hits = [i for i, f in enumerate(found) if isinstance(f, torch.Tensor)]
    assert len(hits) >= 4
    for i in hits:
        assert torch.allclose(found[i], residual(i), rtol=1e-6)


def test_noise_between_the_steps_is_not_extrapolated():
    found, _ = walk(TaylorSeer(interval=2, order=2, warmup=3), run=Run(TIMES, stochastic=True))
    assert [float(f[0, 0]) for f in found if isinstance(f, torch.Tensor)] == [2.0, 4.0, 6.0, 8.0]
    assert "without forecast" in TaylorSeer(order=2).note(Run(TIMES, stochastic=True))
    assert TaylorSeer(order=0).note(Run(TIMES, stochastic=True)) is None
    assert "little to reuse" in TaylorSeer().note(Run(TIMES[:6]))


def test_the_first_pass_decides_for_the_others():
    session = FirstBlockCache(threshold=0.1, warmup=1).start(Run(TIMES))
    one, two = torch.ones(1, 4), 2 * torch.ones(1, 4)
    with session.call(TIMES[0]):
        for keys in (["a"], ["b"]):
            assert session.hit(keys, one, CPU) is None
            session.keep(keys, one, one)
    with session.call(TIMES[1]):
        assert session.hit(["a"], one, CPU) is not None
        assert session.hit(["b"], two, CPU) is not None  # b alone would not
    with session.call(TIMES[2]):
        assert session.hit(["new"], one, CPU) is None  # unknown: computed, and nothing decided
        assert session.hit(["b"], two, CPU) is None and session.hit(["a"], one, CPU) is None
    with session.call(TIMES[3]):
        both = torch.cat([one, two])
        assert session.hit(["a", "b"], both, CPU) is None  # the larger change of the two counts


@pytest.mark.parametrize(
    "settings",
    [
        TaylorSeer(interval=3, **LOOSE),
        DeltaDiT(interval=3, **LOOSE),
        FirstBlockCache(threshold=0.01, **LOOSE),
        TeaCache(threshold=0.25, **LOOSE),
    ],
    ids=lambda s: s.id,
)
def test_a_branch_that_missed_the_last_full_call_is_computed(settings):
    """A guidance cache asks for the negative side now and then, and never in a full call if they are out of step."""
    session, hits = settings.start(Run(TIMES)), {"c": "", "u": ""}
    for i, t in enumerate(TIMES[:10]):
        with session.call(t):
            for key in ("c", "u") if i in (0, 2, 4, 5, 8) else ("c",):
                watched = torch.full((1, 4), 1.1 ** (i if settings.id == "TeaCache" else i // 3))
                if session.hit([key], watched, CPU) is None:
                    session.keep([key], torch.ones(1, 3), watched)
                    hits[key] += "F"
                else:
                    hits[key] += "."
    assert hits == {"c": "F..F..F..F", "u": "F.F.F"}


def test_teacache_adds_up_the_change_from_call_to_call():
    # 10% from each call to the next: three of them are 0.3, a fourth reaches 0.35.
    watched = lambda i: torch.full((1, 4), 1.1**i)  # noqa: E731
    settings = TeaCache(threshold=0.35, forecast_order=0, max_consecutive=9, **LOOSE)
    found, _ = walk(settings, watched)
    assert pattern(found) == "F...F...F..p"
    assert [float(f[0, 0]) for f in found[1:4]] == [0.0] * 3
    profile = artifact(polynomial=[0.0, 2.0, 0.0], span=[0.0, 1.0])
    twice = TeaCache(threshold=0.35, forecast_order=0, max_consecutive=9, calibration=profile, **LOOSE)
    assert pattern(walk(twice, watched)[0]) == "F.F.F.F.F.Fp"
    clamped = artifact(polynomial=[0.0, 2.0, 0.0], span=[0.0, 0.05])
    once = TeaCache(threshold=0.35, forecast_order=0, max_consecutive=9, calibration=clamped, **LOOSE)
    assert pattern(walk(once, watched)[0]) == "F...F...F..p"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_polynomials_are_never_negative(name):
    values = [expected(PUBLISHED[name][1], x) for x in np.linspace(0.0, 0.3, 50)]
    assert min(values) >= 0.0 and max(values) > 0.0
    assert math.isnan(expected(PUBLISHED[name][1], math.nan))
    assert TeaCache(polynomial=name).made_for == PUBLISHED[name][0]


def artifact(**over):
    table = dict(
        network="Net", blocks=4, polynomial=[1.0, 0.0], span=[0.0, 1.0], at=LAMBDA, log_size=[0.0] * len(LAMBDA)
    )
    return Artifact(KIND, {**table, **over})


def test_magcache_follows_the_calibrated_size():
    rate = 0.1  # of log |R| per half log-SNR
    settings = MagCache(
        calibration=artifact(log_size=[-rate * x for x in LAMBDA]), threshold=0.12, K=9, start_percent=0.0, **LOOSE
    )
    step = LAMBDA[1] - LAMBDA[0]
    g = [math.exp(-rate * step * k) for k in range(5)]
    errors = np.cumsum([1 - x for x in g[1:]])
    allowed = int(np.sum(errors < 0.12))
    assert allowed == 1 or allowed == 2
    found, _ = walk(settings, residual=lambda i: torch.ones(1, 3, dtype=torch.float64))
    assert pattern(found).startswith("F" + "." * allowed + "F" + "." * allowed + "F")
    for k in range(1, allowed + 1):
        assert float(found[k][0, 0]) == pytest.approx(g[k])
    assert pattern(walk(MagCache(calibration=artifact(), threshold=0.0))[0]) == "p" * 12
    assert pattern(walk(MagCache(calibration=artifact(), K=3, start_percent=0.0, **LOOSE))[0]) == "F...F...F..p"
    assert "no calibration" in MagCache().off(Run(TIMES)) and MagCache(calibration=artifact()).off(Run(TIMES)) is None


def test_a_calibration_does_not_depend_on_the_number_of_steps():
    """The ratio over an interval is the product over the intervals it is made of."""
    size = lambda x: 3.0 - 0.2 * x  # noqa: E731
    profiles = []
    for n in (10, 40):
        at = np.linspace(-2.0, 2.0, n + 1)
        ratios = [(at[0], 0.0)] + [(b, math.log(size(b) / size(a))) for a, b in pairwise(at)]
        profiles.append(fitted("Net", 4, [(0.1, 0.1), (0.2, 0.2)], ratios))
    for profile in profiles:
        assert profile.growth(-2.0, 2.0) == pytest.approx(size(2.0) / size(-2.0))
        assert profile.growth(-1.2, 0.4) == pytest.approx(size(0.4) / size(-1.2))
        assert profile.growth(2.0, 9.0) == 1.0


def test_the_fit_finds_a_polynomial_and_stays_in_what_was_seen(tmp_path):
    truth = np.array([3.0, -2.0, 0.5, 0.4, 0.01])
    x = np.linspace(0.05, 0.8, 30)
    sizes = [(float(i), -0.1) for i in range(5)]
    profile = fitted("Net", 4, list(zip(x, np.polyval(truth, x), strict=True)), sizes)
    assert np.allclose(profile.polynomial, truth, atol=1e-8)
    assert profile.change(0.3) == pytest.approx(np.polyval(truth, 0.3))
    assert profile.change(5.0) == profile.change(0.8) and profile.change(0.0) == profile.change(0.05)
    save(tmp_path / "a.json", Artifact(KIND, profile.table()))
    again = BlockProfile.of(load(tmp_path / "a.json", KIND))
    assert again.table() == profile.table()
    few = fitted("Net", 4, [(0.1, 1.0), (0.2, 2.0)], sizes)
    assert few.polynomial == pytest.approx((1.5,))
    with pytest.raises(ValueError, match="at least three"):
        fitted("Net", 4, [(0.1, 1.0)], sizes[:1])


@pytest.mark.parametrize(
    "over", [{"at": [2.0, 1.0], "log_size": [0.0, 0.0]}, {"at": []}, {"span": [1.0]}, {"polynomial": "x"}]
)
def test_a_damaged_calibration_is_refused(over):
    with pytest.raises(ValueError, match=r"damaged|no profile"):
        MagCache(calibration=artifact(**over))
    with pytest.raises(ValueError, match=r"damaged|no profile"):
        TeaCache(calibration=artifact(**over))


def test_a_polynomial_and_a_file_are_one_too_many():
    with pytest.raises(ValueError, match="not both"):
        TeaCache(calibration=artifact(), polynomial="Flux")


def test_the_profiler_computes_everything_and_compares_neighbours():
    profiler = BlockProfiler()
    growth = [math.exp(-0.1 * x) for x in LAMBDA]
    found, session = walk(
        profiler,
        watched=lambda i: torch.full((2, 4), 1.1**i, dtype=torch.float64),
        residual=lambda i: torch.full((2, 3), growth[i], dtype=torch.float64),
        keys=("a", "b"),
    )
    assert pattern(found) == "F" * 12
    profile = profiler.profile_of("Net", 4)
    assert profile.growth(LAMBDA[0], LAMBDA[-1]) == pytest.approx(growth[-1] / growth[0], rel=1e-5)
    assert profile.change(0.1) == pytest.approx(1 - growth[1] / growth[0], rel=1e-4)
    assert len(profiler.changes) == 2 * 11
    with session.call(TIMES[-2]):  # a second call at the same time is no step
        session.keep(("a", "b"), torch.ones(2, 3), torch.ones(2, 4))
    assert len(profiler.changes) == 2 * 11


def test_spans():
    assert FirstBlockCache().spans(10) == [(1, 10)]
    assert DBCache(Fn=2, Bn=3).spans(10) == [(2, 7)]
    assert TeaCache().spans(10) == TaylorSeer().spans(10) == MagCache().spans(10) == [(0, 10)]
    assert DeltaDiT(share=0.4).spans(10) == [(6, 10), (0, 4)]
    assert DeltaDiT(share=0.4, b=0.0).spans(10) == [(0, 4)] and DeltaDiT(share=0.95, b=1.0).spans(2) == [(1, 2)]
    with pytest.raises(ValueError, match="leave none"):
        DBCache(Fn=4, Bn=1).spans(5)
    session = DeltaDiT(share=0.4, b=0.5, interval=3, warmup=1).start(Run(TIMES))
    spans = []
    for t in TIMES[:-1]:
        with session.call(t):
            spans.append(session.span(10))
    assert spans == [(6, 10)] * 6 + [(0, 4)] * 6


def test_a_full_cache_means_computing():
    found, session = walk(
        TaylorSeer(interval=3, order=0, max_cache_mb=1, **LOOSE), residual=lambda i: torch.zeros(1, 2**20)
    )
    assert pattern(found) == "F" * 11 + "p" and session.store.overflowed


def test_noise_added_again_forgets():
    session = TaylorSeer(interval=3, **LOOSE).start(Run(TIMES))
    for t in TIMES[:2]:
        with session.call(t):
            if session.hit(["k"], None, CPU) is None:
                session.keep(["k"], torch.ones(1, 3), None)
    with session.call(TIMES[0]):
        assert session.hit(["k"], None, CPU) is None


def test_work_counts_the_tokens_that_a_layer_sees():
    block = torch.nn.ModuleDict({"qkv": torch.nn.Linear(4, 12), "adaLN_modulation": torch.nn.Linear(4, 8)})
    net = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([block, block]), "final": torch.nn.Linear(4, 4)})
    each = 10 * 4 * 12 + 4 * 8 + 2 * 10 * 10 * 4
    share = Work(SimpleNamespace(named_modules=net.named_modules), list(net["blocks"])).share((0, 1), ((10, 4),))
    assert share == pytest.approx(1 - each / (2 * each + 10 * 16))
