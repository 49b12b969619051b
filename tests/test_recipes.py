"""Few-step recipes: the published sigmas, both ends, and every process."""

from __future__ import annotations

import numpy as np
import pytest
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM
from quickstep_under_test.solvers.process import VarianceExploding
from quickstep_under_test.solvers.schedules.recipes import RecipeSchedule
from quickstep_under_test.solvers.schedules.schedule import times
from quickstep_under_test.solvers.solver import Problem, sample
from quickstep_under_test.solvers.verify import start

from .test_schedules import FLOW, PROCESSES, SD

PUBLISHED = {
    4: [14.61, 4.293, 1.817, 0.902, 0.420],
    5: [14.61, 4.519, 1.962, 1.001, 0.5015, 0.132],
    6: [14.61, 5.341, 2.523, 1.388, 0.805, 0.437, 0.132],
    8: [14.61, 6.712, 3.608, 2.172, 1.405, 0.937, 0.617, 0.373, 0.147],
}
"""Sigmas of the author's program on SD 1.5, as far as they were written down."""


@pytest.mark.parametrize("n", PUBLISHED)
def test_the_published_sigmas(n):
    t = RecipeSchedule(end="noisy")(SD, SD.t_max, SD.t_min, n)
    np.testing.assert_allclose(t, PUBLISHED[n], rtol=1.5e-3)
    assert np.abs(t - PUBLISHED[n])[1:].max() < 0.00055  # their last digit; the first is 14.6146


@pytest.mark.parametrize("n", PUBLISHED)
def test_a_clean_end_is_one_more_call(n):
    noisy = RecipeSchedule(end="noisy")(SD, SD.t_max, SD.t_min, n)
    np.testing.assert_array_equal(RecipeSchedule()(SD, SD.t_max, SD.t_min, n + 1), [*noisy, 0.0])


@pytest.mark.parametrize("n", [2, 3, 7, 9, 20])
def test_other_step_counts_go_down_to_the_smallest_sigma(n):
    t = RecipeSchedule(end="noisy")(SD, SD.t_max, SD.t_min, n)
    assert t[-1] == pytest.approx(SD.t_min, rel=1e-12)
    np.testing.assert_allclose(np.diff(SD.u_of_t(t) ** (1 / 1.2)), -1 / n, rtol=1e-9)


@pytest.mark.parametrize("end", ["clean", "noisy"])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_as_many_calls_as_asked_for_on_every_process(process, end):
    data = GaussianMixture.gaussian(0.5, 0.3)
    for n in range(1, 51):
        t = RecipeSchedule(end=end)(process, process.t_max, process.t_min, n)
        assert t.shape == (n + 1,) and t.dtype == np.float64 and t[0] == process.t_max
        assert (np.diff(t.astype(np.float32)) < 0).all()
        assert t[-1] == 0.0 if end == "clean" else t[-1] > 0.5 * process.t_min
        if n == 5:
            calls = []

            def denoise(x, t):
                calls.append(t)  # noqa: B023
                return data.denoiser(process)(x, t)

            sample(Problem(denoise, process), DDIM(), start(process, t[0]), t.tolist())
            assert len(calls) == n


def test_flow_models_stop_at_the_same_signal_to_noise_ratio():
    k_max, k_min = 15.0, 0.01
    image = VarianceExploding(k_min, k_max)
    recipe = RecipeSchedule()
    stop = recipe.last(FLOW, k_max / (1 + k_max), k_min / (1 + k_min), 5)
    assert stop / (1 - stop) == pytest.approx(recipe.last(image, k_max, k_min, 5), rel=1e-12)


def test_a_partial_denoise_and_a_shift():
    whole = RecipeSchedule(end="noisy")(SD, SD.t_max, SD.t_min, 8)
    np.testing.assert_array_equal(times(RecipeSchedule(end="noisy"), SD, 4, 0.5), whole[-5:])
    shifted = RecipeSchedule(end="noisy", shift=2.0)(SD, SD.t_max, SD.t_min, 8)
    assert shifted[0] == whole[0] and (shifted[1:] > whole[1:]).all()
