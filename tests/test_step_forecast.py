"""Accelerators of whole calls on exact problems, without ComfyUI: who is called, what is answered, what is remembered."""

import math

import pytest
import torch
from quickstep_under_test.solvers.caching.accelerator import Plan, Run
from quickstep_under_test.solvers.caching.adaptive_diffusion import AdaptiveDiffusion
from quickstep_under_test.solvers.caching.easycache import EasyCachePaper
from quickstep_under_test.solvers.caching.forecast import Gain
from quickstep_under_test.solvers.caching.sada import SADA, quadrature
from quickstep_under_test.solvers.caching.step_forecast import StepForecast
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.process import RectifiedFlow, VarianceExploding

VE, FLOW = VarianceExploding(), RectifiedFlow()
ALL = [StepForecast(), EasyCachePaper(), SADA(coefficients="published"), AdaptiveDiffusion(threshold=0.1)]
NEUTRAL = [
    StepForecast(tol=0.0),
    StepForecast(mode="interval", interval=1),
    StepForecast(mode="budget", share=1.0),
    StepForecast(mode="schedule"),
    EasyCachePaper(tau=0.0),
    SADA(max_interval=0),
    AdaptiveDiffusion(threshold=0.0),
]


def times(process, steps):
    if process is FLOW:
        return torch.linspace(1.0, 0.0, steps + 1).tolist()
    return [*torch.logspace(math.log10(14.6), math.log10(0.03), steps).tolist(), 0.0]


class Sampled:
    """A run of Euler or Heun as ComfyUI's wrapper drives a session; ``plans`` of its calls."""

    def __init__(self, settings, process=VE, steps=20, heun=False, rows=3, grid=None, network=None, session=None):
        self.times = grid or times(process, steps)
        self.session = session or settings.start(Run(self.times, process=process))
        self.network = network or GaussianMixture.random().denoiser(process)
        self.plans, self.calls = [], []
        x = self.times[0] * torch.randn(rows, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        with torch.no_grad():
            self.x = self.solve(x, heun)

    def solve(self, x, heun):
        for s, t in zip(self.times, self.times[1:], strict=False):
            d = (x - self.denoise(x, s)) / s
            if heun and t > 0:
                end = x + (t - s) * d
                d = (d + (end - self.denoise(end, t)) / t) / 2
            x = x + (t - s) * d
        return x

    def denoise(self, x, t):
        with self.session.call(t):
            if self.session.plan is Plan.SKIP:
                before = x.clone()
                answer = self.session.answer(x, t)
                assert torch.allclose(x, before, 0, 0, equal_nan=True), "the sampler's own tensor was written to"
                if answer is not None:
                    self.plans.append(Plan.SKIP)
                    return answer
                self.session.plan = Plan.FULL
            x0 = self.network(x, t)
            self.calls.append(t)
            self.plans.append(self.session.plan)
            if self.session.plan is Plan.FULL:
                self.session.learn(x, t, x0)
            return x0

    @property
    def full(self):
        return len(self.calls)


def marks(run):
    return "".join("." if plan is Plan.SKIP else "F" for plan in run.plans)


def distance(a, b):
    return float((a.x - b.x).square().mean().sqrt())


@pytest.mark.parametrize("settings", NEUTRAL, ids=repr)
@pytest.mark.parametrize("process", [VE, FLOW], ids=["ve", "flow"])
def test_off_is_off(settings, process):
    plain = Sampled(StepForecast(tol=0.0), process)
    run = Sampled(settings, process)
    assert run.full == 20 and torch.equal(run.x, plain.x)
    mixture = GaussianMixture.random().denoiser(process)
    x = run.times[0] * torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for s, t in zip(run.times, run.times[1:], strict=False):
        x = x + (t - s) * ((x - mixture(x, s)) / s)
    assert torch.equal(run.x, x)


@pytest.mark.parametrize("process", [VE, FLOW], ids=["ve", "flow"])
def test_half_the_calls_beat_half_the_steps(process):
    """Half the distance to the whole run that 15 steps have, and it really is the calls that go."""
    whole = Sampled(StepForecast(tol=0.0), process, steps=30)
    run = Sampled(StepForecast(), process, steps=30)
    assert run.full <= 15 and run.plans.count(Plan.SKIP) == 30 - run.full
    assert distance(run, whole) < 0.5 * distance(Sampled(StepForecast(tol=0.0), process, steps=15), whole)


def test_more_tolerance_fewer_calls_more_distance():
    whole = Sampled(StepForecast(tol=0.0), steps=30)
    runs = [Sampled(StepForecast(tol=tol), steps=30) for tol in (0.002, 0.02, 0.2)]
    calls, errors = [run.full for run in runs], [distance(run, whole) for run in runs]
    assert calls == sorted(calls, reverse=True) and calls[0] > calls[2]
    assert errors == sorted(errors) and errors[0] < errors[2]


def test_a_line_is_forecast_exactly():
    """d linear in lambda, whatever x: every forecast with gain 1 is right, and only the guarded calls are made."""
    slope = torch.randn(3, 4, dtype=torch.float64)

    def network(x, t):
        return x - t * (10.0 + VE.lam(t) * slope)  # far from 0, or it would grow beyond reason

    whole = Sampled(StepForecast(tol=0.0), network=network)
    for settings in (StepForecast(gain=1.0, max_skip=20, tol=1e-6), StepForecast(gain=1.0, adapt=False, tol=1e-6)):
        run = Sampled(settings, network=network)
        assert marks(run) == "FFF.F..F...F....F..F"  # a gap is at most one longer than the one before
        assert distance(run, whole) < 1e-9
    assert distance(Sampled(StepForecast(gain=0.5, adapt=False, mode="interval"), network=network), whole) > 1e-3


def test_modes():
    def made(**settings):
        return marks(Sampled(StepForecast(**settings)))

    assert made(mode="interval", interval=3) == "FFF..F..F..F..F..F.F"
    assert made(mode="growing", interval=2, flex=0.5) == "FFF.F.F..F..F...F..F"
    assert made(mode="schedule", schedule="1,1,1,0,0,1 0", warmup=0) == "FFF..F.FFFFFFFFFFFFF"
    assert made(mode="schedule", schedule="100000000000000000000", warmup=0, tail=0) == "F" + 19 * "."
    assert made(mode="budget", share=0.5) == "FFFFF..F..F..F..F..F"
    for share in (0.3, 0.5, 0.7, 1.0):
        assert made(mode="budget", share=share).count("F") == round(20 * share)
    assert made(mode="budget", share=0.05).count("F") == 4  # what warmup and tail ask for


@pytest.mark.parametrize("domain", ["d", "x0"])
def test_along_the_steps_a_line_is_forecast_exactly(domain):
    """``coordinate`` step and ``domain``: what is linear in the number of the step is forecast exactly, off the grid too."""
    grid = times(VE, 20)

    def network(x, t):
        i = next(i for i in range(20) if grid[i + 1] < t * 1.000001 and t <= grid[i] * 1.000001)
        line = torch.full_like(x, 10.0 + i + (grid[i] - t) / (grid[i] - grid[i + 1]))
        return line if domain == "x0" else x - t * line

    given = dict(mode="interval", domain=domain, gain=1.0, adapt=False, interval=4, tail=0)
    whole = Sampled(StepForecast(tol=0.0), grid=grid, network=network)
    run = Sampled(StepForecast(coordinate="step", **given), grid=grid, network=network)
    assert run.full < 10 and distance(run, whole) < 1e-9
    uneven = Sampled(
        StepForecast(coordinate="log-snr", **{**given, "domain": "x0" if domain == "d" else "d"}), network=network
    )
    assert distance(uneven, whole) > 1e-3


@pytest.mark.parametrize("coordinate", ["step", "log-snr"])
def test_chebyshev_is_fitted_from_the_first_call_to_the_last(coordinate):
    grid = times(VE, 20)
    settings = StepForecast(mode="interval", interval=1, forecast="chebyshev", coordinate=coordinate)
    session = settings.start(Run(grid, process=VE))
    seen = []

    def network(x, t):
        seen.append(session.coordinate(t))
        return 0.5 * x

    Sampled(settings, grid=grid, network=network, session=session)
    assert len(seen) == 20 and (seen[0], seen[-1]) == pytest.approx(settings.ends(Run(grid, process=VE)))


def test_the_window_is_kept():
    settings = StepForecast(mode="interval", interval=10, warmup=1, tail=0)
    grid = times(VE, 20)
    session = settings.start(Run(grid, window=(grid[5], grid[15]), process=VE))
    run = Sampled(settings, grid=grid, session=session)
    assert run.plans[:5] == [Plan.PLAIN] * 5 and run.plans[15:] == [Plan.PLAIN] * 5
    assert marks(run)[5:15] == "F........."


def test_heun_counts_calls_and_anchors_of_one_time_replace_each_other():
    whole = Sampled(StepForecast(tol=0.0), heun=True)
    for settings in (StepForecast(), StepForecast(mode="interval", interval=3), StepForecast(order=2, gain=1.0)):
        run = Sampled(settings, heun=True)
        assert len(run.plans) == 39 and run.full < 30
        assert torch.isfinite(run.x).all() and distance(run, whole) < 0.05
    session = StepForecast().start(Run(times(VE, 20), process=VE))
    Sampled(StepForecast(tol=0.0), heun=True, session=session)
    x = torch.zeros(3, 4, dtype=torch.float64)
    nodes = session.store.coordinates(session.key(x)[0])
    assert len(set(nodes)) == len(nodes) == 2


@pytest.mark.parametrize("settings", ALL, ids=lambda s: s.id)
def test_a_restart_begins_anew(settings):
    grid = times(VE, 20)
    run = Sampled(settings, grid=[*grid[:12], *grid[6:]])
    assert marks(run)[:12].count(".") > 0
    assert marks(run)[12 : 12 + settings.warmup] == "F" * settings.warmup


@pytest.mark.parametrize("settings", ALL, ids=lambda s: s.id)
def test_a_change_of_size_computes_and_goes_on(settings):
    """ComfyUI's EasyCache skips everything after one."""
    session = settings.start(Run(times(VE, 20), process=VE))
    network = GaussianMixture.random().denoiser(VE)
    made = []
    for i, t in enumerate(times(VE, 20)[:-1]):
        x = t * torch.randn(3 if i < 10 else 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with session.call(t):
            answer = session.answer(x, t) if session.plan is Plan.SKIP else None
            made.append(answer is not None)
            if answer is None:
                session.learn(x, t, network(x, t))
            else:
                assert answer.shape == x.shape
    assert not made[10]


@pytest.mark.parametrize("settings", ALL, ids=lambda s: s.id)
def test_two_runs_share_nothing_and_nothing_is_held_afterwards(settings):
    first = Sampled(settings, rows=2)
    second = Sampled(settings, rows=3)
    assert torch.equal(second.x, Sampled(settings, rows=3).x)
    first.session.close()
    assert first.session.store.nbytes == 0
    held = [v for v in vars(first.session).values() if isinstance(v, torch.Tensor) or getattr(v, "kept", None)]
    assert not held


@pytest.mark.parametrize("settings", ALL, ids=lambda s: s.id)
def test_what_is_kept_is_a_copy(settings):
    """Samplers and networks write into their tensors."""
    session = settings.start(Run(times(VE, 20), process=VE))
    x, x0 = torch.ones(1, 4), torch.zeros(1, 4)
    with session.call(14.6):
        if session.plan is Plan.SKIP:
            assert session.answer(x, 14.6) is None
        session.learn(x, 14.6, x0)
    kept = session.store.get(session.key(x)).clone()
    x.fill_(99.0)
    x0.fill_(99.0)
    assert torch.equal(session.store.get(session.key(x)), kept)
    assert all((v.kept[0] != 99.0).all() for v in vars(session).values() if getattr(v, "kept", None))


@pytest.mark.parametrize("settings", [*ALL[:2], SADA(lagrange_term=0), ALL[3]], ids=lambda s: s.id)
def test_nan_is_computed(settings):
    """Where a number decides; SADA after the middle asks none."""
    run = Sampled(settings, network=lambda x, t: torch.full_like(x, math.nan))
    assert run.full == 20


def test_the_gain_is_measured_per_sample():
    """The first sample moves along a line, the second jumps around a mean: one is followed, the other is not."""
    gain, generator = Gain(0.6), torch.Generator().manual_seed(0)
    assert torch.allclose(gain.scale(torch.ones(2, 3)), torch.full((2, 3), 0.6))
    for _ in range(8):
        noise = torch.randn(3, 3, generator=generator)
        gain.learn(torch.stack([torch.ones(3), noise[1] - noise[0]]), torch.stack([torch.ones(3), noise[2] - noise[1]]))
    line, jumps = gain.scale(torch.ones(2, 3))[:, 0].tolist()
    assert line > 0.75 and jumps < 0.4
    gain.clear()
    assert torch.allclose(gain.scale(torch.ones(2, 3)), torch.full((2, 3), 0.6))
    assert torch.isfinite(Gain(0.6).scale(torch.zeros(1, 3))).all()


def test_half_precision_keeps_its_dtype():
    session = StepForecast(mode="interval", warmup=1).start(Run(times(VE, 20), process=VE))
    x = torch.ones(1, 4, dtype=torch.float16)
    with session.call(14.6):
        session.learn(x, 14.6, x / 2)
    with session.call(11.0):
        assert session.answer(x, 11.0).dtype == torch.float16
    assert session.store.get(session.key(x)).dtype == torch.float32


@pytest.mark.parametrize("settings", ALL, ids=lambda s: s.id)
def test_off_and_notes(settings):
    grid = times(VE, 20)
    assert settings.off(Run(grid)) is None
    assert "noise" in settings.off(Run(grid, stochastic=True))
    assert "unconditional" in settings.off(Run(grid, sampler="euler_cfg_pp", both_sides=True))
    assert settings.off(Run(grid, adaptive=True))
    assert settings.note(Run(grid)) is None and "8 steps" in settings.note(Run(times(VE, 8)))


def test_bad_schedules_are_refused():
    with pytest.raises(ValueError, match="only 1 and 0"):
        StepForecast(mode="schedule", schedule="1102")
    with pytest.raises(ValueError, match="first step"):
        StepForecast(mode="schedule", schedule="0101")


def test_easycache_follows_its_paper():
    """k and E by hand, on a scalar run where both are known."""
    settings = EasyCachePaper(tau=0.25, warmup=2, tail=0)
    session = settings.start(Run([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 0.0], process=VE))
    made = []
    for x, d, t in [(10, 1, 8.0), (9, 2, 7.0), (8.8, 9, 6.0), (8.6, 9, 5.0), (8.4, 9, 4.0)]:
        state = torch.full((1, 1), float(x))
        with session.call(t):
            answer = session.answer(state, t)
            made.append(answer is not None)
            if answer is None:
                session.learn(state, t, state - t * d)
            else:
                assert answer.item() == pytest.approx(x - t * 2)
    # k = |2 - 1| / |9 - 10| = 1, |v| = 2: each move of 0.2 adds 0.1; the third passes 0.25.
    assert made == [False, False, True, True, False]


def test_easycache_difference_repeats_output_minus_input():
    session = EasyCachePaper(tau=3.0, warmup=2, tail=0, repeat="difference").start(Run(times(FLOW, 10), process=FLOW))
    for x, d, t in [(1.0, 1.0, 1.0), (0.9, 1.5, 0.9)]:
        with session.call(t):
            assert session.answer(torch.tensor([[x]]), t) is None
            session.learn(torch.tensor([[x]]), t, torch.tensor([[x - t * d]]))
    with session.call(0.8):
        assert session.answer(torch.tensor([[0.75]]), 0.8).item() == pytest.approx(0.75 - 0.8 * (1.5 + 0.75 - 0.9))


def test_adaptive_diffusion_follows_its_paper():
    session = AdaptiveDiffusion(threshold=0.01, warmup=0, tail=0).start(
        Run([float(9 - i) for i in range(10)], process=VE)
    )
    made = []
    for i, x in enumerate([0.0, 1.0, 2.1, 3.3, 4.6, 6.2]):  # moves 1, 1.1, 1.2, 1.3, 1.6: even up to the last
        t, state = 9.0 - i, torch.full((1, 1), x)
        with session.call(t):
            answer = session.answer(state, t)
            made.append(answer is not None)
            if answer is None:
                session.learn(state, t, state)
    assert made == [False, False, False, True, True, False]


def test_sada_published_weights_always_pass_after_euler():
    published = Sampled(SADA(coefficients="published", lagrange_term=0, max_interval=2))
    assert marks(published) == "FFFFF..F..F..F..F..F"
    corrected = Sampled(SADA(lagrange_term=0, max_interval=2))
    assert corrected.full > published.full


def test_sada_corrected_prediction_integrates_a_parabola():
    w = quadrature(2.0, 0.5, [4.0, 3.0, 2.0])
    for k in range(3):
        exact = (0.5 ** (k + 1) - 2.0 ** (k + 1)) / (k + 1)
        assert sum(a * c**k for a, c in zip(w, [4.0, 3.0, 2.0], strict=True)) == pytest.approx(exact)


def test_sada_computes_one_in_four_after_the_middle():
    run = Sampled(SADA(middle=0.5, lagrange_int=4, max_interval=4))
    assert [i for i in range(10, 20) if run.plans[i] is Plan.FULL] == [13, 17, 19]
