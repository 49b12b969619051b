"""Closed-form schedules: counts and ends everywhere, identities between them, the published numbers, every sentence."""

import math
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np
import pytest
from quickstep_under_test.solvers.process import RectifiedFlow, VarianceExploding
from quickstep_under_test.solvers.schedules import (
    CLOSED_FORMS,
    AlignYourSteps,
    BetaSchedule,
    CosineSchedule,
    ExponentialSchedule,
    KarrasSchedule,
    LinearQuadraticSchedule,
    PolyexponentialSchedule,
    Schedule,
    UniformSchedule,
    times,
)
from quickstep_under_test.solvers.schedules.ays import TABLES
from scipy.stats import beta


def sd_sigmas(zero_terminal_snr: bool = False) -> np.ndarray:
    """Stable Diffusion's 1000 training sigmas, from beta in closed form; rescaled to end at almost no signal."""
    alphas_bar = np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    if zero_terminal_snr:
        root = np.sqrt(alphas_bar)
        alphas_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        alphas_bar[-1] = 4.8973451890853435e-08  # ComfyUI's value: sigma 4518
    return np.sqrt((1.0 - alphas_bar) / alphas_bar)


def variance_exploding(sigmas: np.ndarray) -> VarianceExploding:
    return VarianceExploding(t_min=sigmas[0], t_max=sigmas[-1], training_sigmas=sigmas)


SD = variance_exploding(sd_sigmas())
ZSNR = variance_exploding(sd_sigmas(zero_terminal_snr=True))
FLOW = RectifiedFlow()
SHIFTED_FLOW = RectifiedFlow(
    t_min=3 / 1002, training_sigmas=3 * np.arange(1, 1001) / 1000 / (1 + 2 * np.arange(1, 1001) / 1000)
)
PROCESSES = {"sd": SD, "zsnr": ZSNR, "flow": FLOW, "shifted flow": SHIFTED_FLOW}

BETA_SPACES = ("timestep", "sigma", "lambda")
SETTINGS = [schedule() for schedule in CLOSED_FORMS] + [
    KarrasSchedule(space="sigma"),
    KarrasSchedule(rho=1000.0),
    KarrasSchedule(rho=0.5),
    KarrasSchedule(shift=3.0),
    ExponentialSchedule(space="sigma"),
    ExponentialSchedule(shift=0.5),
    ExponentialSchedule(sigma_cut=0.95),
    PolyexponentialSchedule(rho=2.0),
    UniformSchedule(spacing="linspace"),
    UniformSchedule(spacing="linspace", shift=5.0),
    *(BetaSchedule(alpha=a, beta=b, space=s) for a, b, s in product((0.1, 3.0), (0.1, 3.0), BETA_SPACES)),
    CosineSchedule(c=0.5),
    CosineSchedule(c=20.0, shift=0.2),
    LinearQuadraticSchedule(threshold_noise=0.1),
    AlignYourSteps(table="SDXL"),
]
ENDS_AT_T_MIN = (KarrasSchedule, ExponentialSchedule, PolyexponentialSchedule, CosineSchedule)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("schedule", SETTINGS, ids=repr)
def test_n_calls_from_t_max_to_zero(schedule, process):
    for n in range(1, 51):
        t = schedule(process, process.t_max, process.t_min, n)
        assert t.shape == (n + 1,) and t.dtype == np.float64
        assert t[0] == process.t_max and t[-1] == 0.0
        assert (np.diff(t.astype(np.float32)) < 0).all()
        if n > 1 and schedule.shift == 1.0 and isinstance(schedule, ENDS_AT_T_MIN):
            assert t[-2] == process.t_min


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_leading_spacing_starts_lower_and_ends_at_t_min(process):
    for n in range(2, 51):
        t = UniformSchedule(spacing="leading")(process, process.t_max, process.t_min, n)
        assert t.shape == (n + 1,) and (np.diff(t) < 0).all()
        assert t[0] < process.t_max and t[-2] == process.t_min
        assert process.u_of_t(t[0]) == pytest.approx((n - 1) / n, abs=1e-12)


def test_a_denser_grid_of_a_whole_thousand_steps_still_has_that_many():
    for schedule in SETTINGS:
        assert len(schedule(SD, SD.t_max, SD.t_min, 1000)) == 1001


# Identities


def over(schedule, process=SD, n=12):
    return schedule(process, process.t_max, process.t_min, n)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("space", ["ratio", "sigma"])
def test_karras_tends_to_exponential(process, space):
    exponential = over(ExponentialSchedule(space=space), process)[1:-1]
    gaps = [
        np.abs(np.log(over(KarrasSchedule(rho=rho, space=space), process)[1:-1] / exponential)).max()
        for rho in (250.0, 500.0, 1000.0)
    ]
    assert gaps[2] < 0.05
    assert gaps[0] / gaps[1] == pytest.approx(2.0, rel=0.1) and gaps[1] / gaps[2] == pytest.approx(2.0, rel=0.1)


def test_karras_with_rho_one_is_linear_in_sigma():
    np.testing.assert_allclose(over(KarrasSchedule(rho=1.0))[:-1], np.linspace(SD.t_max, SD.t_min, 12), rtol=1e-12)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_polyexponential_with_rho_one_is_exponential(process):
    np.testing.assert_allclose(
        over(PolyexponentialSchedule(), process), over(ExponentialSchedule(), process), rtol=1e-12
    )


def test_polyexponential_is_a_power_curve_in_log_sigma():
    share = np.log(over(PolyexponentialSchedule(rho=2.0))[:-1] / SD.t_min) / np.log(SD.t_max / SD.t_min)
    np.testing.assert_allclose(share, (1 - np.arange(12) / 11) ** 2, atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_exponential_is_uniform_in_log_snr(process):
    steps = np.diff(process.lams(over(ExponentialSchedule(), process)[1:-1]))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-9)


def test_flow_starts_at_one_and_continues_from_the_cut():
    t = over(ExponentialSchedule(sigma_cut=0.9), FLOW, n=5)
    expected = np.linspace(FLOW.lam(0.9), FLOW.lam(0.001), 5)
    np.testing.assert_allclose(FLOW.lams(t[1:-1]), expected[1:], rtol=1e-9)
    assert t[0] == 1.0


IN_RATIO = [s for s in SETTINGS if isinstance(s, CosineSchedule | AlignYourSteps)]
IN_RATIO += [s for s in SETTINGS if getattr(s, "space", None) in ("ratio", "lambda")]


@pytest.mark.parametrize("schedule", IN_RATIO, ids=repr)
def test_flow_is_its_variance_exploding_image(schedule):
    k_max, k_min = 15.0, 0.01  # below every sigma_cut in SETTINGS: nothing is cut
    flow, image = RectifiedFlow(), VarianceExploding(k_min, k_max)
    t = schedule(flow, k_max / (1 + k_max), k_min / (1 + k_min), 9)
    np.testing.assert_allclose(t[:-1] / (1 - t[:-1]), schedule(image, k_max, k_min, 9)[:-1], rtol=1e-9)


@pytest.mark.parametrize("schedule", CLOSED_FORMS)
@pytest.mark.parametrize("m", [0.3, 3.0])
def test_shift_on_flow_multiplies_the_ratio_as_sd3_does(schedule, m):
    plain, t = over(schedule(), FLOW), over(schedule(shift=m), FLOW)
    np.testing.assert_allclose(t, m * plain / (1 + (m - 1) * plain), rtol=1e-9)


def test_shift_on_variance_exploding_keeps_the_start_and_multiplies_low_noise():
    plain, t = over(ExponentialSchedule()), over(ExponentialSchedule(shift=3.0))
    assert t[0] == SD.t_max
    assert t[-2] / plain[-2] == pytest.approx(3.0, rel=0.005)
    np.testing.assert_allclose(1 / t[:-1], 1 / (3 * plain[:-1]) + (1 - 1 / 3) / SD.t_max, rtol=1e-12)


def test_uniform_spacings_are_even_in_training_time():
    u = {s: SD.u_of_t(over(UniformSchedule(spacing=s), n=10)[:-1]) for s in ("trailing", "linspace", "leading")}
    np.testing.assert_allclose(u["trailing"], np.arange(10, 0, -1) / 10, atol=1e-12)
    np.testing.assert_allclose(u["linspace"], np.arange(9, -1, -1) / 9, atol=1e-12)
    np.testing.assert_allclose(u["leading"], np.arange(9, -1, -1) / 10, atol=1e-12)


@pytest.mark.parametrize("space", BETA_SPACES)
def test_flat_beta_is_uniform_in_its_space(space):
    t = over(BetaSchedule(alpha=1.0, beta=1.0, space=space), n=10)[:-1]
    coordinate = {"timestep": SD.u_of_t, "sigma": lambda t: t, "lambda": SD.lams}[space](t)
    np.testing.assert_allclose(np.diff(coordinate), np.diff(coordinate)[0], rtol=1e-9)


def test_beta_of_a_half_is_the_arcsine_law():
    q = SD.u_of_t(over(BetaSchedule(alpha=0.5, beta=0.5), n=10)[:-1])
    np.testing.assert_allclose(q, np.sin(math.pi / 2 * (1 - np.arange(10) / 10)) ** 2, atol=1e-9)


def test_beta_spreads_crowded_nodes_only():
    mild, crowded = (SD.u_of_t(over(BetaSchedule(alpha=a, beta=a), n=50)[:-1]) for a in (0.6, 0.1))
    np.testing.assert_allclose(mild, beta.ppf(1 - np.arange(50) / 50, 0.6, 0.6), atol=1e-9)
    assert 0.5 * 0.01 / 50 < (-np.diff(crowded)).min() < 0.01 / 50


def test_beta_with_alpha_one_is_a_power_law():
    q = SD.u_of_t(over(BetaSchedule(alpha=1.0, beta=2.0), n=10)[:-1])
    np.testing.assert_allclose(q, 1 - np.sqrt(np.arange(10) / 10), atol=1e-9)


def test_cosine_is_a_uniform_angle():
    t = over(CosineSchedule(), FLOW)[:-1]
    angle = np.arctan2(t, 1 - t)
    np.testing.assert_allclose(np.diff(angle), np.diff(angle)[0], rtol=1e-9)
    t = over(CosineSchedule(c=2.5))[:-1]
    np.testing.assert_allclose(np.diff(np.arctan(t / 2.5), n=2), 0.0, atol=1e-12)


def test_linear_quadratic_has_even_steps_and_then_growing_ones_without_a_kink():
    t = over(LinearQuadraticSchedule(threshold_noise=0.025), FLOW, n=50)
    steps = -np.diff(t)
    np.testing.assert_allclose(steps[:25], 0.001, rtol=1e-9)  # Movie Gen: 25 of 50 steps follow a schedule of 1000
    np.testing.assert_allclose(np.diff(steps[25:]), np.diff(steps[25:])[0], rtol=1e-6)
    assert steps[25] - steps[24] == pytest.approx(np.diff(steps[25:])[0] / 2, rel=1e-6)
    np.testing.assert_array_equal(
        over(LinearQuadraticSchedule(linear_steps=25), FLOW, n=50), over(LinearQuadraticSchedule(), FLOW, n=50)
    )


# Published numbers


@pytest.mark.parametrize("table", TABLES)
def test_align_your_steps_is_the_table_at_ten_steps(table):
    levels = TABLES[table]
    process = VarianceExploding(levels[-1], levels[0])
    np.testing.assert_allclose(over(AlignYourSteps(table=table), process, n=10), [*levels[:-1], 0.0], rtol=1e-12)
    twenty = over(AlignYourSteps(table=table), process, n=20)
    np.testing.assert_allclose(twenty[:-1:2], levels[:-1], rtol=1e-12)
    np.testing.assert_allclose(twenty[1::2], np.sqrt(np.multiply(levels[:-1], levels[1:])), rtol=1e-12)


@pytest.mark.parametrize(
    "table, timesteps",
    [
        ("SD1.5", [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]),
        ("SDXL", [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]),
    ],
)
def test_tables_are_the_noise_at_the_timesteps_published_for_diffusers(table, timesteps):
    np.testing.assert_allclose(TABLES[table][:-1], sd_sigmas()[timesteps], rtol=0.015)


def test_tables_add_up_to_what_the_paper_s_add_up_to():
    sums = {name: round(sum(levels), 3) for name, levels in TABLES.items()}
    assert sums == {"SD1.5": 33.125, "SDXL": 30.397, "SVD": 785.993, "DeepFloyd-IF": 176.751}


def test_karras_matches_the_paper_s_formula_literally():
    i = np.arange(18)
    paper = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(over(KarrasSchedule(), VarianceExploding(0.002, 80.0), n=18)[:-1], paper, rtol=1e-10)


# Partial denoising


def test_denoise_is_the_tail_of_a_longer_schedule():
    for schedule in (KarrasSchedule(), UniformSchedule(), AlignYourSteps()):
        whole = schedule(SD, SD.t_max, SD.t_min, 16)
        np.testing.assert_array_equal(times(schedule, SD, 10, 0.6), whole[-11:])  # int(10 / 0.6) = 16
        np.testing.assert_array_equal(times(schedule, SD, 16), whole)
        assert times(schedule, SD, 10, 0.0).shape == (0,)


# Sentences


@pytest.mark.parametrize("schedule", CLOSED_FORMS)
@pytest.mark.parametrize(
    "process, t_max, t_min, n, sentence",
    [
        (SD, 14.6, 0.03, 0, r"steps = 0, but a schedule needs at least 1 step\.$"),
        (SD, 14.6, 0.03, -3, r"steps = -3"),
        (SD, math.inf, 0.03, 10, r"must be finite, but they run from inf to 0\.03\.$"),
        (SD, 14.6, math.nan, 10, r"must be finite"),
        (SD, 0.03, 14.6, 10, r"below the largest one, but they are 14\.6 and 0\.03\.$"),
        (SD, 14.6, 14.6, 10, r"below the largest one"),
        (SD, 14.6, 0.0, 10, r"must be positive"),
        (FLOW, 14.6, 0.03, 10, r"largest sigma is 14\.6, but a flow model's sigmas end at 1\.$"),
    ],
)
def test_a_wrong_request_gets_one_sentence(schedule, process, t_max, t_min, n, sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        schedule()(process, t_max, t_min, n)
    assert str(raised.value).startswith(schedule.title)


@pytest.mark.parametrize(
    "schedule, process, n, sentence",
    [
        (
            KarrasSchedule(),
            VarianceExploding(1.0, 1.00001),
            1000,
            r"1000 steps .* do not give 1000 different sigmas between",
        ),
        (
            KarrasSchedule(sigma_cut=0.5),
            RectifiedFlow(t_min=0.6),
            10,
            r"sigma_cut = 0\.5 must be above .* 0\.6; raise it",
        ),
        (BetaSchedule(space="lambda", sigma_cut=0.5), RectifiedFlow(t_min=0.6), 10, r"sigma_cut = 0\.5 must be above"),
        (
            LinearQuadraticSchedule(linear_steps=10),
            SD,
            10,
            r"linear_steps = 10 must be below the number of steps, 10\.$",
        ),
        (
            LinearQuadraticSchedule(threshold_noise=0.9, linear_steps=2),
            SD,
            10,
            r"2 linear steps that remove 0\.9 .* other 8;",
        ),
        (
            AlignYourSteps(table="SVD"),
            SD,
            10,
            r"second sigma of the SVD table is 54\.5, .* is 14\.6\d*; choose the table",
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_work_get_one_sentence(schedule, process, n, sentence):
    with pytest.raises(ValueError, match=sentence):
        over(schedule, process, n)


@pytest.mark.parametrize(
    "nodes", [[20.0, 1.0, 0.1], [14.0, 1.0], [14.0, 1.0, 1.0], [14.0, math.nan, 0.1], [1.0, 0.1, 0.0]]
)
def test_no_rule_gets_away_with_times_that_are_none(nodes):
    @dataclass(frozen=True)
    class Rogue(Schedule):
        title: ClassVar[str] = "Rogue"
        shift: float = 1.0

        def nodes(self, process, t_max, t_min, n):
            return np.array(nodes)

    with pytest.raises(ValueError, match=r"^Rogue: 3 steps with these settings do not give 3 different sigmas"):
        Rogue()(SD, SD.t_max, SD.t_min, 3)


def test_parameters_out_of_bounds_are_refused():
    with pytest.raises(ValueError, match=r"rho = 0.0 must lie between"):
        KarrasSchedule(rho=0.0)
    with pytest.raises(ValueError, match=r"table = 'SD3' is not one of SD1.5, SDXL, SVD, DeepFloyd-IF"):
        AlignYourSteps(table="SD3")
