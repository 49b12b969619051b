"""DC-Solver: nothing without ratios, diffusers' UniPC with its newest prediction replaced, the cascade, and whether it helps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from quickstep_under_test.solvers.artifact import Artifact, FoundFor, load, save
from quickstep_under_test.solvers.dc_solver import KIND, DCSolver, cascade, compensated
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP, SDEDPMSolverPP
from quickstep_under_test.solvers.multistep import Node
from quickstep_under_test.solvers.noise import gaussian
from quickstep_under_test.solvers.process import VarianceExploding
from quickstep_under_test.solvers.sa import SASolver
from quickstep_under_test.solvers.solver import Problem, sample, solve
from quickstep_under_test.solvers.unipc import UniPC
from quickstep_under_test.solvers.verify import FLOW, VE, measuring_range, start, uniform_lambda

DATA = GaussianMixture.random()
PROCESSES = [pytest.param(VE, id="ve"), pytest.param(FLOW, id="flow")]
RATIOS = [1.0, 1.0, 1.2, 0.8, 1.05, 0.9, 1.1]


def times_of(process):
    return [*uniform_lambda(process, *measuring_range(process), 6), 0.0]


def text(ratios):
    return ", ".join(map(str, ratios))


def run(solver, process, denoise=None, cfg=None):
    times = times_of(process)
    x = start(process, times[0])
    problem = Problem(denoise or DATA.denoiser(process), process, gaussian(x, 3), cfg=cfg)
    return sample(problem, solver, x, times)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("base", [UniPC(3), DPMSolverPP(2), SASolver(), SDEDPMSolverPP(3)], ids=lambda s: s.id)
def test_without_ratios_or_with_ones_it_is_the_sampler_itself(base, process):
    itself = run(base, process)
    for ratios in (
        "",
        "  ",
        text([1.0] * 7),
        "1 1 1 1 1 1 1",
        text([0.3, 1.9] + [1] * 5),
    ):  # the first two are not used
        assert torch.equal(run(DCSolver(base, None, ratios), process), itself)
    assert DCSolver(base).convergence_order == base.convergence_order
    changed = DCSolver(base, None, text(RATIOS))
    assert changed.convergence_order == 1
    assert (run(changed, process) - itself).abs().max() > 1e-4


@pytest.mark.parametrize("dc_order", [1, 2, 3])
def test_the_replaced_value_is_the_polynomial_in_training_time(dc_order):
    """Against numpy's polynomial fit; on a model whose training times are not its sigmas, and only the newest changes."""
    process = VarianceExploding(training_sigmas=np.geomspace(0.03, 14.6, 1000) ** 1.1)
    g = torch.Generator().manual_seed(0)
    nodes = tuple(
        Node(t, {"x0": torch.randn(2, 3, generator=g, dtype=torch.float64)}, torch.zeros(2, 3))
        for t in (9.0, 5.0, 2.0, 1.3)
    )
    for ratio in (0.6, 1.0, 1.3):
        new = compensated(process, nodes, ratio, dc_order)
        assert new[:-1] == nodes[:-1] and new[-1].t == 1.3
        u = [float(process.u_of_t(node.t)) for node in nodes[-dc_order - 1 :]]
        y = torch.stack([node.values["x0"].flatten() for node in nodes[-dc_order - 1 :]])
        at = ratio * u[-1] + (1.0 - ratio) * u[-2]
        expected = [np.polyval(np.polyfit(u, column, dc_order), at) for column in y.T.numpy()]
        assert np.abs(new[-1].values["x0"].flatten().numpy() - expected).max() < 1e-8
    assert compensated(process, nodes[-dc_order:], 1.3, dc_order) == nodes[-dc_order:]  # too few
    low = tuple(Node(t, {"x0": torch.ones(1) * t}, torch.zeros(1)) for t in (0.02, 0.01, 0.005))  # not trained on
    assert compensated(process, low, 1.3, 2)[-1].values["x0"].isfinite().all()


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [2, 3])
def test_parity_with_diffusers_unipc_with_its_newest_prediction_replaced(order, variant):
    """The authors' change, made to an independent UniPC: between correction and prediction, in integer timesteps, for good."""

    class Theirs(UniPCMultistepScheduler):
        def multistep_uni_p_bh_update(self, *args, **kwargs):
            seen.append((float(self.timesteps[self.step_index]), self.model_outputs[-1]))
            rho = ratios[self.step_index]
            if rho != 1.0:
                (c, f_c), (b, f_b), (a, f_a) = seen[-3:]
                t = rho * a + (1.0 - rho) * b
                new = (
                    f_a * (t - b) * (t - c) / ((a - b) * (a - c))
                    + f_b * (t - a) * (t - c) / ((b - a) * (b - c))
                    + f_c * (t - a) * (t - b) / ((c - a) * (c - b))
                )
                self.model_outputs[-1] = new
                seen[-1] = (a, new)
            return super().multistep_uni_p_bh_update(*args, **kwargs)

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    zero = variant == "bh2"  # its bh1 cannot go to 0
    theirs = Theirs(
        **betas, prediction_type="sample", solver_order=order, solver_type=variant, disable_corrector=[0],
        final_sigmas_type="zero" if zero else "sigma_min",
    )  # fmt: skip
    theirs.set_timesteps(len(RATIOS))
    ratios, seen = RATIOS, []
    sigmas = theirs.sigmas.double().tolist()
    training = ((1 - theirs.alphas_cumprod.double()) / theirs.alphas_cumprod.double()).sqrt().numpy()
    process = VarianceExploding(float(training[0]), float(training[-1]), training_sigmas=training)
    denoise = DATA.denoiser(process)
    x = sigmas[0] * torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    base = UniPC(order, variant, from_step=1, lower_order_final="always")
    got = sample(Problem(denoise, process), DCSolver(base, None, text(RATIOS)), x, sigmas)

    def alpha_vp(sigma):
        return (1 + sigma**2) ** -0.5

    v = x * alpha_vp(sigmas[0])
    for t, sigma in zip(theirs.timesteps, sigmas, strict=False):
        v = theirs.step(denoise(v / alpha_vp(sigma), sigma), t, v).prev_sample
    assert (got - v / alpha_vp(sigmas[-1])).abs().max() < 1e-4
    assert (got - sample(Problem(denoise, process), base, x, sigmas)).abs().max() > 1e-2


@pytest.mark.parametrize("process", PROCESSES)
def test_the_last_step_to_zero_returns_the_replaced_prediction(process):
    only_last = DCSolver(UniPC(2), None, text([1.0] * 6 + [1.3]))
    times = times_of(process)
    problem = Problem(DATA.denoiser(process), process)
    steps = list(solve(problem, only_last, start(process, times[0]), times))
    plain = list(solve(problem, only_last.solver, start(process, times[0]), times))
    assert all(torch.equal(a.x, b.x) for a, b in zip(steps[:-1], plain[:-1], strict=True))
    nodes = tuple(Node(t, {"x0": made.x0}, made.x) for t, made in zip(times[:-1], plain, strict=True))
    assert torch.equal(steps[-1].x, compensated(process, nodes, 1.3, 2)[-1].values["x0"])


COEFFICIENTS = np.random.default_rng(0).normal(size=(4, 3, 3)) * 0.02
COEFFICIENTS[0, 2, 2] += 1.0


def test_the_cascade_is_the_polynomial_it_says():
    for cfg, nfe in ((1.5, 5), (7.5, 10), (12.0, 50)):
        got = cascade(COEFFICIENTS, cfg, nfe)
        assert got[:2] == [1.0, 1.0] and len(got) == nfe
        for k in range(3, nfe + 1):
            ratio = 0.0
            for i in range(4):
                a = 0.0
                for j in range(3):
                    c = sum(COEFFICIENTS[i, j, m] * (nfe / 50) ** (2 - m) for m in range(3))
                    a += c * (cfg / 12) ** (2 - j)
                ratio += a * (k / nfe) ** i
            assert got[k - 1] == pytest.approx(ratio, rel=1e-12)
    flat = cascade(COEFFICIENTS.reshape(-1), 7.5, 10)  # as the authors publish theirs
    assert flat == cascade(COEFFICIENTS, 7.5, 10)


def test_least_squares_finds_the_coefficients_again():
    """The ratios are linear in the 36 numbers, so one linear fit over guidance scales and step counts gives them back."""
    settings = [(cfg, nfe) for cfg in (1.5, 3.0, 5.0, 7.5, 9.0) for nfe in (5, 6, 8, 10, 15, 20)]
    ratios = np.concatenate([cascade(COEFFICIENTS, *setting)[2:] for setting in settings])
    units = np.eye(36)
    columns = [np.concatenate([cascade(unit, *setting)[2:] for setting in settings]) for unit in units]
    found = np.linalg.lstsq(np.stack(columns, axis=1), ratios, rcond=None)[0]
    for cfg, nfe in ((4.0, 7), (8.0, 12)):  # elsewhere
        assert cascade(found, cfg, nfe) == pytest.approx(cascade(COEFFICIENTS, cfg, nfe), abs=1e-9)
    assert np.abs(found.reshape(4, 3, 3) - COEFFICIENTS).max() < 1e-6


def test_ratios_from_a_file(tmp_path):
    save(tmp_path / "list.json", Artifact(KIND, {"ratios": RATIOS}))
    save(tmp_path / "cascade.json", Artifact(KIND, {"cascade": COEFFICIENTS.tolist()}, found_for=FoundFor(cfg=5.0)))
    base = UniPC(2)
    from_list = DCSolver(base, load(tmp_path / "list.json", KIND))
    assert torch.equal(run(from_list, VE), run(DCSolver(base, None, text(RATIOS)), VE))
    from_cascade = DCSolver(base, load(tmp_path / "cascade.json", KIND))
    for cfg, used in ((7.5, 7.5), (None, 5.0)):  # the run's guidance scale; where it is not known, the file's
        assert from_cascade.ratios_at(cfg, 7) == cascade(COEFFICIENTS, used, 7)
        listed = DCSolver(base, None, text(cascade(COEFFICIENTS, used, 7)))
        assert torch.equal(run(from_cascade, VE, cfg=cfg), run(listed, VE))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DCSolver(UniPC(2), None, "1, 1, a"), "numbers between commas or spaces, and '1, 1, a' is not"),
        (lambda: DCSolver(UniPC(2), None, "1, 1, 2.5"), "between 0 and 2, mostly near 1, and 1, 1, 2.5 has 2.5"),
        (lambda: DCSolver(UniPC(2), None, "1, 1, nan"), "between 0 and 2"),
        (lambda: DCSolver(UniPC(2), Artifact(KIND, {"ratios": [1.0, 1.0, -1.0]})), "between 0 and 2"),
        (lambda: DCSolver(UniPC(2), Artifact(KIND, {"ratios": 3})), "must be numbers"),
        (lambda: DCSolver(UniPC(2), Artifact(KIND, {"ratios": [None]})), "must be numbers"),
        (lambda: DCSolver(UniPC(2), Artifact(KIND)), "neither ratios nor a cascade"),
        (lambda: DCSolver(UniPC(2), Artifact("schedule")), "the file holds schedule, but dc_ratios is needed"),
        (lambda: DCSolver(UniPC(2), Artifact(KIND, {"cascade": [1.0] * 35})), "4 x 3 x 3 numbers"),
        (lambda: DCSolver(UniPC(2), Artifact(KIND, {"cascade": [[1.0], []]})), "4 x 3 x 3 numbers"),
        (lambda: DCSolver(UniPC(2), Artifact(KIND, {"ratios": RATIOS}), "1 1 1"), "as a text or in a file, not both"),
        (lambda: DCSolver(UniPC(2, algorithm="noise")), "data prediction, UniPC is none"),
        (
            lambda: DCSolver(UniPC(2), Artifact(KIND, {"ratios": RATIOS, "dc_order": 1})),
            "dc_order = 2, but the ratios of this file were found with 1",
        ),
        (lambda: DCSolver(DCSolver(UniPC(2))), "multistep samplers in data prediction, DC-Solver is none"),
        (lambda: DCSolver(DDIM()), "DDIM remembers 1 predictions with these settings, 2 are needed"),
        (lambda: DCSolver(UniPC(2), dc_order=3), "UniPC remembers 2 predictions with these settings, 3 are needed"),
    ],
)
def test_what_cannot_be_used_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_what_does_not_fit_the_run_is_refused_before_any_call():
    def never(x, t):
        raise AssertionError("network called")

    with pytest.raises(ValueError, match="3 ratios are given, but this run has 7 steps"):
        run(DCSolver(UniPC(2), None, "1 1 1.1"), VE, never)
    curve = Artifact(KIND, {"cascade": COEFFICIENTS.tolist()})
    with pytest.raises(ValueError, match="needs the guidance scale"):
        run(DCSolver(UniPC(2), curve), VE, never)
    with pytest.raises(ValueError, match="the cascade at CFG 1000 and 7 steps has"):
        run(DCSolver(UniPC(2), curve), VE, never, cfg=1000.0)


@pytest.mark.parametrize("process", PROCESSES)
def test_ratios_exist_that_help_under_guidance(process):
    """Not the search, only that there is something to find: a few rounds of one ratio at a time, on the end result."""
    one = GaussianMixture(*(v[:1] for v in (DATA.w, DATA.m, DATA.v, DATA.Q)))
    full, part = DATA.denoiser(process), one.denoiser(process)
    times = times_of(process)

    def guided(x, t):
        return full(x, t) + 7.5 * (part(x, t) - full(x, t))

    problem, fine = Problem(guided, process), [*uniform_lambda(process, times[0], times[-2], 100), 0.0]
    starts = [start(process, times[0], n=64, seed=seed) for seed in (0, 1)]
    ends = [sample(problem, UniPC(2), x, fine) for x in starts]

    def error(solver, seed):
        return (sample(problem, solver, starts[seed], times) - ends[seed]).square().mean((1, 2, 3)).sqrt().mean().item()

    base, rho = UniPC(2, from_step=1), [1.0] * 7
    best = error(base, 0)
    for step in (0.2, 0.1, 0.05):
        for i in range(2, 7):
            for change in (-step, step):
                tried = [*rho[:i], rho[i] + change, *rho[i + 1 :]]
                loss = error(DCSolver(base, None, text(tried)), 0)
                if loss < best:
                    best, rho = loss, tried
    assert error(DCSolver(base, None, text(rho)), 1) < 0.8 * error(base, 1)  # on other samples than searched on
