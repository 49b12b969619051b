"""USF: every linear solver is a table of it, a table is executed as the paper's formulas say, mistakes are named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from quickstep_under_test.solvers.artifact import Artifact, load, save
from quickstep_under_test.solvers.deis import DEIS
from quickstep_under_test.solvers.dpm_solver_v3 import DPMSolverV3
from quickstep_under_test.solvers.ems import ModelStatistics
from quickstep_under_test.solvers.er_sde import ERSDE
from quickstep_under_test.solvers.exact import GaussianMixture
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP
from quickstep_under_test.solvers.momentum import GHVB
from quickstep_under_test.solvers.pndm import IPNDM, PNDM
from quickstep_under_test.solvers.sa import SASolver
from quickstep_under_test.solvers.singlestep import DPMSolverSinglestep, budget
from quickstep_under_test.solvers.solver import Problem, sample
from quickstep_under_test.solvers.unipc import UniPC
from quickstep_under_test.solvers.usf import USF, to_table
from quickstep_under_test.solvers.usf_table import KIND, RELAXATIONS, Table, parse
from quickstep_under_test.solvers.verify import FLOW, VE, measuring_range, start, uniform_lambda

from .library.usf import table
from .library.v3 import SMOOTH

PROCESSES = [pytest.param(VE, id="ve"), pytest.param(FLOW, id="flow")]
DATA = GaussianMixture.random()
LINEAR = [
    DDIM(),
    DPMSolverPP(2),
    DPMSolverPP(2, "taylor", frame="vef"),
    DPMSolverPP(3),
    DPMSolverPP(3, third_order="reference"),
    *(DEIS(4, variable) for variable in ("t", "rho", "lambda", "vp")),
    IPNDM(4),
    IPNDM(4, "exact"),
    *(UniPC(2, variant) for variant in ("bh1", "bh2", "exact")),
    UniPC(4, "bh1", algorithm="noise"),
    UniPC(1, "bh2"),
    SASolver(eta=0.0),
    DPMSolverV3(3, statistics=SMOOTH),
    DPMSolverV3(3, c_pseudo=False, p_pseudo=True, statistics=SMOOTH),
    USF(
        table(
            {},
            {"order": 2, "relax": "linear", "relax_value": 0.1, "corrector": "implicit"},
            {"order": 2, "start": 2, "relax": "linear", "relax_value": -0.1},
            afs="zero",
        )
    ),
]


def run(solver, process, times):
    x = start(process, times[0])
    return sample(Problem(DATA.denoiser(process), process), solver, x, times)


def top(process) -> float:
    return 1.0 if process is FLOW else process.t_max


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("solver", LINEAR, ids=lambda s: f"{s.id}-{'-'.join(map(str, vars(s).values()))}")
def test_linear_solvers_are_tables(solver, process):
    statistics = getattr(solver, "statistics", None)
    for times in (
        uniform_lambda(process, *measuring_range(process), 9),
        [top(process), *uniform_lambda(process, 0.9 * top(process), 0.03, 6), 0.0],
    ):
        written = to_table(solver, times, process)
        assert parse(written.text()) == written and Table.of(written.raw()) == written
        assert written.sigmas == times
        assert (run(USF(written.text(), statistics), process, times) - run(solver, process, times)).abs().max() < 1e-12


def test_tables_say_what_a_solver_does():
    """Weights stand only where nothing else says it; elsewhere the table is readable and fits other sigmas."""
    times = uniform_lambda(VE, 10.0, 0.1, 6)

    def steps(solver):
        return [{k: v for k, v in row.items() if k != "sigma"} for row in to_table(solver, times, VE).raw()["steps"]]

    midpoint = {"order": 2, "relax": "dpmsolver-2"}
    assert steps(DPMSolverPP(2, lower_order_final="never")) == [{}, *[midpoint] * 5]
    assert steps(DPMSolverPP(3, "taylor")) == [{}, {"order": 2}, *[{"order": 3}] * 2, {"order": 2}, {}]
    assert steps(DEIS(2))[1:] == [{"order": 2, "prediction": "noise", "variable": "t"}] * 5
    assert steps(UniPC(3, "exact"))[2] == {"order": 3, "corrector": "pseudo"}
    bh1 = {"kind": "pseudo", "order": 2, "relax": "unipc-bh1"}
    assert steps(UniPC(1, "bh1")) == [{"corrector": bh1}] * 6
    assert steps(IPNDM(2))[1] == {"weights": [1.5, -0.5], "prediction": "noise", "variable": "rho"}
    assert steps(DPMSolverV3(3, "never", p_pseudo=True, lower_order_final="never"))[-1] == {
        "order": 3,
        "points": [1, 2],
        "prediction": "v3",
    }


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("order", [2, 3])
def test_single_step_solvers_are_tables_with_older_start_points(order, process):
    """The rows of one step start from where the first of them did."""
    times = uniform_lambda(process, *measuring_range(process), 12)
    rows = [{"order": k, "start": k} for calls in budget(12, order, False) for k in range(1, calls + 1)]
    taylor = DPMSolverSinglestep(order, plan="budget", correction="taylor")
    assert (run(USF(table(*rows, repeat=0)), process, times) - run(taylor, process, times)).abs().max() < 1e-12
    if order == 2:
        relaxed = table(rows[0], {**rows[1], "relax": "dpmsolver-2"}, repeat=2)
        midpoint = DPMSolverSinglestep(2, plan="budget")
        assert (run(USF(relaxed), process, times) - run(midpoint, process, times)).abs().max() < 1e-12


def factor(relax, value, h, data):
    e, z = math.expm1, -h if data else h
    return {
        "none": lambda: 1.0,
        "dpmsolver-2": lambda: 0.5 * z * e(z) / (e(z) - z),
        "unipc-bh1": lambda: 0.5 * z * z / (e(z) - z),
        "unipc-bh2": lambda: 0.5 * z * e(z) / (e(z) - z),
        "0.5exp": lambda: 1.0 + 0.5 * e(z),
        "-0.5exp": lambda: 1.0 - 0.5 * e(z),
        "linear": lambda: 1.0 + value * h,
    }[relax]()


def published(process, times, rows, guess=None):
    """The executor of the paper's code, from its formulas: Taylor differences by a linear system per derivative, lists of
    everything that was computed. rows: dictionaries with active points given as indices from the end, -1 the newest."""
    lam, denoise, calls = [process.lam(t) for t in times], DATA.denoiser(process), 0
    x = start(process, times[0])
    xs, ts, models = [x], [times[0]], {"data": [], "noise": []}

    def evaluate(x, t, D=None):
        nonlocal calls
        if D is None:
            D, calls = denoise(x, t), calls + 1
        models["data"].append(D)
        models["noise"].append((x - process.alpha(t) * D) / t)

    def update(row, kind, t):
        at, model = row["start"], models[kind]
        s = ts[at]
        h = process.lam(t) - process.lam(s)
        z = -h if kind == "data" else h
        phi = [math.exp(z)]
        for k in range(row["order"]):
            phi.append((phi[-1] - 1.0 / math.factorial(k)) / z)
        if kind == "data":
            x, sign, scale = t / s * xs[at], 1.0, process.alpha(t)
        else:
            x, sign, scale = process.alpha(t) / process.alpha(s) * xs[at], -1.0, t
        x = x + sign * scale * h * phi[1] * model[at]
        for m, active in enumerate(row["active"], 1):
            delta = np.array([process.lam(ts[j]) - process.lam(s) for j in active])
            q = len(active)
            system = np.stack([delta**i / math.factorial(i) for i in range(1, q + 1)])
            a = np.linalg.solve(system, np.eye(q)[m - 1])
            derivative = sum(float(a_j) * (model[j] - model[at]) for a_j, j in zip(a, active, strict=True))
            if m == 1:
                derivative = derivative * factor(row.get("relax", "none"), row.get("value", 0.0), h, kind == "data")
            x = x + sign * scale * h ** (m + 1) * phi[m + 1] * derivative
        return x

    evaluate(x, times[0], guess)
    for i, (row, t) in enumerate(zip(rows, times[1:], strict=True), 1):
        x = update(row, row["kind"], t)
        xs.append(x)
        ts.append(t)
        if i < len(rows):
            evaluate(x, t)
            if "corrector" in row:
                x = xs[-1] = update(row["corrector"], row["kind"], t)
                if row["implicit"]:
                    for model in models.values():
                        model.pop()
                    evaluate(x, t)
    assert len(lam) == len(xs)
    return x, calls


MIXED = [
    ({"prediction": "noise"}, {"kind": "noise", "start": -1, "order": 1, "active": []}),
    (
        {"order": 2, "relax": "linear", "relax_value": 0.3, "corrector": "pseudo"},
        {
            "kind": "data", "start": -1, "order": 2, "active": [[-2]], "relax": "linear", "value": 0.3, "implicit": False,
            "corrector": {"start": -2, "order": 3, "active": [[-1, -3], [-1, -3]]},
        },
    ),
    (
        {"order": 3, "points": [1, 2], "prediction": "noise", "start": 2, "relax": "unipc-bh1",
         "corrector": {"kind": "implicit", "order": 4, "points": [1, 2, 3]}},
        {
            "kind": "noise", "start": -2, "order": 3, "active": [[-1], [-1, -3]], "relax": "unipc-bh1", "implicit": True,
            "corrector": {"start": -3, "order": 4, "active": [[-1], [-1, -2], [-1, -2, -4]]},
        },
    ),
    (
        {
            "order": 2, "points": [3], "relax": "-0.5exp",
            "corrector": {"kind": "pseudo", "order": 2, "points": [1], "relax": "0.5exp"},
        },
        {
            "kind": "data", "start": -1, "order": 2, "active": [[-2, -3, -4]], "relax": "-0.5exp", "implicit": False,
            "corrector": {"start": -2, "order": 2, "active": [[-1]], "relax": "0.5exp"},
        },
    ),
    (
        {"order": 4, "points": [1, 3, 4], "start": 3, "relax": "unipc-bh2"},
        {
            "kind": "data", "start": -3, "order": 4, "active": [[-2], [-2, -1, -4], [-2, -1, -4, -5]], "relax": "unipc-bh2",
        },
    ),
    (
        {"order": 3, "prediction": "noise", "relax": "dpmsolver-2"},
        {"kind": "noise", "start": -1, "order": 3, "active": [[-2, -3]] * 2, "relax": "dpmsolver-2"},
    ),
]  # fmt: skip


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("afs", ["none", "zero", "mean"])
def test_parity_with_the_published_executor(afs, process):
    t_max, t_min = measuring_range(process)
    times = [t_max, *np.geomspace(0.8 * t_max, 1.5 * t_min, 5).tolist(), t_min]
    mean = torch.full((1, 2, 2), 0.3, dtype=torch.float64)
    guess = {"none": None, "zero": torch.zeros(4, 1, 2, 2), "mean": mean.expand(4, 1, 2, 2)}[afs]
    expected, calls = published(process, times, [row for _, row in MIXED], guess)
    statistics = ModelStatistics(SMOOTH.lam, SMOOTH.l, SMOOTH.s, SMOOTH.b, mean)
    solver = USF(table(*(row for row, _ in MIXED), repeat=0, afs=afs), statistics)
    made = []
    x = start(process, times[0])

    def denoise(x, t):
        made.append(t)
        return DATA.denoiser(process)(x, t)

    got = sample(Problem(denoise, process), solver, x, times)
    assert (got - expected).abs().max() < 1e-11
    assert len(made) == calls == solver.nfe(6)


def test_every_relaxation_is_a_factor_of_its_own():
    times = uniform_lambda(VE, 10.0, 0.1, 5)
    ends = {}
    for relax in RELAXATIONS:
        value = {"relax_value": 0.1} if relax == "linear" else {}
        ends[relax] = run(USF(table({}, {"order": 2, "relax": relax, **value})), VE, times)
    assert torch.equal(ends["dpmsolver-2"], ends["unipc-bh2"])  # one formula, two names
    names = [name for name in RELAXATIONS if name != "unipc-bh2"]
    assert all((ends[a] - ends[b]).abs().max() > 1e-4 for i, a in enumerate(names) for b in names[:i])


def test_a_published_schedule_runs():
    """The one found for CIFAR-10 (EDM) and three calls: all kinds of step, mean first step, pseudo corrector."""
    mean = torch.zeros(1, 2, 2)
    searched = {
        "usf": 1,
        "sigma": 80.0,
        "afs": "mean",
        "steps": [
            {"sigma": 7.7355, "prediction": "noise", "corrector": "pseudo"},
            {"sigma": 1.4069, "order": 2},
            {"sigma": 0.29714, "order": 3, "prediction": "v3"},
            {"sigma": 0.0023523, "order": 2, "prediction": "v3", "relax": "linear", "relax_value": 0.054},
        ],
    }
    statistics = ModelStatistics(SMOOTH.lam, SMOOTH.l, SMOOTH.s, SMOOTH.b, mean)
    solver = USF(json.dumps(searched), statistics)
    assert solver.nfe(4) == 3
    assert run(solver, VE, solver.plan.sigmas).isfinite().all()


def test_tables_survive_a_file(tmp_path):
    written = to_table(UniPC(3), uniform_lambda(VE, 10.0, 0.1, 5), VE)
    save(tmp_path / "a.json", Artifact(KIND, written.raw()))
    assert Table.of(load(tmp_path / "a.json", KIND).table) == written


def test_default_is_dpm_solver_pp():
    times = [*uniform_lambda(VE, 10.0, 0.1, 5), 0.0]
    expected = run(DPMSolverPP(lower_order_final="never"), VE, times)
    assert (run(USF(), VE, times) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("solver", [DDIM(eta=0.5), GHVB(1.8), PNDM(), ERSDE(phi="ode")], ids=lambda s: s.id)
def test_what_is_no_table_is_refused(solver):
    with pytest.raises(ValueError, match="cannot be written as a USF table"):
        to_table(solver, [10.0, 1.0, 0.0], VE)


@pytest.mark.parametrize(
    ("steps", "head", "words"),
    [
        ([{"order": 2}], {}, "step 1: it needs 2 predictions, but only 1 are known"),
        ([{}, {"start": 3}], {}, "step 2: it needs 3 predictions"),
        ([{"corrector": {"order": 3}}], {}, "step 1: it needs 2 predictions"),
        ([{}, {"order": 7}], {}, "step 2: order = 7 must be a whole number from 1 to 6"),
        ([{"order": True}], {}, "step 1: order = True must be a whole number"),
        ([{"ordre": 1}], {}, "step 1: there is no field 'ordre'"),
        ([{"prediction": "x"}], {}, "step 1: prediction = 'x' must be one of data, noise, v3"),
        ([{}, {"order": 2, "points": []}], {}, "step 2: points = .* must be a list"),
        ([{}, {"order": 2, "points": [1, 1]}], {}, "step 2: order 2 has 1 derivatives"),
        ([{}, {}, {"order": 3, "points": [1, 1]}], {}, "step 3: derivative 2 needs at least 2 other predictions"),
        ([{"relax": "linear"}], {}, "step 1: relax is a factor on the first derivative"),
        ([{}, {"order": 2, "relax_value": 1.0}], {}, "step 2: relax_value belongs to relax = linear"),
        ([{"variable": "rho"}], {}, "step 1: variable = 'rho' is for noise predictions"),
        ([{"corrector": "maybe"}], {}, "step 1: corrector = 'maybe' must be pseudo, implicit or an object"),
        ([{"corrector": {"start": 2}}], {}, "step 1, corrector: there is no field 'start'"),
        ([{"weights": [0.5]}], {}, "step 1: weights add up to 0.5"),
        ([{"weights": [1.0], "order": 1}], {}, "step 1: weights stand instead of order"),
        ([{"weights": [1.0]}], {"repeat": 1}, "step 1: weights are those of certain sigmas"),
        ([{"sigma": 1.0}], {}, "step 1: sigma must be given for the table and for all steps, or for none"),
        (
            [{"sigma": 1.0}, {"sigma": 1.0}],
            {"sigma": 2.0},
            "step 2: sigma = 1 must be below that of the step before, 1",
        ),
        ([{"sigma": float("nan")}], {"sigma": 2.0}, "step 1: sigma = nan must be a number of at least 0"),
        ([{"sigma": 1.0}], {"sigma": 2.0, "repeat": 1}, "leave out the sigmas or repeat"),
        ([{}], {"repeat": 2}, "repeat = 2, but there are only 1 steps"),
        ([{"prediction": "v3"}], {"frame": "vef"}, "step 1: v3 predictions need frame = snr"),
        ([{"prediction": "v3"}], {}, "step 1: v3 predictions need model statistics"),
        ([{}], {"afs": "mean"}, "afs = mean needs model statistics"),
        ([{}], {"afs": "half"}, "USF table: afs = 'half' must be one of none, zero, mean"),
        ([], {}, "steps"),
        ([1], {}, "steps = .1. must be a list of objects"),
        ([{}], {"usf": 2}, "the format 2; this version of Quickstep reads 1"),
    ],
)
def test_mistakes_are_named(steps, head, words):
    with pytest.raises(ValueError, match=words):
        USF(table(*steps, **{"repeat": 0, **head}))


@pytest.mark.parametrize(
    ("text", "words"), [("{", "not valid JSON"), ("[]", "begins with"), ('{"steps": []}', "begins with")]
)
def test_other_texts_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        USF(text)


@pytest.mark.parametrize(
    ("solver", "times", "words"),
    [
        (USF(table({}, {}, repeat=0)), [10.0, 1.0], "the table has 2 steps, so it needs 3 sigmas; 2 were given"),
        (USF(table({}, afs="zero")), [10.0, 0.0], "without any network call"),
        (USF(table({"sigma": 1.0, "weights": [1.0]}, sigma=10.0, repeat=0)), [10.0, 2.0], "sigma 2 was given where it has 1"),
    ],
)  # fmt: skip
def test_runs_that_do_not_fit_are_refused_before_any_call(solver, times, words):
    with pytest.raises(ValueError, match=words):
        sample(Problem(None, VE), solver, torch.zeros(1, 1, 2, 2), times)


EXAMPLES = {
    "dpmpp-2m-karras-10": DPMSolverPP(2),
    "dpmpp-2s-karras-8": DPMSolverSinglestep(2, plan="budget"),
    "unipc-3-karras-8": UniPC(3),
    "deis-3-flow-12": DEIS(3),
    "mixed-karras-8": None,
}


def test_examples_are_what_they_say():
    """docs/schedules: tables to start from. Those named after a sampler are that sampler on their sigmas."""
    files = {path.stem: path for path in (Path(__file__).parents[1] / "docs" / "schedules").glob("*.json")}
    assert files.keys() == EXAMPLES.keys()
    for name, solver in EXAMPLES.items():
        artifact = load(files[name], KIND)
        plan = Table.of(artifact.table)
        process = FLOW if artifact.found_for.process == "flow" else VE
        got = run(USF(plan.text()), process, plan.sigmas)
        assert got.isfinite().all()
        assert solver is None or (got - run(solver, process, plan.sigmas)).abs().max() < 1e-12
