"""Token reduction without a network: coarser grids, merging, ranking, leaving out and filling in."""

import pytest
import torch
from quickstep_under_test.solvers.caching.accelerator import Plan, Run
from quickstep_under_test.solvers.caching.at_edm import ATEDM, importance, prune
from quickstep_under_test.solvers.caching.token_merge import ToDo, fewer, merged
from torch.nn import functional as F


def grid(rows=2, height=5, width=6, channels=3, seed=0):
    return torch.randn(rows, height * width, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("factor", [2, 3])
def test_nearest_is_interpolation_where_sizes_divide(factor):
    x = grid(height=6, width=12)
    picture = x.view(2, 6, 12, 3).movedim(-1, 1)
    expected = F.interpolate(picture, scale_factor=1 / factor, mode="nearest-exact" if factor == 1 else "nearest")
    assert torch.equal(fewer(x, 6, 12, factor, "nearest"), expected.flatten(2).movedim(1, 2))


@pytest.mark.parametrize("keep", ["nearest", "mean", "similar"])
def test_odd_sizes_keep_their_border_and_a_constant_stays_one(keep):
    x = torch.full((2, 35, 4), 0.7)
    made = fewer(x, 5, 7, 2, keep)
    assert made.shape == (2, 3 * 4, 4) and torch.allclose(made, x[:, :12])
    assert torch.equal(fewer(x, 5, 7, 1, "nearest"), x)


def test_means_weigh_all_cells_the_same():
    x = grid(height=4, width=4)
    assert torch.allclose(fewer(x, 4, 4, 2, "mean").mean(1), x.mean(1), atol=1e-6)


def test_merging_averages_what_is_alike():
    into = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    out = torch.tensor([[[3.0, 0.1], [0.1, 5.0], [2.0, 0.0]]])
    expected = torch.tensor([[[2.0, 0.1 / 3], [0.05, 3.0]]])
    assert torch.allclose(merged(into, out), expected)


def test_ranking_with_all_queries_is_the_stationary_distribution():
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 12, 4, generator=g, dtype=torch.float64) for _ in range(2))
    a = torch.softmax((q[0, 0].float() @ k[0, 0].float().T) / 2, -1).double()
    s = torch.ones(12, dtype=torch.float64) / 12
    for _ in range(200):
        s = s @ a
    found = importance(q.float(), k.float(), 12)[0].double()
    assert torch.allclose(found / found.sum(), s, atol=2e-3)
    assert not torch.allclose(a.mean(0), s, atol=2e-3)  # one sweep would not do


def test_a_token_that_everyone_attends_to_ranks_first():
    q, k = torch.ones(1, 2, 50, 4), torch.zeros(1, 2, 50, 4)
    k[:, :, 17] = 3.0
    assert int(importance(q, k, 8)[0].argmax()) == 17


def test_tokens_come_back_to_their_places():
    x, scores = grid(), torch.rand(2, 30, generator=torch.Generator().manual_seed(1))
    rest, pruned = prune(x, scores, 0.4)
    assert rest.shape == (2, 18, 3)
    assert float(scores.gather(1, pruned.gone).max(1).values[0]) < float(scores.gather(1, pruned.kept).min(1).values[0])
    assert torch.allclose(pruned.restore(rest), x)  # nothing happened meanwhile
    assert torch.allclose(pruned.restore(rest + 1.0), x + 1.0)
    twin = x.clone()
    twin[:, 5] = 2 * twin[:, 9]  # like token 9 and less important
    low = torch.linspace(1, 2, 30).repeat(2, 1)
    low[:, 5] = 0.0
    rest, pruned = prune(twin, low, 1 / 30)
    moved = rest.clone()
    moved[:, 8] += 7.0  # token 9 among the kept
    assert torch.allclose(pruned.restore(moved)[:, 5], twin[:, 5] + 7.0)


def test_nothing_leaves_where_the_fraction_is_less_than_a_token():
    x = grid()
    rest, pruned = prune(x, torch.rand(2, 30), 0.01)
    assert rest is x and pruned is None


def test_the_budget_follows_the_steps_and_the_window():
    session = ATEDM(ratio=0.4, early_ratio=0.1, early=0.5).start(Run([4.0, 3.0, 2.0, 1.0, 0.0], window=(3.5, 1.5)))
    seen = []
    for t in (4.0, 3.0, 2.0, 1.0):
        with session.call(t):
            seen.append((session.plan, session.left))
    assert seen == [(Plan.PLAIN, 0.1), (Plan.FULL, 0.1), (Plan.FULL, 0.4), (Plan.PLAIN, 0.4)]


def test_off_means_plain():
    for settings in (ToDo(factor=1), ATEDM(ratio=0.0, early_ratio=0.0)):
        session = settings.start(Run([2.0, 1.0, 0.0]))
        with session.call(2.0):
            assert session.plan is Plan.PLAIN
