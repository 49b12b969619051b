"""DeepCache's decisions, without a network: schedules, positions, branches, sessions, reports."""

import math
from itertools import pairwise

import pytest
import torch
from quickstep_under_test.solvers.caching.accelerator import Plan, Run
from quickstep_under_test.solvers.caching.deepcache import DeepCache, nonuniform, paper, uniform
from quickstep_under_test.solvers.caching.store import BranchStore
from quickstep_under_test.solvers.caching.tracker import StepTracker
from quickstep_under_test.solvers.report import Ledger, Meter

SCHEDULES = ("uniform", "nonuniform", "paper")
PARTIAL = Plan.PARTIAL


def plans(settings, calls, times, window=(math.inf, 0.0)):
    """The plan of each call, made at the times ``calls``."""
    session = settings.start(Run(times, window))
    made = []
    for t in calls:
        with session.call(t):
            made.append(session.plan)
    return made


def full_at(made):
    return [i for i, plan in enumerate(made) if plan is not PARTIAL]


def grid(steps):
    return [float(steps - i) for i in range(steps + 1)]


def heun(times):
    """The times at which Heun calls: start and end of every step, but not at 0."""
    return [t for s, e in pairwise(times) for t in (s, e) if t > 0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [  # computed with the authors' formula
        ((50, 5, 15, 1.4), "0 5 9 13 17 21 26 31 37 43"),
        ((50, 10, 15, 1.2), "0 10 18 27 38"),
        ((50, 3, 15, 1.2), "0 3 6 9 11 14 15 18 21 24 26 30 33 36 39 43 46"),
        ((20, 3, 6, 1.3), "0 3 6 7 10 13 16"),
        ((20, 5, 5, 1.4), "0 4 8 13"),
        ((30, 3, 10, 1.4), "0 3 6 8 10 13 16 19 22 26"),
    ],
)
def test_paper_schedule_reproduces_the_reference(given, expected):
    assert paper(*given) == [int(i) for i in expected.split()]


def test_paper_schedule_without_solution_says_what_to_do():
    with pytest.raises(ValueError, match="choose schedule 'nonuniform'"):
        paper(6, 2, 3, 1.4)


def test_nonuniform_always_fits():
    for steps in range(1, 60):
        for interval in range(1, 21):
            for center in (0.0, 0.3, 0.5, 1.0):
                full = nonuniform(steps, interval, center * steps, 1.4)
                assert len(full) == len(uniform(steps, interval))
                assert full[0] == 0 and full[-1] < steps and full == sorted(set(full))


def test_nonuniform_is_dense_around_the_center_and_even_at_power_one():
    near = [i for i in nonuniform(60, 4, 20, 2.0) if 14 <= i <= 26]
    assert len(near) > len([i for i in uniform(60, 4) if 14 <= i <= 26])
    assert nonuniform(60, 4, 20, 1.0) == uniform(60, 4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("interval", [2, 3, 5, 20])
def test_one_call_per_step_follows_the_schedule(schedule, interval):
    settings = DeepCache(interval=interval, schedule=schedule, warmup=0)
    times = grid(30)
    assert full_at(plans(settings, times[:-1], times)) == settings.full_steps(30)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_interval_one_keeps_nothing(schedule):
    times = grid(12)
    assert set(plans(DeepCache(interval=1, schedule=schedule), heun(times), times)) == {Plan.PLAIN}


@pytest.mark.parametrize("interval", [2, 3, 4])
def test_several_calls_per_step_are_counted_as_calls(interval):
    times = grid(24)
    made = plans(DeepCache(interval=interval, warmup=0), heun(times), times)
    assert full_at(made) == list(range(0, len(made), interval))


def test_warmup_calls_are_full_and_only_the_last_is_kept():
    times = grid(10)
    made = plans(DeepCache(interval=3, warmup=3, forecast_order="0"), times[:-1], times)
    assert made[:2] == [Plan.PLAIN, Plan.PLAIN]
    assert full_at(made) == [0, 1, 2, 5, 8]


@pytest.mark.parametrize("order", [1, 2])
def test_a_forecast_has_its_anchors_from_the_warmup(order):
    times = grid(10)
    made = plans(DeepCache(interval=3, warmup=4, forecast_order=str(order)), times[:-1], times)
    assert made[:4] == [Plan.PLAIN] * (3 - order) + [Plan.FULL] * (order + 1) and full_at(made) == [0, 1, 2, 3, 6, 9]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_forecast_is_the_polynomial_through_the_full_calls(order):
    """In half log-SNR, here -log t; exact on polynomials of its order, and the newest full call at its own time."""

    def feature(t):
        return torch.tensor([sum(math.log(t) ** k for k in range(order + 1))])

    times = [10.0 * 0.8**i for i in range(13)] + [0.0]
    session = DeepCache(interval=3, warmup=3, forecast_order=str(order)).start(Run(times))
    seen, last_full = 0, None
    for t in times[:-1]:
        with session.call(t):
            branches = session.branches(["c"])
            if session.plan is Plan.PARTIAL:
                seen += 1
                made = session.kept(branches)
                assert made == pytest.approx(feature(t), rel=1e-5)
                assert order == 0 or made != pytest.approx(last_full, rel=1e-3)
            elif session.plan is Plan.FULL:
                session.keep(branches, last_full := feature(t))
                assert torch.equal(session.kept(branches), last_full)
    assert seen == 7


def test_the_forecast_follows_the_sampler():
    def weights(run, **settings):
        return DeepCache(**settings).forecast(run)[1](3.0, [1.0, 2.0])

    ode, sde = Run(grid(9)), Run(grid(9), stochastic=True)
    assert weights(ode) == [-0.5, 1.5] and weights(sde) == [0.0, 1.0]
    assert weights(sde, forecast_order="1") == [-1.0, 2.0] and weights(ode, forecast_order="0") == [0.0, 1.0]
    assert [DeepCache(forecast_order=o).forecast(ode)[0] for o in ("auto", "0", "1", "2")] == [1, 0, 1, 2]


@pytest.mark.parametrize("order", ["0", "1", "2"])
def test_a_branch_that_had_no_part_in_the_last_full_call_is_not_forecast(order):
    times = grid(12)
    session = DeepCache(interval=2, warmup=0, forecast_order=order).start(Run(times))
    had = {12.0: ["a", "b"], 10.0: ["a"], 8.0: ["a"], 6.0: ["a"]}
    for t in times[:7]:
        with session.call(t):
            if session.plan is Plan.FULL:
                for name in had[t]:
                    session.keep(session.branches([name]), torch.ones(1))
            else:
                assert (session.kept([("b", 0)]) is None) == (t < 10.0)
                assert session.kept([("a", 0)]) is not None
    assert session.store.coordinates(("b", 0)) == []  # and it takes no room


def test_memory_is_limited():
    session = DeepCache(interval=4, warmup=0, max_cache_mb=1).start(Run(grid(8)))
    with session.call(8.0):
        branches = session.branches(["a"])
        session.keep(branches, torch.ones(1, 2**20))
    with session.call(7.0):
        assert session.kept(branches) is None and session.store.overflowed and session.store.nbytes == 0


def test_few_steps_are_safe():
    for steps in (0, 1, 2, 4):
        for schedule in ("uniform", "nonuniform"):
            times = grid(steps)
            made = plans(DeepCache(interval=5, schedule=schedule, warmup=1), times[:-1], times)
            assert full_at(made) == list(range(min(steps, 1)))
            assert plans(DeepCache(interval=5, schedule=schedule), times[:-1], times)[:3].count(PARTIAL) == 0


def test_outside_the_window_everything_is_computed_and_nothing_kept():
    times = grid(12)
    made = plans(DeepCache(interval=3, warmup=0), times[:-1], times, window=(9.0, 3.0))
    assert made[:3] == [Plan.PLAIN] * 3 and made[-3:] == [Plan.PLAIN] * 3
    assert full_at(made[3:-3]) == [0, 3]


def test_after_added_noise_the_next_call_is_full():
    times = grid(12)
    made = plans(DeepCache(interval=4, warmup=0), [12.0, 11.0, 10.0, 11.5, 11.0], times)
    assert full_at(made) == [0, 3]


def test_a_flush_forgets():
    session = DeepCache(interval=4, warmup=0).start(Run(grid(8)))
    with session.call(8.0):
        session.store.put(session.branches(["a"]), torch.ones(1))
    with session.call(7.0):
        assert session.store.get(session.branches(["a"])) is not None
    with session.call(7.5):
        assert session.store.nbytes == 0


def test_a_full_call_drops_what_earlier_ones_kept():
    session = DeepCache(interval=2, warmup=0, forecast_order="0").start(Run(grid(8)))
    with session.call(8.0):
        session.store.put(session.branches(["early"]), torch.ones(1))
    with session.call(7.0), session.call(7.0):
        pass
    with session.call(6.0):
        assert session.plan is Plan.FULL
        assert session.store.get([("early", 0)]) is None


def test_a_call_inside_a_call_is_the_same_call():
    session = DeepCache(interval=3, warmup=0).start(Run(grid(9)))
    for t in grid(9)[:-1]:
        with session.call(t):
            before = session.plan
            with session.call(t):
                assert session.plan is before
            assert session.plan is before
        assert session.plan is None
    assert session.tracker.advance(0.5).call == 9


def test_plan_ends_with_the_call_even_if_it_fails():
    session = DeepCache().start(Run(grid(9)))
    with pytest.raises(RuntimeError), session.call(9.0):
        raise RuntimeError
    assert session.plan is None


def test_repeated_passes_over_a_conditioning_get_keys_of_their_own():
    session = DeepCache().start(Run(grid(4)))
    with session.call(4.0):
        first = session.branches(["cond", "uncond"])
        again = session.branches(["cond"])
    with session.call(3.0):
        assert session.branches(["uncond"]) + session.branches(["cond"]) == first[::-1]
        assert session.branches(["cond"]) == again
    assert again[0] not in first


def test_positions():
    tracker = StepTracker([8.0, 4.0, 2.0, 0.0])
    seen = [tracker.advance(t) for t in (8.0, 6.0, 4.0, 4.0, 2.0, 1.0)]
    assert [p.step for p in seen] == [0, 0, 1, 1, 2, 2]
    assert [p.on_grid for p in seen] == [True, False, True, True, True, False]
    assert [p.call for p in seen] == list(range(6))
    assert not any(p.restarted for p in seen)
    assert tracker.advance(3.0).restarted
    assert StepTracker([8.0, 4.0]).advance(9.0).step == 0
    assert StepTracker([8.0, 4.0]).advance(1.0).step == 0
    assert StepTracker([]).advance(1.0).step == 0


def test_positions_where_the_schedule_goes_up_again():
    times = [8.0, 4.0, 2.0, 6.0, 3.0, 1.0, 0.0]
    tracker = StepTracker(times)
    assert [tracker.advance(t).step for t in (8.0, 4.0, 6.0, 3.0, 1.0)] == [0, 1, 3, 4, 5]


def test_float32_times_are_on_the_grid():
    times = torch.linspace(14.6, 0.03, 30).tolist()
    tracker = StepTracker(times)
    seen = [tracker.advance(float(torch.tensor(t, dtype=torch.float32)) * (1 + 1e-6)) for t in times[:-1]]
    assert [p.step for p in seen] == list(range(29)) and all(p.on_grid for p in seen)


def test_store_cuts_and_joins_branches_in_any_order():
    store = BranchStore()
    batch = torch.randn(4, 3)
    store.put(["u", "c"], batch)
    assert torch.equal(store.get(["c", "u"]), batch[[2, 3, 0, 1]])
    assert torch.equal(store.get(["c"]), batch[2:])
    assert store.get(["c", "other"]) is None


def test_store_shares_no_memory():
    store = BranchStore()
    batch = torch.zeros(2, 3)
    store.put(["a", "b"], batch)
    batch += 1
    for keys in (["a"], ["a", "b"]):
        fetched = store.get(keys)
        fetched += 1
    assert store.get(["a", "b"]).abs().sum() == 0


def test_store_counts_bytes():
    store = BranchStore()
    store.put(["a", "b"], torch.zeros(2, 8))
    store.put(["a"], torch.zeros(1, 8))
    assert store.nbytes == store.peak == 64
    store.clear()
    assert store.nbytes == 0 and store.peak == 64


def test_depth():
    assert DeepCache().branch_depth(12, attentive=True) == 1
    assert DeepCache().branch_depth(9, attentive=False) == 2
    assert DeepCache().branch_depth(3, attentive=False) == 1
    assert DeepCache(depth=10).branch_depth(12, attentive=True) == 10
    with pytest.raises(ValueError, match="between 0 and 10"):
        DeepCache(depth=11).branch_depth(12, attentive=True)


@pytest.mark.parametrize("wrong", [{"interval": 0}, {"interval": 21}, {"depth": -2}, {"schedule": "x"}, {"power": 0.5},
                                   {"forecast_order": "3"}])  # fmt: skip
def test_values_out_of_bounds_are_refused(wrong):
    with pytest.raises(ValueError, match="DeepCache"):
        DeepCache(**wrong)


def test_meter_counts_calls_and_work():
    meter = Meter(label="euler, 4 steps")
    with meter.call():
        meter.forward(10)
        meter.forward(10)
    with meter.call():
        meter.forward(20).share = 0.25
    with meter.call():
        pass
    with meter.call(), meter.call():
        meter.forward(20)
    meter.held("x", 2**20)
    meter.held("x", 10)
    report = meter.report()
    assert (report.calls, report.full, report.partial, report.skipped, report.forwards) == (4, 2, 1, 1, 4)
    assert report.work == pytest.approx((20 + 5 + 0 + 20) / 80)
    assert report.cache_bytes == 2**20 and not report.finished
    assert "4 calls" in report.line() and "44% of network work skipped" in report.line()
    assert "stopped before the end" in report.line()


def test_unknown_share_makes_the_work_unknown():
    meter = Meter()
    with meter.call():
        meter.forward(10).share = None
    report = meter.report()
    assert report.work is None and report.partial == 1 and "unknown" in report.line()
    assert Meter().report().calls == 0 and Meter().report().work is None


def test_ledger_lists_the_passes_of_the_newest_group():
    ledger = Ledger(keep=3)
    assert ledger.last() == []
    for group in ("a", "a", "b", "b"):
        ledger.add(Meter(group=group).report())
    assert len(ledger.runs) == 3
    assert [run.group for run in ledger.last()] == ["b", "b"]
