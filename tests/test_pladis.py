"""Sparse attention against what defines it."""

import pytest
import torch
from quickstep_under_test.solvers.caching import pladis
from quickstep_under_test.solvers.caching.accelerator import Plan, Run
from quickstep_under_test.solvers.caching.pladis import PLADIS, entmax15, sparse_attention, sparsemax


def scores(*shape, seed=0, spread=2.0):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("sparse", "alpha"), [(sparsemax, 2.0), (entmax15, 1.5)])
def test_it_is_the_entmax_of_its_alpha(sparse, alpha):
    """p = ((alpha - 1) s - tau)_+^{1/(alpha - 1)} for the one tau with which it sums to 1, found here by bisection."""
    s = scores(50, 17)
    low, high = (alpha - 1) * s.amax(-1, keepdim=True) - 1, (alpha - 1) * s.amax(-1, keepdim=True)
    for _ in range(80):
        tau = (low + high) / 2
        over = (((alpha - 1) * s - tau).clamp(min=0) ** (1 / (alpha - 1))).sum(-1, keepdim=True) > 1
        low, high = torch.where(over, tau, low), torch.where(over, high, tau)
    expected = ((alpha - 1) * s - tau).clamp(min=0) ** (1 / (alpha - 1))
    assert torch.allclose(sparse(s), expected, atol=1e-9)
    assert torch.allclose(sparse(s).sum(-1), torch.ones(50, dtype=torch.float64))
    assert 0.2 < float((sparse(s) == 0).double().mean()) < 1.0


@pytest.mark.parametrize("sparse", [sparsemax, entmax15])
def test_masked_scores_are_as_if_they_were_not_there(sparse):
    s = scores(20, 12)
    masked = s.clone()
    masked[:, 7:] = -torch.inf
    made = sparse(masked)
    assert torch.allclose(made[:, :7], sparse(s[:, :7])) and not made[:, 7:].any()
    assert sparse(torch.full((1, 5), -torch.inf)).isfinite().all()
    far = torch.cat([s[:, :7], s[:, :1] - 1e9], -1)
    assert torch.allclose(sparse(far)[:, :7], sparse(s[:, :7]))


@pytest.mark.parametrize("sparse", [sparsemax, entmax15])
def test_single_equal_and_huge_scores(sparse):
    assert torch.equal(sparse(torch.tensor([[3.0]])), torch.ones(1, 1))
    assert torch.allclose(sparse(torch.full((2, 8), 5.0)), torch.full((2, 8), 0.125))
    assert torch.equal(sparse(torch.tensor([[1e30, 0.0]])), torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("mask", [None, "bool", "added", "queries"])
def test_attention_in_slices_is_attention(mask, monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, generator=g) for n in (10, 7, 7))
    allowed = torch.rand(2, 1, 10 if mask == "queries" else 1, 7, generator=g) > 0.3
    allowed[..., 0] = True
    added = torch.where(allowed, 0.0, -torch.inf)
    given = {None: None, "bool": allowed, "added": added[:, 0], "queries": added}[mask]
    s = q @ k.transpose(-1, -2) / 2
    expected = entmax15(s if mask is None else s + added) @ v
    assert torch.allclose(sparse_attention(q, k, v, "1.5", given), expected, atol=1e-6)
    monkeypatch.setattr(pladis, "SLICE", 2 * 3 * 7 * 3)
    assert torch.allclose(sparse_attention(q, k, v, "1.5", given), expected, atol=1e-6)


def test_lam_0_and_outside_the_window_is_plain():
    for settings, window in ((PLADIS(lam=0.0), (10.0, 0.0)), (PLADIS(), (0.5, 0.1))):
        session = settings.start(Run([2.0, 1.0, 0.0], window=window))
        with session.call(2.0):
            assert session.plan is Plan.PLAIN
