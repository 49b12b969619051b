"""What ``solvers.py`` compares: every sampler of ComfyUI core and of Quickstep, every closed-form schedule of either.

samplers()                    {label: Candidate}
schedules(model_sampling)     {label: (steps -> sigmas)}; what comes to the same sigmas is listed once
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache

import comfy.samplers
import torch
from _exact import constant, model_sampling
from quickstep.nodes.bridge import process_from, sampler
from quickstep.solvers import library
from quickstep.solvers.deis import DEIS
from quickstep.solvers.er_sde import ERSDE
from quickstep.solvers.exponential import DPMSolverPP
from quickstep.solvers.gradient_estimation import GradientEstimation
from quickstep.solvers.method import params, parts
from quickstep.solvers.momentum import GHVB, HB
from quickstep.solvers.pndm import IPNDM
from quickstep.solvers.sa import SASolver
from quickstep.solvers.schedules import CLOSED_FORMS
from quickstep.solvers.solver import Solver
from quickstep.solvers.unipc import UniPC

CORE, QUICKSTEP = "core", "Quickstep"
SETTINGS = {  # what nodes of ComfyUI's own offer beyond the names in KSampler's list
    "dpmpp_3m_sde, eta 0": ("dpmpp_3m_sde", {"eta": 0.0}),
    "dpmpp_2m_sde_heun, eta 0": ("dpmpp_2m_sde_heun", {"eta": 0.0}),
    "dpmpp_2s_ancestral, eta 0": ("dpmpp_2s_ancestral", {"eta": 0.0}),
    "dpmpp_sde, eta 0": ("dpmpp_sde", {"eta": 0.0}),
    "seeds_2, eta 0": ("seeds_2", {"eta": 0.0}),
    "seeds_3, eta 0": ("seeds_3", {"eta": 0.0}),
    "er_sde, ODE": ("er_sde", {"s_noise": 0.0, "noise_scaler": lambda x: x}),
    "sa_solver, eta 0": ("sa_solver", {"tau_func": lambda sigma: 0.0}),
    "sa_solver 2/2, eta 0": ("sa_solver", {"tau_func": lambda sigma: 0.0, "predictor_order": 2, "corrector_order": 2}),
    "lms 2": ("lms", {"order": 2}),
    "lms 3": ("lms", {"order": 3}),
}


TOGETHER = [  # settings that only make sense together
    *(UniPC(order=order, frame="vef") for order in (3, 4)),
    *(UniPC(order=3, variant=variant) for variant in ("bh1", "exact")),
    UniPC(order=3, lower_order_final="never"),
    UniPC(order=3, frame="vef", lower_order_final="never"),
    UniPC(order=2, frame="vef", variant="bh1"),
    DPMSolverPP(order=2, frame="vef", correction="taylor"),
    DPMSolverPP(order=3, frame="vef"),
    DPMSolverPP(order=3, third_order="reference"),
    DPMSolverPP(order=3, third_order="reference", frame="vef"),
    *(DEIS(points=points, variable=v) for points in (2, 4) for v in ("rho", "lambda", "vp")),
    *(IPNDM(points=points, coefficients="exact") for points in (2, 3)),
    *(GradientEstimation(gamma=gamma) for gamma in (1.5, 1.75, 2.5)),
    GHVB(order=2.5),
    GHVB(order=3.5),
    SASolver(predictor_order=3, corrector_order=4, eta=0.0),
    ERSDE(phi="ode", third_order="reference"),
    ERSDE(order=2, phi="ode"),
    HB(DPMSolverPP(), beta=0.9),
    HB(UniPC(order=3), beta=0.8),
    HB(IPNDM(), beta=0.8),
]


@dataclass(frozen=True)
class Candidate:
    """A sampler under its label.

    drop: ComfyUI's KSampler takes the last but one sigma of its schedules out for it. adaptive: it chooses its own steps,
    so the calls depend on the data and the schedule gives the ends only.
    """

    label: str
    side: str
    make: Callable[[], comfy.samplers.KSAMPLER]
    drop: bool = False
    adaptive: bool = False

    @property
    def method(self) -> str:
        """The label without settings."""
        return self.label.partition(",")[0]

    @property
    def another_target(self) -> bool:
        """CFG++ does not solve the guided ODE, so its distance from that solution says nothing."""
        return self.side == CORE and "cfg_pp" in self.label


@lru_cache(maxsize=1)
def samplers() -> dict[str, Candidate]:
    found = {}
    drop = comfy.samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS
    for name in comfy.samplers.SAMPLER_NAMES:
        if name == "ddim" or name.endswith("_gpu"):  # euler, and the same noise from another generator
            continue
        make = lambda name=name: comfy.samplers.sampler_object(name)  # noqa: E731
        found[name] = Candidate(name, CORE, make, name in drop, name == "dpm_adaptive")
    for label, (name, options) in SETTINGS.items():
        found[label] = Candidate(label, CORE, lambda n=name, o=options: comfy.samplers.ksampler(n, o))
    for label, solver in quickstep().items():
        found[label] = Candidate(
            label, QUICKSTEP, lambda solver=solver: sampler(solver), adaptive=solver.nfe(6) is None
        )
    return found


def quickstep() -> dict[str, Solver]:
    """Every solver at its defaults and with one discrete choice changed at a time, and ``TOGETHER``."""
    found: dict[str, Solver] = {_label(solver): solver for solver in TOGETHER}
    for kind in (*library.SOLVERS, *library.WRAPPERS):
        inside = {part.name: DPMSolverPP() for part in parts(kind) if part.kind == "solver"}
        for changed in ({}, *_changes(kind)):
            try:
                solver = kind(**inside, **changed)
            except ValueError:  # settings that do not go together
                continue
            if solver not in found.values():
                found[_label(solver)] = solver
    return found


def _changes(kind: type[Solver]) -> list[dict]:
    """One non-advanced discrete parameter away from its default; eta, which turns noise on or off, counts as one."""
    found = []
    for p in params(kind):
        if p.advanced and p.name not in ("frame", "lower_order_final"):
            continue
        if p.options:
            values = p.options
        elif p.kind is bool:
            values = (False, True)
        elif p.kind is int and p.max is not None and p.min is not None and p.max - p.min <= 5:
            values = range(int(p.min), int(p.max) + 1)
        else:
            values = (0.0, 1.0) if p.name == "eta" else ()
        found += [{p.name: value} for value in values if value != p.default]
    return found


def _label(solver: Solver) -> str:
    values = {f.name: getattr(solver, f.name) for f in fields(solver)}
    changed = [f"{p.name} {values[p.name]}" for p in params(type(solver)) if values[p.name] != p.default]
    inner = values.get("solver")
    around = [] if inner is None or inner == DPMSolverPP() else [f"on {_label(inner)}"]
    return ", ".join([type(solver).__name__, *changed, *around])


def schedules(sampling) -> dict[str, Callable[[int], torch.Tensor]]:
    """ComfyUI's by its names, ours by theirs. One that gives (nearly) the sigmas of an earlier one is left out."""
    process = process_from(sampling)

    def ours(schedule):
        return lambda n: torch.from_numpy(schedule(process, process.t_max, process.t_min, n)).float()

    found = {name: lambda n, name=name: comfy.samplers.calculate_sigmas(sampling, name, n) for name in _names()}
    seen = [make(10) for make in found.values()]
    for kind in CLOSED_FORMS:
        label, make = kind.__name__.removesuffix("Schedule"), ours(kind())
        try:
            sigmas = make(10)
        except ValueError:  # not for this model
            continue
        if not any(len(other) == 11 and torch.allclose(sigmas, other, rtol=2e-3, atol=1e-4) for other in seen):
            found[label] = make
            seen.append(sigmas)
    return found


def _names() -> list[str]:
    return list(comfy.samplers.SCHEDULER_NAMES)


def sigmas_for(candidate: Candidate, schedule: str, made: Callable[[int], torch.Tensor], steps: int) -> torch.Tensor:
    """The sigmas of a run over ``steps`` steps, with ComfyUI's rule for those samplers that lose one."""
    if not (candidate.drop and schedule in _names()):
        return made(steps)
    sigmas = made(steps + 1)
    return torch.cat([sigmas[:-2], sigmas[-1:]])


def within(candidate: Candidate, schedule: str, made: Callable[[int], torch.Tensor], calls: int) -> torch.Tensor | None:
    """The sigmas with the most steps whose run makes at most ``calls`` network calls; None if there are none."""
    for steps in range(calls, 0, -1):
        try:
            sigmas = sigmas_for(candidate, schedule, made, steps)
        except ValueError:  # a schedule that needs more steps
            return None
        if not sigmas.isfinite().all() or not (sigmas.diff() < 0).all():
            continue
        if candidate.adaptive or calls_of(candidate.label, len(sigmas) - 1) <= calls:
            return sigmas
    return None


@lru_cache(maxsize=100_000)
def calls_of(label: str, steps: int) -> int:
    """Network calls over ``steps`` steps, counted without a network."""
    model = constant()
    sigmas = comfy.samplers.calculate_sigmas(model_sampling(False), "karras", steps)
    model.sample(samplers()[label].make(), torch.ones(1, 4, 2, 2), sigmas)
    return model.calls


@lru_cache(maxsize=1_000)
def stochastic(label: str) -> bool:
    """Whether another seed gives another result from the same start."""
    sigmas = torch.tensor([10.0, 5.0, 3.0, 2.0, 1.0, 0.5])
    made = [
        constant().sample(samplers()[label].make(), torch.ones(1, 4, 2, 2), sigmas.clone(), seed) for seed in (1, 2)
    ]
    return not torch.equal(*made)
