"""The laws every solver of the library keeps, on variance-exploding and flow models. Float64, no ComfyUI.

A solver joins by a ``Variant`` in ``tests/library/<family>.py``. What a variant is exempt from, it says why.
"""

from __future__ import annotations

import pytest
import torch
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.noise import gaussian
from quickstep_under_test.solvers.solver import Problem, sample, solve
from quickstep_under_test.solvers.verify import (
    FLOW,
    VE,
    graded,
    measured_order,
    measured_weak_order,
    measuring_range,
    moments_of_run,
    start,
    uniform_lambda,
)

from .library import variants

LAWS = ("order", "point mass", "mean", "marginal", "rows", "clean end", "meta", "calls")
PROCESSES = [pytest.param(VE, id="ve"), pytest.param(FLOW, id="flow")]
ALL = variants()
DATA = GaussianMixture.random()


def under(law: str, which=lambda variant: True):
    """The variants a law is for, each on both processes."""
    chosen = [v for v in ALL if v.holds(law) and which(v)]

    def decorate(test):
        test = pytest.mark.parametrize("variant", chosen, ids=str)(test)
        return pytest.mark.parametrize("process", PROCESSES)(test)

    return decorate


def deterministic(variant) -> bool:
    return not variant.solver.stochastic


def stochastic(variant) -> bool:
    return variant.solver.stochastic


def problem(process, data=DATA, x=None) -> Problem:
    return Problem(data.denoiser(process), process, gaussian(start(process, 1.0) if x is None else x, 3))


def top(process) -> float:
    """Where sampling starts: pure noise."""
    return 1.0 if process is FLOW else process.t_max


def test_exemptions_name_laws():
    for variant in ALL:
        assert all(law in LAWS and len(why) > 10 for law, why in variant.exempt), variant


@under("order")
def test_order_of_convergence(variant, process):
    expected = variant.solver.convergence_order if variant.order is None else variant.order
    if variant.solver.stochastic:
        order = measured_weak_order(variant.solver, process)
    else:
        order = measured_order(variant.solver, process, graded)
    assert abs(order - expected) <= 0.25, order


@under("point mass", deterministic)
def test_constant_predictions_are_solved_exactly(variant, process):
    """x_t = alpha_t m + (sigma_t / sigma_s) (x_s - alpha_s m), on any grid."""
    t_max, t_min = measuring_range(process)
    x = start(process, t_max)
    times = [t_max, 0.9 * t_max, 0.33 * t_max, 0.32 * t_max, 0.2 * t_max, t_min]
    got = sample(problem(process, GaussianMixture.gaussian(0.3, 0.0)), variant.solver, x, times)
    expected = process.alpha(t_min) * 0.3 + (t_min / t_max) * (x - process.alpha(t_max) * 0.3)
    assert (got - expected).abs().max() < 1e-12


@under("mean", stochastic)
def test_the_mean_of_a_gaussian_converges(variant, process):
    t_max, t_min = measuring_range(process)
    mean, _ = moments_of_run(variant.solver, process, graded(process, t_max, t_min, 20), variance=0.4)
    assert abs(mean - process.alpha(t_min) * 0.5) < 1e-12


@under("marginal", stochastic)
def test_injected_noise_keeps_the_marginal(variant, process):
    """On a point mass the variance after any stochastic step is exactly sigma_t^2, also from pure noise."""
    times = [top(process) * f for f in (1.0, 0.6, 0.5)] + [0.05]
    mean, got = moments_of_run(variant.solver, process, times, variance=0.0)
    assert abs(got - 0.05**2) < 1e-12
    assert abs(mean - process.alpha(0.05) * 0.5) < 1e-12


def rows_of_run(solver, process, x, times):
    """The run of the whole batch, and of each row alone with the noise it had in the batch."""
    noise = gaussian(x, 3)
    drawn = []

    def record(s, t):
        drawn.append(noise(s, t))
        return drawn[-1]

    denoise = DATA.denoiser(process)
    together = sample(Problem(denoise, process, record), solver, x, times)
    alone = []
    for i, row in enumerate(x):
        mine = iter(drawn)
        alone.append(sample(Problem(denoise, process, lambda s, t: next(mine)[i : i + 1]), solver, row[None], times))  # noqa: B023
    return together, torch.cat(alone)


@under("rows")
def test_rows_of_a_batch_are_independent(variant, process):
    x = start(process, top(process), n=3)
    kept = x.clone()
    times = [top(process), *uniform_lambda(process, 0.9 * top(process), 0.05, 5), 0.0]
    together, alone = rows_of_run(variant.solver, process, x, times)
    assert (together - alone).abs().max() < 1e-12
    assert torch.equal(x, kept)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@under("clean end")
def test_from_pure_noise_to_clean(variant, process, steps):
    """Finite from alpha = 0 on, and the last step is the prediction; few steps included."""
    times = [top(process), *uniform_lambda(process, 0.9 * top(process), 0.03, steps)[: steps - 1], 0.0]
    made = list(solve(problem(process), variant.solver, start(process, top(process)), times))
    assert len(made) == len(times) - 1
    assert all(step.x.isfinite().all() and step.x0.isfinite().all() for step in made)
    assert torch.equal(made[-1].x, made[-1].x0)


@under("clean end")
def test_ends_above_zero_and_single_precision(variant, process):
    t_max, t_min = measuring_range(process)
    x = start(process, t_max)
    for times in ([t_max, t_min], uniform_lambda(process, t_max, t_min, 4)):
        whole = sample(problem(process), variant.solver, x, times)
        single = sample(problem(process, x=x.float()), variant.solver, x.float(), times)
        assert single.dtype == torch.float32 and single.isfinite().all() and whole.isfinite().all()


@under("clean end")
def test_single_precision_is_enough_from_pure_noise_on(variant, process):
    """Nothing near alpha = 0 is so large that it cancels: float32 gives what float64 gives."""
    times = [top(process) * f for f in (1.0, 0.9, 0.75, 0.6, 0.4, 0.2, 0.05)] + [0.0]
    x = start(process, top(process))
    noise = gaussian(x, 3)
    drawn = []

    def record(s, t):
        drawn.append(noise(s, t))
        return drawn[-1]

    def replay(s, t):
        return next(again).float()

    double = sample(Problem(DATA.denoiser(process), process, record), variant.solver, x, times)
    again = iter(drawn)
    rounded = Problem(lambda x, t: DATA.denoiser(process)(x.double(), t).float(), process, replay)
    single = sample(rounded, variant.solver, x.float(), times)
    tolerance = 0.2 if variant.solver.nfe(7) is None else 1e-3  # adaptive ones may take other steps
    assert (single - double).abs().max() < tolerance * max(1.0, double.abs().max())


@under("calls")
def test_network_calls_are_as_declared_and_never_at_zero(variant, process):
    calls = []

    def denoise(x, t):
        assert t > 0.0
        calls.append(t)
        return DATA.denoiser(process)(x, t)

    for steps in (1, 2, 6):
        calls.clear()
        times = [*uniform_lambda(process, *measuring_range(process), 6)[:steps], 0.0]
        x = start(process, times[0])
        sample(Problem(denoise, process, gaussian(x, 3)), variant.solver, x, times)
        assert len(calls) == variant.solver.nfe(steps)


@under("meta")
def test_a_step_reads_nothing_back_from_the_device(variant, process):
    """The meta device has no values to read; latents of three, four and five dimensions keep shape and dtype."""
    times = [top(process), *uniform_lambda(process, 0.9 * top(process), 0.05, 5), 0.0]
    for shape in ((2, 4, 9), (2, 4, 8, 8), (1, 4, 3, 8, 8)):
        x = torch.empty(shape, device="meta")
        made = sample(
            Problem(lambda x, t: x * 0.5, process, lambda s, t: torch.empty_like(x)),  # noqa: B023
            variant.solver,
            x,
            times,
        )
        assert made.device.type == "meta" and made.shape == x.shape and made.dtype == x.dtype


def test_every_solver_of_the_library_is_under_the_laws():
    from quickstep_under_test.solvers.library import SOLVERS, WRAPPERS

    assert {*SOLVERS, *WRAPPERS} <= {type(variant.solver) for variant in ALL}
