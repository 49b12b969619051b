"""Statistics of a model or of pictures, on problems whose answer is known: what is measured, and what its use gains."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from quickstep_under_test.solvers.artifact import Artifact, load, save
from quickstep_under_test.solvers.calibration import exposure, gaussian, score_mean
from quickstep_under_test.solvers.calibration.cohort import Cohort, drained
from quickstep_under_test.solvers.calibration.exposure import FoundEpsilonScaling
from quickstep_under_test.solvers.calibration.families import Plan
from quickstep_under_test.solvers.calibration.gaussian import GaussianStatistics
from quickstep_under_test.solvers.calibration.score_mean import ScoreMean
from quickstep_under_test.solvers.calibration.statistics import Part, compared, drawn, levels, over
from quickstep_under_test.solvers.dpm_solver_v3 import DPMSolverV3
from quickstep_under_test.solvers.ems import ModelStatistics
from quickstep_under_test.solvers.ems_estimate import estimate
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP
from quickstep_under_test.solvers.process import RectifiedFlow, VarianceExploding
from quickstep_under_test.solvers.solver import Problem, sample
from quickstep_under_test.solvers.transform import Transformed
from scipy.fft import dctn, idctn

K_MAX, K_MIN = 14.6, 0.02
VE = VarianceExploding(t_min=K_MIN, t_max=K_MAX)
FLOW = RectifiedFlow(t_min=K_MIN / (1 + K_MIN), t_max=K_MAX / (1 + K_MAX))
NOISE = RectifiedFlow(t_min=0.003, t_max=1.0)  # from pure noise on
PROCESSES = pytest.mark.parametrize("process", [VE, FLOW], ids=["ve", "flow"])
MEANS = torch.from_numpy(np.random.default_rng(1).standard_normal((12, 16)) * 0.9)


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def bench() -> GaussianMixture:
    """The spec's: 12 components of std 0.15 in 16 dimensions."""
    one = torch.full((12,), 1.0 / 12.0, dtype=torch.float64)
    v = torch.full((12, 16), 0.15**2, dtype=torch.float64)
    return GaussianMixture(one, MEANS, v, torch.eye(16).double().expand(12, 16, 16))


MIXTURE = bench()


def pictures(count: int, seed: int = 7) -> torch.Tensor:
    """Samples of the mixture."""
    g = torch.Generator().manual_seed(seed)
    k = torch.randint(12, (count,), generator=g)
    return (MEANS[k] + 0.15 * torch.randn(count, 16, generator=g, dtype=torch.float64)).reshape(count, 1, 4, 4)


def problem(process, data=MIXTURE, change=None) -> Problem:
    exact = data.denoiser(process)
    return Problem(exact if change is None else lambda x, t: change(exact(x, t), t), process)


def batch(posed: Problem, rows: int, seed: int = 3):
    """Starts at t_max, the same for both processes."""
    process = posed.process
    z = torch.randn(rows, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = z * (1.0 if process.alpha(process.t_max) == 0.0 else K_MAX * process.alpha(process.t_max))
    return lambda visit: visit(posed, x)


def times(process, n: int) -> list[float]:
    """Uniform in log-SNR, from K_MAX to K_MIN."""
    return [float(process.t_of_rho(k)) for k in np.geomspace(K_MAX, K_MIN, n + 1)]


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).square().mean(1).sqrt()


# What they are measured on


@pytest.mark.parametrize("process", [VE, FLOW, NOISE], ids=["ve", "flow", "pure noise"])
def test_levels_are_inside_of_what_the_model_knows(process):
    lam = levels(process, 5, 0.1)
    assert lam[0] == pytest.approx(-np.log(50.0 if process is NOISE else K_MAX) + 0.1)
    assert lam[-1] == pytest.approx(process.lam(process.t_min) - 0.1) and np.allclose(np.diff(lam, 2), 0.0)


def test_between_levels_values_are_linear_and_beyond_constant():
    values = np.array([[1.0, 2.0], [3.0, 2.0], [3.0, 8.0]])
    assert np.allclose([over([0.0, 1.0, 3.0], values, at) for at in (-9.0, 0.25, 1.0, 2.0, 9.0)],
                       [[1, 2], [1.5, 2], [3, 2], [3, 5], [3, 8]])  # fmt: skip


@PROCESSES
def test_parts_are_what_the_model_makes_and_noise_depends_on_the_seed_alone(process):
    posed = problem(process)
    parts = drained(drawn([batch(posed, 3), batch(posed, 2, 4)], process, 40))
    assert [len(part.x0) for part in parts] == [3, 2]
    near = (torch.cat([p.x0 for p in parts]).reshape(5, 1, 16) - MEANS).square().mean(-1).min(1).values
    assert near.max() < 0.15
    start = torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    noised = [parts[0].noised(process, start, process.t_of_lam(lam), 9) for lam in (-1.0, 2.0)]
    eps = [(x - process.alpha(t) * parts[0].x0) / process.sigma(t)
           for x, t in zip(noised, map(process.t_of_lam, (-1.0, 2.0)), strict=True)]  # fmt: skip
    assert torch.allclose(*eps, atol=1e-12) and 0.8 < eps[0].std() < 1.2
    before, after = drained(compared(Cohort([batch(posed, 4)]), process, [
        _plan(DDIM(), process), _plan(DPMSolverPP(), process)]))  # fmt: skip
    assert before.shape == (4,) and after.median() < before.median()


def _plan(solver, process):
    return Plan(solver, [*times(process, 8), 0.0])


# DPM-Solver-v3's


def measured(process, count: int, nodes: int, *kind: str, data=MIXTURE, x0=None) -> ModelStatistics:
    posed = problem(process, data)
    clean = pictures(count) if x0 is None else x0
    parts = [Part(lambda visit, rows=rows: visit(posed, rows), rows) for rows in clean.split(50)]
    *_, last = estimate(parts, process, levels(process, nodes, 0.1), *kind)
    return last.statistics


def test_a_few_thousand_calls_of_economy_gain_what_the_paper_form_does():
    """Spec 11.1, 6: root mean square error over 400 samples against 2M, 5, 8, 10, 20 steps."""
    posed = problem(VE)
    x = K_MAX * torch.randn(400, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = sample(posed, DPMSolverPP(order=3, third_order="exact", lower_order_final="never"), x, times(VE, 100))
    gained = {}
    for name, statistics in (
        ("economy", measured(VE, 64, 20, "scalar", "full")),
        ("full", measured(VE, 512, 20, "full")),
    ):
        solver = DPMSolverV3(statistics=statistics, lower_order_final="never")
        for steps in (5, 8, 10, 20):
            off = [
                (sample(posed, s, x, times(VE, steps)) - exact).square().mean().sqrt() for s in (DPMSolverPP(), solver)
            ]
            gained[name, steps] = float(off[1] / off[0])
    for steps, most in ((5, 0.72), (8, 0.8), (10, 0.85), (20, 0.7)):
        assert gained["economy", steps] < most and gained["full", steps] < most, gained


def test_statistics_of_flow_models_are_those_of_their_variance_exploding_image():
    one, two = (measured(process, 20, 7, "scalar", "full") for process in (VE, FLOW))
    for a, b in ((one.l, two.l), (one.s, two.s), (one.b, two.b)):
        assert torch.allclose(a, b, atol=1e-6), (a - b).abs().max()


@PROCESSES
@pytest.mark.parametrize("kind", [("scalar", "channel"), ("scalar", "full"), ("channel",), ("full",)])
def test_statistics_of_one_point_know_everything(kind, process):
    """Identical pictures: D is the point, so that l = 1 and s, which has nothing to explain, is 0."""
    data = GaussianMixture.gaussian(0.4, 0.0, d=16)
    found = measured(process, 0, 5, *kind, data=data, x0=torch.full((3, 1, 4, 4), 0.4, dtype=torch.float64))
    assert (found.l - 1.0).abs().max() < 1e-9 and found.s.abs().max() < 1e-6 and found.b.abs().max() < 1e-6
    shapes = {"scalar": (), "channel": (1, 1, 1), "full": (1, 4, 4)}
    assert found.l.shape[1:] == shapes[kind[0]] and found.b.shape[1:] == shapes[kind[-1]]
    x = process.sigma(process.t_max) * torch.randn(2, 1, 4, 4, dtype=torch.float64)
    made = sample(problem(process, data), DPMSolverV3(statistics=found), x, [process.t_max, 0.0])  # one step
    assert (made - 0.4).abs().max() < 1e-9


def test_where_one_gaussian_leaves_nothing_to_explain_rounding_does_not_choose_s():
    """f is a function of lambda alone; in single precision it varies a little, and its slope about that would be anything."""
    exact = GaussianMixture.gaussian(0.5, 0.5, 16).denoiser(VE)
    x0 = 0.5 + 0.5**0.5 * torch.randn(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    rounded = Problem(lambda x, t: exact(x.double(), t).float(), VE)
    *_, last = estimate([Part(lambda visit: visit(rounded, x0), x0)], VE, levels(VE, 12, 0.1), "scalar", "full")
    assert last.statistics.s.abs().max() < 0.05


def test_statistics_are_constant_beyond_their_levels():
    statistics = ModelStatistics(
        torch.tensor([-1.0, 0.0, 1.0]), *torch.tensor([[0.9, 0.5, 0.1], [0.0, -0.3, -1.0], [0.2, 0.1, 0.3]])
    )
    for beyond, node in ((-9.0, 0), (9.0, 2)):
        got = [float(v[0]) for v in statistics.at(np.array([beyond]))]
        assert got == pytest.approx([float(v[node]) for v in (statistics.l, statistics.s, statistics.b)])


def test_numbers_beside_a_finer_b_are_the_same_numbers_for_every_element():
    g = torch.Generator().manual_seed(1)
    lam, l, s = torch.linspace(-3.0, 3.0, 5), *torch.rand(2, 5, generator=g)  # noqa: E741
    b = torch.rand(5, 1, 4, 4, generator=g)
    wide = [v.reshape(5, 1, 1, 1).expand(5, 1, 4, 4) for v in (l, s)]
    x = K_MAX * torch.randn(2, 1, 4, 4, generator=g, dtype=torch.float64)
    ends = [
        sample(problem(VE), DPMSolverV3(order=3, statistics=ModelStatistics(lam, *two, b)), x, [*times(VE, 5), 0.0])
        for two in ((l, s), wide)
    ]
    assert (ends[0] - ends[1]).abs().max() < 1e-12


# Score mean


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x.flatten(1), y.flatten(1)
    return float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean())


def biased(process, size=0.4):
    """The mixture, whose mean is predicted wrongly, more so in noise."""
    off = torch.from_numpy(np.random.default_rng(5).standard_normal(16).reshape(1, 4, 4)) * size
    return problem(process, change=lambda x0, t: x0 + off * process.rho(t)[0] / (1.0 + process.rho(t)[0]))


def mean_error(posed: Problem, reduce="full", x0=None, nodes=12) -> Artifact:
    clean = pictures(1000) if x0 is None else x0
    parts = [Part(batch(posed, len(rows)), rows) for rows in clean.split(251)]  # odd ones: halves differ in size
    lam = levels(posed.process, nodes)
    eta = drained(score_mean.measure(parts, posed.process, lam, reduce))
    return Artifact(score_mean.KIND, {}, {"lam": torch.tensor(lam), "eta": eta})


@PROCESSES
def test_a_mean_error_is_measured_and_taken_off(process):
    """Spec 11.1, 8: the energy distance to the data falls to a twentieth or less."""
    posed = biased(process)
    solver = Transformed(DPMSolverPP(), ScoreMean(calibration=mean_error(posed)))
    z = torch.randn(500, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, data = z * K_MAX * process.alpha(process.t_max), pictures(2000, 1)
    ends = [sample(posed, s, x, [*times(process, 16), 0.0]) for s in (DPMSolverPP(), solver)]
    exact = sample(problem(process), DPMSolverPP(), x, [*times(process, 16), 0.0])
    floor = energy_distance(exact, data)
    off, left = (energy_distance(end, data) - floor for end in ends)
    assert off > 20.0 * max(left, 0.0) and off > 0.03


def test_without_an_error_none_is_found_and_what_chance_makes_is_shrunk():
    found = mean_error(problem(VE)).tensors["eta"]
    lam, posed = levels(VE, 12), problem(VE)
    plain = torch.stack([(pictures(1000) - posed.denoise(
        Part(batch(posed, 1), pictures(1000)).noised(VE, pictures(1000), VE.t_of_lam(at), 0), VE.t_of_lam(at))).mean(0)
        for at in lam])  # fmt: skip
    assert found.square().sum() < 0.5 * plain.square().sum()
    alone = [Part(batch(biased(VE), 1), row) for row in pictures(60).split(1)]  # batches of one: both halves get some
    assert drained(score_mean.measure(alone, VE, levels(VE, 2), "full"))[0].abs().mean() > 0.1
    for few in (pictures(1), pictures(1).expand(5, 1, 4, 4)):  # one picture; five times the same
        assert mean_error(problem(VE), x0=few).tensors["eta"].isfinite().all()
    assert not mean_error(problem(VE), x0=pictures(1)).tensors["eta"].any()


def test_means_per_channel_serve_any_size_and_others_are_refused():
    eta = mean_error(biased(VE), "channel").tensors["eta"]
    assert eta.shape == (12, 1, 1, 1)
    x = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    made = ScoreMean(2.0, Artifact(score_mean.KIND, {}, {"lam": torch.tensor([-1.0, 1.0]), "eta": torch.tensor([0.5, 0.7])
        .reshape(2, 1, 1, 1)})).around(problem(VE, change=lambda x0, t: 0.0 * x0), [])  # fmt: skip
    assert torch.allclose(made(x, 1.0), x + 1.2)
    rows = made(x, [np.e, 1e-9])
    assert torch.allclose(rows[0], x[0] + 1.0) and torch.allclose(rows[1], x[1] + 1.4)
    wrong = ScoreMean(calibration=mean_error(problem(VE))).around(problem(VE), [])
    with pytest.raises(ValueError, match=r"for latents of shape \(1, 4, 4\), but this one has the shape \(1, 5, 4\)"):
        wrong(torch.zeros(2, 1, 5, 4), 1.0)


def test_no_file_or_no_strength_is_the_network_itself():
    posed = problem(VE)
    for made in (ScoreMean(), ScoreMean(0.0, mean_error(biased(VE)))):
        assert made.around(posed, []) is posed.denoise
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    assert torch.equal(FoundEpsilonScaling().around(posed, [])(x, 1.0), posed.denoise(x, 1.0))


# Exposure bias


def exposed(process, steps=8, data=MIXTURE, change=None, rows=10):
    posed = problem(process, data, change)
    cohorts = [Cohort([batch(posed, rows, seed), batch(posed, 3, seed + 1)]) for seed in (1, 11, 21)]
    plan = Plan(DDIM(), [*times(process, steps), 0.0])
    plan.times[0] = process.t_max
    return drained(exposure.search(*cohorts, process, plan, 80))


def test_norms_of_a_gaussians_exact_network_are_known():
    """x of variance k^2 + c^2 has E|eps| = sqrt(d) k sqrt(k^2 + c^2) / (k^2 + c^2); Euler's x has another variance."""
    c, d = 0.5, 16
    posed = problem(VE, GaussianMixture.gaussian(0.0, c * c, d))
    grid = [*times(VE, 5), 0.0]
    x0 = c * torch.randn(4000, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = drained(exposure.norms([Part(batch(posed, 4000), x0)], VE, Plan(DDIM(), grid)))
    assert found.times == grid[:-1]
    var = K_MAX**2
    for t, s, ratio in zip(found.times, grid[1:], found.ratio, strict=True):
        assert ratio == pytest.approx((var / (t * t + c * c)) ** 0.5, rel=0.02)
        var *= ((t * s + c * c) / (t * t + c * c)) ** 2


def test_factors_and_samples_of_flow_models_are_those_of_their_variance_exploding_image():
    """Spec 11.1, 9."""
    one, two = exposed(VE), exposed(FLOW)
    assert np.allclose(one.norms.ratio, two.norms.ratio, atol=1e-6) and one.label == two.label
    for name, value in one.tried.items():
        assert value == pytest.approx(two.tried[name], abs=1e-6)
    factors = [made.scaling.calibration.table["factor"] for made in (one, two)]
    assert np.allclose(*factors, atol=1e-9)


def test_too_much_noise_is_found_and_scaled_back():
    """A network that predicts 3 % too much noise on the states of the short run, here at its times: the teacher's are others."""
    exact, asked = GaussianMixture.gaussian(0.3, 0.25, 16), set(times(VE, 13)[1:-1])

    def too_much(process):
        denoise = exact.denoiser(process)
        return lambda x, t: (x0 := denoise(x, t)) - (0.03 * (x - x0) if t in asked else 0.0)

    found = exposed(VE, 13, SimpleNamespace(denoiser=too_much))
    assert found.label != "none" and found.tried[found.label] == min(found.tried.values())
    assert min(found.scaling.calibration.table["factor"]) > 1.0
    assert float(found.after.mean()) < float(found.before.mean())


def test_the_run_whose_noise_is_measured_knows_its_mask_and_its_guidance_scale():
    seen = []

    class Seeing(DDIM):
        def step(self, posed, *rest):
            seen.append((posed.mask, posed.cfg))
            return super().step(posed, *rest)

    mask = torch.ones(1, 1, 4, 4)
    posed = replace(problem(VE), mask=mask, cfg=4.0)
    x0 = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    drained(exposure.norms([Part(batch(posed, 2), x0)], VE, Plan(Seeing(), [*times(VE, 2), 0.0])))
    assert len(seen) == 3 and all(one is mask and cfg == 4.0 for one, cfg in seen)


def test_only_what_helps_is_kept():
    """One point: every run ends there, and no factor is better than none."""
    found = exposed(VE, 3, GaussianMixture.gaussian(0.4, 0.0, 16), rows=2)
    assert found.label == "none" and torch.equal(found.before, found.after)
    assert set(found.scaling.calibration.table["factor"]) == {1.0}
    assert exposed(NOISE, 1, rows=2).label == "none"  # one step, from pure noise: nothing to measure


# Gaussians


def correlated(count: int, seed=0, size=(6, 5), channels=2, mean=0.4):
    """Samples of a random Gaussian, with its mean and covariance."""
    d = channels * size[0] * size[1]
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(d, d, generator=g, dtype=torch.float64) / d**0.5
    m = mean + torch.randn(d, generator=g, dtype=torch.float64)
    x = m + torch.randn(count, d, generator=g, dtype=torch.float64) @ A.T
    return x.reshape(count, channels, *size), m, A @ A.T


@pytest.mark.parametrize("process", [VE, FLOW, NOISE], ids=["ve", "flow", "pure noise"])
def test_jumps_are_the_ode_of_gaussian_data(process):
    """Any covariance, of full rank: against the equation solved numerically. And two jumps are one."""
    x0, *_ = correlated(400, size=(2, 3))
    statistics = GaussianStatistics.measured(x0, 16, 12)
    flat = x0.reshape(400, -1)
    v, Q = torch.linalg.eigh(torch.cov(flat.T))
    one = torch.ones(1, dtype=torch.float64)
    data = GaussianMixture(one, flat.mean(0)[None], v[None], Q[None])
    s, t = (process.t_max, float(process.t_of_rho(0.7)))
    x = process.sigma(s) * torch.randn(3, 2, 2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = statistics.jump(process, x, s, t)
    assert (got - data.solve_ode(process, x, s, t)).abs().max() < 1e-7
    between = float(process.t_of_rho(2.0))
    again = statistics.jump(process, statistics.jump(process, x, s, between), between, t)
    assert (again - got).abs().max() < 1e-9


def test_jumps_of_flow_models_are_those_of_their_variance_exploding_image():
    x0, *_ = correlated(20)
    statistics = GaussianStatistics.measured(x0, 3, 4)
    x = K_MAX * torch.randn(2, 2, 6, 5, dtype=torch.float64)
    a = FLOW.alpha(FLOW.t_max)
    t = float(FLOW.t_of_rho(3.0))
    flow = statistics.jump(FLOW, a * x, FLOW.t_max, t) / FLOW.alpha(t)
    assert (flow - statistics.jump(VE, x, K_MAX, 3.0)).abs().max() < 1e-9


def test_a_low_rank_is_the_whole_where_the_other_directions_are_alike():
    g = torch.Generator().manual_seed(3)
    v = torch.tensor([9.0, 4.0] + [0.25] * 10, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(12, 12, generator=g, dtype=torch.float64)).Q
    white = torch.linalg.qr(torch.cat([torch.ones(40, 1), torch.randn(40, 12, generator=g)], 1).double()).Q[:, 1:]
    x0 = (40.0 - 1.0) ** 0.5 * white * v.sqrt() @ Q.T + 1.0  # whose covariance is exactly that
    low, full = (GaussianStatistics.measured(x0.reshape(40, 1, 3, 4), 9, rank) for rank in (2, 12))
    x = K_MAX * torch.randn(5, 1, 3, 4, generator=g, dtype=torch.float64)
    assert len(low.eig) == 2
    assert (low.jump(VE, x, K_MAX, 1.0) - full.jump(VE, x, K_MAX, 1.0)).abs().max() < 1e-9


def test_teleport_errors_of_the_bench_mixture():
    """Error of the state relative to its size: full covariance, one variance, and scaling the noise alone."""
    x = K_MAX * torch.randn(400, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cut = [8.0, 4.0, 2.0, 1.0]
    trail = [x]
    for s, t in zip([K_MAX, *cut], cut, strict=False):
        grid = np.geomspace(s, t, 80).tolist()
        solver = DPMSolverPP(order=3, third_order="exact", lower_order_final="never")
        trail.append(sample(problem(VE), solver, trail[-1], grid))
    many = pictures(40000, 3)
    full = GaussianStatistics.measured(many, 16, 16)
    flat = GaussianStatistics(
        full.mean, np.full_like(full.mean, many.var(0).mean()), full.U[:0], full.eig[:0], full.tail, (4, 4)
    )
    wanted = ((0.0008, 0.0039, 0.0129), (0.0073, 0.0208, 0.0461), (0.0484, 0.0853, 0.135), (0.209, 0.275, 0.348))
    for t, exact, errors in zip(cut, trail[1:], wanted, strict=True):
        ends = (full.jump(VE, x, K_MAX, t), flat.jump(VE, x, K_MAX, t), x * t / K_MAX)
        got = [float((rms(end - exact) / rms(exact)).mean()) for end in ends]
        assert got == pytest.approx(errors, rel=0.1), t


def test_few_samples_one_sample_and_equal_ones():
    for x0 in (torch.full((1, 2, 4, 4), 0.3), torch.full((5, 2, 4, 4), 0.3)):
        for rank in (0, 9):
            statistics = GaussianStatistics.measured(x0, 4, rank)
            x = K_MAX * torch.randn(2, 2, 4, 4, dtype=torch.float64)
            assert (statistics.jump(VE, x, K_MAX, 1.0) - (0.3 + (x - 0.3) / K_MAX)).abs().max() < 1e-6
            assert torch.allclose(statistics.draw(x), torch.tensor(0.3, dtype=torch.float64), atol=1e-6)
    x0, *_ = correlated(3)
    assert len(GaussianStatistics.measured(x0, 4, 50).eig) == 1


def test_drawn_samples_have_the_mean_and_covariance():
    x0, m, C = correlated(20000, size=(3, 3), channels=1)
    for rank in (0, 9):
        made = (
            GaussianStatistics.measured(x0, 3, rank).draw(torch.randn(20000, 1, 3, 3, dtype=torch.float64)).flatten(1)
        )
        assert (made.mean(0) - m).abs().max() < 0.06
        if rank:
            assert (torch.cov(made.T) - C).abs().max() < 0.15
        assert abs(torch.cov(made.T).trace() - C.trace()) < 0.05 * C.trace()


def test_statistics_at_another_size_are_those_of_the_same_pictures_there():
    """Smooth pictures, twice as large: low frequencies carry over, so that means and variances of pixels are the same."""
    g = torch.Generator().manual_seed(0)
    c = np.zeros((500, 1, 8, 8))
    c[:, :, :3, :3] = 3.0 * torch.randn(500, 1, 3, 3, generator=g).numpy() + 2.0
    small = torch.from_numpy(idctn(c, axes=(2, 3), norm="ortho")) + 0.1 * torch.randn(500, 1, 8, 8, generator=g)
    for rank in (0, 9):
        statistics = GaussianStatistics.measured(small, 3, rank)
        made = [statistics.draw(torch.randn(500, 1, n, n, generator=g, dtype=torch.float64)) for n in (8, 16)]
        assert made[0].mean() == pytest.approx(float(made[1].mean()), abs=0.05)
        for x in made:
            assert dctn(x.numpy(), axes=(2, 3), norm="ortho")[:, :, 3:, 3:].var() == pytest.approx(0.01, rel=0.1)
        coarse = torch.nn.functional.avg_pool2d(made[1], 2)
        assert coarse.var(0).mean() == pytest.approx(float(made[0].var(0).mean()), rel=0.1)
        assert made[0].var(0).mean() == pytest.approx(float(small.var(0).mean()), rel=0.1)
    with pytest.raises(ValueError, match="too many for a latent of"):
        statistics.at((2, 8))
    with pytest.raises(ValueError, match="are of 1 channels, and this latent has 3"):
        statistics.draw(torch.zeros(1, 3, 8, 8))


def test_gaussian_statistics_survive_a_file(tmp_path):
    x0, *_ = correlated(20)
    for rank in (0, 4):
        statistics = GaussianStatistics.measured(x0, 3, rank)
        file = tmp_path / f"{rank}.safetensors"
        save(file, Artifact(gaussian.KIND, tensors=statistics.tensors()))
        back = GaussianStatistics.of(load(file, gaussian.KIND))
        x = torch.randn(2, 2, 6, 5, dtype=torch.float64)
        assert back.size == (6, 5) and torch.equal(back.draw(x), statistics.draw(x))
    with pytest.raises(ValueError, match="it has no mean, var"):
        GaussianStatistics.of(Artifact(gaussian.KIND))
