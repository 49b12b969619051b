"""Reuse of layers without a network: which kinds are due, what is kept and forecast, which tokens are refreshed."""

import pytest
import torch
from quickstep_under_test.solvers.caching.accelerator import Plan, Run
from quickstep_under_test.solvers.caching.fora import FORA
from quickstep_under_test.solvers.caching.layers import CROSS, FUSED, MLP, SELF, TEMPORAL, Layer, Tally, layer_work
from quickstep_under_test.solvers.caching.pab import PAB
from quickstep_under_test.solvers.caching.token_cache import TokenCache, refresh
from torch import nn

GRID = [float(i) for i in range(12, -1, -1)]
LETTERS = {Plan.PLAIN: "-", Plan.FULL: "F", Plan.PARTIAL: "p"}


def plans(settings, times=GRID, **run):
    session, made = settings.start(Run(GRID, **run)), ""
    for t in times[:-1] if times is GRID else times:
        with session.call(t):
            made += LETTERS[session.plan]
    return made


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (FORA(interval=3), "--FppFppFpp-"),
        (FORA(interval=3, order=1), "-FFppFppFpp-"),
        (FORA(interval=2, warmup=0, tail=0), "FpFpFpFpFpFp"),
        (FORA(interval=1), "------------"),
        (FORA(interval=4, warmup=1, tail=2), "FpppFpppFp--"),
        (TokenCache(interval=3), "--FppFppFpp-"),
        (TokenCache(interval=1), "------------"),
        (PAB(spatial=1, cross=1, temporal=1, mlp=1), "------------"),
    ],
    ids=str,
)
def test_which_calls_are_full(settings, expected):
    assert plans(settings) == expected


def test_the_window_begins_with_a_full_call():
    assert plans(FORA(interval=3, warmup=0, tail=0), window=(9.5, 3.0)) == "---FppFpp---"


def test_after_noise_was_added_the_next_call_is_full():
    assert plans(FORA(interval=4, warmup=0, tail=0), times=[12.0, 11.0, 10.0, 11.5, 10.0]) == "FppFp"


def test_kinds_are_due_at_their_own_intervals():
    session = PAB(spatial=2, cross=4, temporal=3, mlp=1, warmup=1, tail=0).start(Run(GRID))
    due = {kind: "" for kind in (SELF, CROSS, TEMPORAL, MLP, FUSED)}
    for t in GRID[:-1]:
        with session.call(t):
            for kind in due:
                due[kind] += "." if kind in session.reused else "F"
    assert due == {
        SELF: "F.F.F.F.F.F.",
        CROSS: "F...F...F...",
        TEMPORAL: "F..F..F..F..",
        MLP: "F" * 12,
        FUSED: "F" * 12,
    }


def test_few_steps_are_said_to_be_few():
    assert "with 8 steps there is little to reuse" in FORA().note(Run(GRID[:9]))
    assert FORA().note(Run(GRID)) is None and PAB().note(Run([])) is None


def outputs(settings, f, several=False):
    """What a layer whose output is ``f(call, t)`` seems to return, and whether it ran, call by call."""
    session, made = settings.start(Run(GRID)), []
    for i, t in enumerate(GRID[:-1]):
        with session.call(t):
            value = torch.full((2, 3, 4), f(i, t))
            compute = (lambda _, v=value: (v, 2 * v)) if several else (lambda _, v=value: v)
            if session.plan is Plan.PLAIN:
                continue
            out, share = session.run_layer(Layer("a", SELF), ["c", "u"], compute, torch.zeros(2, 3, 4))
            made.append((out[1][0, 0, 0] / 2 if several else out[0, 0, 0], share))
    return [(float(v), s) for v, s in made]


@pytest.mark.parametrize("several", [False, True])
def test_outputs_are_reused_as_they_are(several):
    found = outputs(FORA(interval=3, warmup=1, tail=0), lambda i, t: float(i), several)
    assert [v for v, _ in found] == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9]
    assert [s for _, s in found] == [1.0, 0.0, 0.0] * 4


def test_a_straight_line_in_log_snr_is_forecast_exactly():
    coordinate = Run(GRID).coordinate
    found = outputs(FORA(interval=3, order=1, warmup=2, tail=0), lambda i, t: 2 * coordinate(t) + 1)
    assert [v for v, _ in found] == pytest.approx([2 * coordinate(t) + 1 for t in GRID[:-1]], abs=1e-5)
    assert sum(s for _, s in found) == 5


def test_what_is_handed_out_may_be_written_to():
    session = FORA(interval=5, warmup=1, tail=0).start(Run(GRID))
    made = torch.ones(2, 3, 4)
    for t in GRID[:3]:
        with session.call(t):
            out, _ = session.run_layer(Layer("a", MLP), ["c", "u"], lambda _, out=made: out, made)
            assert out.min() == 1.0
            if session.plan is Plan.PARTIAL:
                out += 1.0
            made = torch.ones(2, 3, 4)


def test_only_what_is_known_of_every_branch_is_reused():
    session = FORA(interval=5, warmup=1, tail=0).start(Run(GRID))
    with session.call(12.0):
        session.run_layer(Layer("a", SELF), ["c"], lambda _: torch.ones(1, 2, 2), None)
    with session.call(11.0):
        assert session.run_layer(Layer("a", SELF), ["c", "u"], lambda _: torch.ones(2, 2, 2), None)[1] == 1.0
    with session.call(10.0):
        assert session.run_layer(Layer("a", SELF), ["u", "c"], lambda _: torch.ones(2, 2, 2), None)[1] == 0.0
        assert session.run_layer(Layer("b", SELF), ["u"], lambda _: torch.ones(3, 2, 2), None)[1] == 1.0


@pytest.mark.parametrize("settings", [FORA(interval=3, warmup=1), TokenCache(interval=3, ratio=0.0, warmup=1)])
def test_a_branch_that_missed_the_last_full_call_is_computed(settings):
    session, shares = settings.start(Run(GRID)), {"c": "", "u": ""}
    for i, t in enumerate(GRID[:10]):
        with session.call(t):
            for key in ("c", "u") if i in (0, 2, 4, 5, 8) else ("c",):
                share = session.run_layer(Layer("a", MLP), [key], lambda x: x + 1.0, torch.ones(1, 2, 2))[1]
                shares[key] += "F" if share == 1.0 else "."
    assert shares == {"c": "F..F..F..F", "u": "F.F.F"}


def test_the_tokens_that_changed_most_are_refreshed():
    x = torch.zeros(1, 4, 2)
    now = torch.tensor([[[0.1, 0.0], [5.0, 0.0], [0.0, -2.0], [1.0, 1.0]]])
    was, out = x.clone(), torch.full((1, 4, 3), 9.0)
    refresh(lambda rows: rows.sum(-1, keepdim=True).expand(-1, -1, 3), now, was, out, 2)
    assert torch.equal(out[..., 0], torch.tensor([[9.0, 5.0, -2.0, 9.0]]))
    assert torch.equal(was, torch.tensor([[[0.0, 0.0], [5.0, 0.0], [0.0, -2.0], [0.0, 0.0]]]))


def test_a_token_that_waits_is_refreshed_in_the_end():
    """Its change counts from its last refresh, so small ones add up."""
    session = TokenCache(interval=12, ratio=0.25, warmup=1, tail=0).start(Run(GRID))
    layer, seen = Layer("a", MLP), []
    for i, t in enumerate(GRID[:6]):
        x = torch.tensor([[[0.0], [1.0 * (i % 2)], [0.4 * i], [0.0]]])
        with session.call(t):
            out, share = session.run_layer(layer, ["c"], lambda rows: 10 * rows, x)
            seen.append(out[0, 2, 0].item())
            assert share == (1.0 if i == 0 else 0.25)
    assert seen == pytest.approx([0, 0, 0, 12, 16, 16])


@pytest.mark.parametrize(("ratio", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_no_tokens_and_all(ratio, share):
    session, x = TokenCache(interval=3, ratio=ratio, warmup=1).start(Run(GRID)), torch.ones(2, 5, 3)
    for i, t in enumerate(GRID[:2]):
        with session.call(t):
            out, computed = session.run_layer(Layer("a", MLP), ["c", "u"], lambda rows: rows + 1, (i + 1) * x)
    assert computed == share and torch.equal(out, (3 if share else 2) * x)


def test_work_of_layers():
    mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    assert layer_work(mlp, MLP, 10) == 2 * 8 * 32 * 10
    attention = nn.ModuleDict(
        {"to_q": nn.Linear(8, 8), "to_k": nn.Linear(6, 8), "to_v": nn.Linear(6, 8), "to_out": nn.Linear(8, 8)}
    )
    assert layer_work(attention, CROSS, 10, 4) == 10 * 2 * 64 + 4 * 2 * 48 + 2 * 10 * 4 * 8
    own = nn.ModuleDict({"qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8)})
    assert layer_work(own, SELF, 10) == 10 * 256 + 2 * 100 * 8
    joint = nn.ModuleDict({"to_q": nn.Linear(8, 8), "add_q_proj": nn.Linear(8, 8), "to_add_out": nn.Linear(8, 8)})
    assert layer_work(joint, SELF, 10, 3) == 64 * 10 + 128 * 3 + 2 * 169 * 8


def test_a_tally_is_a_share():
    tally = Tally()
    assert tally.share == 1.0
    tally.count(3.0, 0.0)
    tally.count(9.0)
    assert tally.share == 0.75
    tally.whole = 30.0
    assert tally.share == pytest.approx(0.9)
