"""Epsilon scaling, dynamic thresholding and time shift: formulas written out, identities, masks, rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from quickstep_under_test.solvers import region
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP
from quickstep_under_test.solvers.exposure_bias import EpsilonScaling
from quickstep_under_test.solvers.process import RectifiedFlow, VarianceExploding
from quickstep_under_test.solvers.solver import Problem, sample
from quickstep_under_test.solvers.thresholding import DynamicThresholding
from quickstep_under_test.solvers.time_shift import TimeShift
from quickstep_under_test.solvers.transform import Transformed
from quickstep_under_test.solvers.verify import FLOW, VE, measuring_range, start, uniform_lambda

PROCESSES = pytest.mark.parametrize("process", [VE, FLOW], ids=["ve", "flow"])
TRANSFORMS = pytest.mark.parametrize(
    "transform",
    [EpsilonScaling(1.1, 0.05), DynamicThresholding(M=0.3, p=0.9), TimeShift(100, 0)],
    ids=lambda t: t.id,
)
DATA = GaussianMixture.random()


def seen(transform, process, x, t, times=None, mask=None, denoise=None):
    """What a sampler gets in place of D."""
    problem = Problem(denoise or DATA.denoiser(process), process, mask=mask)
    return transform.around(problem, times or [process.t_max, 0.0])(x, t)


def noise_in(process, x, x0, t):
    return (x - process.alpha(t) * x0) / process.sigma(t)


def grid(process, n=6):
    return [*uniform_lambda(process, *measuring_range(process), n), 0.0]


def half(process, x):
    """A mask that edits the first half of the last dimension; x in the kept part is arbitrary, D there known."""
    mask = torch.zeros(1, 1, *x.shape[2:], dtype=x.dtype)
    mask[..., : x.shape[-1] // 2] = 1.0
    kept = torch.full_like(x, 0.7)
    inner = DATA.denoiser(process)
    return mask, kept, lambda y, t: inner(y, t) * mask + kept * (1.0 - mask)


@PROCESSES
@pytest.mark.parametrize(("b", "k"), [(1.01, 0.0), (0.99, 0.0), (1.0, 0.05), (1.02, -0.04)])
def test_epsilon_is_divided(process, b, k):
    """The sample stays alpha D + sigma eps, with eps / lambda for eps."""
    for t in grid(process)[:-1]:
        x = start(process, t)
        u = float(process.u_of_t(t))
        eps = noise_in(process, x, DATA.denoiser(process)(x, t), t)
        got = seen(EpsilonScaling(b, k), process, x, t)
        assert (noise_in(process, x, got, t) - eps / (b + k * u)).abs().max() < 1e-12


def test_published_linear_schedule():
    """The authors' lambda of step i out of N, 0 the last, is b + k i; theirs for 20 steps on LSUN."""
    process = VarianceExploding(0.03, 14.6, training_sigmas=np.geomspace(0.03, 14.6, 1000))
    N, k, b = 20, 0.0008, 1.0034
    mine = EpsilonScaling(b, k * (N - 1))
    for i in (0, 7, N - 1):
        t = float(process.t_of_u(i / (N - 1)))
        x = start(process, t)
        eps = noise_in(process, x, DATA.denoiser(process)(x, t), t)
        assert (noise_in(process, x, seen(mine, process, x, t), t) - eps / (b + k * i)).abs().max() < 1e-12


def test_epsilon_scaling_on_flow_models_is_that_of_their_variance_exploding_image():
    mine = EpsilonScaling(1.03)
    times = grid(FLOW)
    x = start(FLOW, times[0])
    ratios = [t / (1.0 - t) for t in times]
    for solver in (DDIM(), DPMSolverPP()):
        flow = sample(Problem(DATA.denoiser(FLOW), FLOW), Transformed(solver, mine), x, times)
        image = Transformed(solver, mine)
        ve = sample(Problem(DATA.denoiser(VE), VE), image, x / (1.0 - times[0]), ratios)
        assert (flow - ve).abs().max() < 1e-10


def test_core_form_on_flow_models_scales_the_velocity():
    """D - (1 - 1 / b) (D - x), ComfyUI's on every model: the same on variance exploding, another thing on flow."""
    b = 1.05
    for process, same in ((VE, True), (FLOW, False)):
        t = 0.9
        x = start(process, t)
        x0 = DATA.denoiser(process)(x, t)
        difference = seen(EpsilonScaling(b), process, x, t) - (x - (x - x0) / b)
        assert (difference.abs().max() < 1e-12) == same


@pytest.mark.parametrize(("process", "t"), [(VarianceExploding(0.002, 80.0), 51.0), (FLOW, 0.99), (FLOW, 1.0)])
def test_epsilon_is_left_alone_next_to_pure_noise(process, t):
    x = start(process, t)
    expected = DATA.denoiser(process)(x, t)
    assert torch.equal(seen(EpsilonScaling(1.2), process, x, t), expected)


@PROCESSES
def test_nothing_to_do_is_the_sampler_itself(process):
    x = start(process, grid(process)[0])
    expected = sample(Problem(DATA.denoiser(process), process), DPMSolverPP(), x, grid(process))
    for transform in (EpsilonScaling(1.0), DynamicThresholding(M=100.0), TimeShift(0), TimeShift(cutoff=1000)):
        got = sample(Problem(DATA.denoiser(process), process), Transformed(DPMSolverPP(), transform), x, grid(process))
        assert torch.equal(got, expected), transform


@pytest.mark.parametrize("q", [0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("shape", [(3, 1, 2, 2), (2, 4, 9), (2, 3, 5, 4, 4)])
def test_quantile_is_that_of_torch(q, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.quantile(x.flatten(1), q, dim=1)
    assert torch.allclose(region.quantile(x, q).flatten(), expected, atol=1e-14)
    mask = (torch.rand(1, 1, *shape[2:], generator=torch.Generator().manual_seed(2)) > 0.4).double()
    inside = [torch.quantile(row[mask.expand_as(x)[0] > 0], q) for row in x]
    assert torch.allclose(region.quantile(x, q, mask).flatten(), torch.stack(inside), atol=1e-14)
    assert region.quantile(x, q, torch.zeros_like(mask)).isfinite().all()


def test_thresholding_is_diffusers():
    theirs = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=100.0)
    x0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * torch.tensor([0.1, 1.0, 5.0]).view(
        3, 1, 1, 1
    )
    got = seen(DynamicThresholding(M=1.0, p=0.9), VE, x0, 1.0, denoise=lambda x, t: x)
    assert (got - theirs._threshold_sample(x0)).abs().max() < 1e-6


def test_thresholding_keeps_the_scale_of_m_and_what_is_within():
    x0 = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 6.0]).view(
        2, 1, 1, 1
    )
    got = seen(DynamicThresholding(M=5.0), VE, x0, 1.0, denoise=lambda x, t: x)
    assert torch.equal(got[0], x0[0])
    s = torch.quantile(x0[1].abs(), 0.995)
    assert (got[1] - x0[1].clamp(-s, s) * 5.0 / s).abs().max() < 1e-5
    assert got[1].abs().max() <= 5.0 + 1e-5


def test_thresholding_measures_the_edited_part():
    """A source picture of any size in the kept part changes nothing."""
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :4], mask[1, :, :, 5:] = 1.0, 1.0
    edited = mask.expand_as(x0) > 0
    got, other = (
        seen(
            DynamicThresholding(M=0.5, p=0.8), VE, torch.where(edited, x0, kept), 1.0, mask=mask, denoise=lambda x, t: x
        )
        for kept in (0.0, 70.0)
    )
    assert torch.equal(got[edited], other[edited])
    s = torch.quantile(x0[0, :, :4].abs(), 0.8)
    assert (got[0, :, :4] - x0[0, :, :4].clamp(-s, s) * 0.5 / s).abs().max() < 1e-12


def test_thresholding_keeps_half_precision():
    x0 = torch.randn(2, 4, 8, 8).bfloat16()
    assert seen(DynamicThresholding(M=0.5), VE, x0, 1.0, denoise=lambda x, t: x).dtype == torch.bfloat16


@PROCESSES
@TRANSFORMS
def test_the_kept_part_is_left_alone_and_not_measured(transform, process):
    t = grid(process)[2]
    x = start(process, t)
    mask, kept, denoise = half(process, x)
    got = seen(transform, process, x, t, mask=mask, denoise=denoise)
    edited = mask.expand_as(x) > 0
    assert torch.allclose(got[~edited], kept[~edited], atol=1e-15)
    assert not torch.equal(got[edited], denoise(x, t)[edited])
    elsewhere = denoise_of_edited_only(process, x, mask, kept)
    other = torch.where(edited, x, 9.0)
    again = seen(transform, process, other, t, mask=mask, denoise=elsewhere)
    assert (again - seen(transform, process, x, t, mask=mask, denoise=elsewhere))[edited].abs().max() < 1e-12


def denoise_of_edited_only(process, x, mask, kept):
    """As in ComfyUI: the kept part of the input is replaced before the network sees it."""
    inner = DATA.denoiser(process)
    return lambda y, t: inner(y * mask + kept * (1.0 - mask), t) * mask + kept * (1.0 - mask)


@PROCESSES
@TRANSFORMS
def test_a_time_for_each_row(transform, process):
    """Samplers with step sizes of their own per row ask with a sequence of times."""
    times = grid(process)[1:4]
    x = torch.cat([start(process, t, n=1, seed=i) for i, t in enumerate(times)])
    together = seen(transform, process, x, times)
    alone = torch.cat([seen(transform, process, row[None], t) for row, t in zip(x, times, strict=True)])
    assert (together - alone).abs().max() < 1e-12


STEPPED = VarianceExploding(0.03, 14.6, training_sigmas=np.geomspace(0.03, 14.6, 1001))
STEPPED_FLOW = RectifiedFlow(t_min=0.001, training_sigmas=np.linspace(0.001, 1.0, 1001))
STEPPED_PROCESSES = pytest.mark.parametrize("process", [STEPPED, STEPPED_FLOW], ids=["ve", "flow"])


class Asked:
    """A network that always predicts m, and remembers when it was asked and at what."""

    def __init__(self, m=0.3):
        self.m, self.calls = m, []

    def __call__(self, x, t):
        self.calls.append((x, t))
        return torch.full_like(x, self.m)


@STEPPED_PROCESSES
@pytest.mark.parametrize("steps", [-12, 0, 7])
def test_time_shift_finds_the_level_of_the_noise(process, steps):
    """A sample made at another time and scaled to this one is seen by the network as what it is."""
    t, tau = (float(process.t_of_u(0.6 + d / 1000)) for d in (0, steps))
    z = torch.randn(1, 4, 200, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = (z - z.mean()) / z.var(correction=0).sqrt()
    made = process.alpha(tau) * 0.3 + tau * z
    scale = math.hypot(process.alpha(t), t) / math.hypot(process.alpha(tau), tau)
    network = Asked()
    got = seen(TimeShift(30), process, made * scale, t, denoise=network)
    ((x, at),) = network.calls
    assert at == pytest.approx(tau, rel=1e-9)
    assert (x - made).abs().max() < 1e-9
    assert (noise_in(process, made * scale, got, t) - z).abs().max() < 1e-9


@STEPPED_PROCESSES
@pytest.mark.parametrize("data_variance", [0.0, 0.25])
def test_time_shift_written_out(process, data_variance):
    """Variance-preserving, in training steps, row by row: V = 1 - abar, plus abar times the variance of the data."""
    i = 620
    t = float(process.t_of_u(i / 1000))
    levels = np.arange(i - 20, i + 21)
    sigma = process.t_of_u(levels / 1000)
    abar = np.array([process.alpha(s) for s in sigma]) ** 2
    abar = abar / (abar + sigma**2)
    V = 1 - abar + abar * data_variance
    wanted = [2, 15, 20, 31, 40]
    z = torch.randn(5, 1, 30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = (z - z.mean((1, 2, 3), keepdim=True)) / z.var((1, 2, 3), correction=0, keepdim=True).sqrt()
    x = z * torch.tensor(V[wanted]).sqrt().view(5, 1, 1, 1) * math.hypot(process.alpha(t), t) + 0.2
    network = Asked()
    seen(TimeShift(40, 300, data_variance), process, x, t, denoise=network)
    assert network.calls[0][1] == pytest.approx(sigma[wanted].tolist(), rel=1e-9)


@STEPPED_PROCESSES
def test_time_shift_takes_the_end_of_the_window_if_need_be_and_one_call(process):
    t = float(process.t_of_u(0.6))
    network = Asked()
    seen(TimeShift(40), process, torch.full((2, 1, 4, 4), 0.3, dtype=torch.float64), t, denoise=network)
    ((_, at),) = network.calls
    assert at == pytest.approx(float(process.t_of_u(0.58)))
    times = [*(float(process.t_of_u(u)) for u in (0.9, 0.8, 0.5, 0.4)), 0.0]
    sample(Problem(network, process), Transformed(DDIM(), TimeShift()), start(process, times[0]), times)
    assert len(network.calls) - 1 == DDIM().nfe(4)


@STEPPED_PROCESSES
def test_time_shift_neither_at_the_start_nor_below_the_cutoff(process):
    times = [float(process.t_of_u(u)) for u in (0.9, 0.8, 0.5, 0.29)] + [0.0]
    network = Asked()
    x = 3.0 * start(process, times[0])
    sample(Problem(network, process), Transformed(DDIM(), TimeShift(50, 300)), x, times)
    shifted = [at != t for (_, at), t in zip(network.calls, times, strict=False)]
    assert shifted == [False, True, True, False]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: EpsilonScaling(b=0.0), "b = 0.0 must lie between"),
        (lambda: DynamicThresholding(p=1.5), "p = 1.5 must lie between"),
        (lambda: TimeShift(data_variance=1.0), "data_variance = 1.0 must lie between"),
        (lambda: TimeShift(window=-1), "window = -1 must lie between"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
