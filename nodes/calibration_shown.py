"""Files of calibrations in words and as drawings."""

from __future__ import annotations

import math

from ..solvers import dc_solver, ems, usf_table
from ..solvers.artifact import Artifact
from ..solvers.caching import auto_diffusion, block_skip, budget, linear_ag, profile
from ..solvers.calibration import boundary, decoupled, exposure, fitted, gaussian, score_mean
from ..solvers.calibration.fitted import FittedSolver
from ..solvers.calibration.library import PROPOSALS
from ..solvers.ems import ModelStatistics
from ..solvers.schedules import CLOSED_FORMS
from . import plot
from .calibration_run import SCHEDULE
from .plot_cells import skipped

WORDS = {
    SCHEDULE: (
        "Sigmas of a schedule",
        "Use Found Schedule with this file, with that sampler and number of steps; other prompts are served as well, other CFG "
        "scales less.",
    ),
    fitted.KIND: (
        "A fitted sampler: sigmas, and weights for each step",
        "Use Fitted solver and Found Schedule with this file; at other CFG scales and sizes compare it first; for other numbers "
        "of steps fit again.",
    ),
    decoupled.KIND: (
        "Sigmas of a schedule, and the noise levels at which the network is asked",
        "Use Decoupled times and Found Schedule with this file, with that sampler; for other CFG scales calibrate again.",
    ),
    usf_table.KIND: (
        "A solver schedule: how each step is made",
        "Use Load Solver Table and USF; for other CFG scales search again.",
    ),
    dc_solver.KIND: (
        "Compensation ratios",
        "Use DC-Solver with this file; for other CFG scales or steps search again.",
    ),
    ems.KIND: (
        "Statistics of a model",
        "Use DPM-Solver-v3 with this file, with any number of steps; for other weights estimate again.",
    ),
    score_mean.KIND: (
        "The mean error of the predicted score",
        "Use Score mean calibration with this file, with prompts and pictures like those; for other weights measure again.",
    ),
    exposure.KIND: (
        "Factors of the predicted noise",
        "Use Found epsilon scaling with this file, with that sampler and number of steps.",
    ),
    gaussian.KIND: (
        "Mean and covariance of pictures",
        "Use Teleport or Signal Leak with this file, for those prompts and that CFG scale.",
    ),
    boundary.KIND: (
        "One start noise for all inputs of a model that gets a picture to work on",
        "Use Start noise (found) with this file, with that sampler, number of steps and CFG scale, and latents of that size.",
    ),
    linear_ag.KIND: (
        "Coefficients of guidance",
        "Use LinearAG with this file, with that sampler, schedule and CFG scale.",
    ),
    profile.KIND: ("How the blocks of a transformer change along a run", "Use TeaCache or MagCache with this file."),
    block_skip.KIND: ("How much each part of a network matters", "Use Block Skip with this file."),
    auto_diffusion.KIND: (
        "Sigmas, and the parts of the network that each step leaves out",
        "Use AutoDiffusion and Found Schedule with this file, with that sampler; for other CFG scales search again.",
    ),
    budget.KIND: ("What accelerators cost and spoil on a model", "Use Acceleration plan with this file."),
}
"""What a file is, by its kind, and which node takes it."""

CURVES = {
    score_mean.KIND: ("lam", ("eta",), "lambda = log(alpha / sigma)"),
    exposure.KIND: ("lambda", ("factor",), "lambda = log(alpha / sigma)"),
    gaussian.KIND: ("jump_sigma", ("jump_error",), "sigma to which is jumped"),
}
"""What is drawn against what, by kind: of the table, or root mean squares over the elements of tensors."""


def in_words(found: Artifact) -> str:
    """What a calibration is for, and how much it helped."""
    f = found.found_for
    what, use = WORDS.get(found.kind, ("A calibration", ""))
    lines = [f"{what} ({found.kind})."]
    known = {"sampler": f.solver, "steps": f.steps, "CFG": f.cfg, "latents of shape": f.shape, "model": f.model}
    said = ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)
    lines.append(f"Found for {said}." if said else "")
    if f.process is not None:
        lines.append("The model is a flow model." if f.process == "flow" else "The model is no flow model.")
    if f.loss_before is not None and f.loss_after is not None:
        lines.append(f"Error on samples kept aside: {f.loss_before:.4f} before, {f.loss_after:.4f} after.")
    elif found.kind in (SCHEDULE, fitted.KIND, decoupled.KIND):
        lines.append("The search was stopped before its result was measured on samples kept aside.")
    if isinstance(found.table.get("proposal"), dict):
        lines.append(measured_in_words(found.table))
    return "\n".join(line for line in (*lines, use) if line)


def measured_in_words(table: dict) -> str:
    """How sigmas came from a measurement, and what else can."""
    names = {method.id: method.title for method in (*PROPOSALS, *CLOSED_FORMS)}
    used = [stored.get("id") if isinstance(stored := table.get(key), dict) else None for key in ("proposal", "start")]
    (made, begin), share = (names.get(id, id) for id in used), table.get("share")
    if not isinstance(share, int | float) or share == 0.0:
        return (
            f"{made} proposed nothing better than the {begin}: these are its sigmas, also for other numbers of steps."
        )
    return (
        f"{made}, {share:.0%} of the way there from the {begin}. The measurement is in the file: Found Schedule makes "
        "sigmas for other numbers of steps from it, which are often worse than a usual schedule."
    )


def drawing(found: Artifact):
    """Sigmas, weights, or whatever numbers the file has."""
    if found.kind == fitted.KIND:
        return _weights(found)
    if found.kind == ems.KIND:
        return statistics_curve(ModelStatistics.of(found))
    if found.kind == auto_diffusion.KIND:
        return skipped(auto_diffusion.skips_of(found))
    if times := found.table.get("sigmas"):
        curves = [("sigmas", range(len(times)), times)]
        proposed = found.table.get("proposed")
        if proposed and proposed != times:
            curves.append(("as proposed", range(len(proposed)), proposed))
        if found.kind == decoupled.KIND:
            curves.append(("asked for", range(len(times)), decoupled.levels(found)))
        return plot.line_plot(curves, "Schedule", "step", "sigma", log_y=times[0] > 1.0)
    if found.kind in CURVES:
        return _curves(found, *CURVES[found.kind])
    for name, values in found.table.items():
        if isinstance(values, list) and values and all(isinstance(v, int | float) for v in values):
            return plot.line_plot([(name, range(len(values)), values)], found.kind, "number", name)
    return _nothing(found)


def _nothing(found: Artifact):
    return plot.line_plot([("nothing to draw", [0, 1], [0, 0])], found.kind, "", "")


def statistics_curve(statistics: ModelStatistics):
    """The statistics against lambda, averaged over elements."""
    lam = statistics.lam.tolist()
    series = [
        (name, lam, value.flatten(1).mean(1).tolist() if value.ndim > 1 else value.tolist())
        for name, value in (("l", statistics.l), ("s", statistics.s), ("b", statistics.b))
    ]
    return plot.line_plot(series, "Model statistics", "lambda = log(alpha / sigma)", "mean over elements")


def _weights(found: Artifact):
    FittedSolver(found)  # refuses damaged ones
    rows = found.table["weights"]
    series = []
    for m in range(max(map(len, rows))):
        points = [(i + 1, row[m]) for i, row in enumerate(rows) if len(row) > m]
        name = "newest prediction" if m == 0 else f"{m} before it"
        series.append((name, [i for i, _ in points], [w for _, w in points]))
    return plot.line_plot(series, "Weights of the predictions", "step", "weight")


def _curves(found: Artifact, along: str, names: tuple[str, ...], title: str):
    numbers = {**found.table, **{name: _sizes(value) for name, value in found.tensors.items()}}
    missing = [name for name in (along, *names) if name not in numbers]
    if missing:
        raise ValueError(f"This file of the kind {found.kind} is damaged: it has no {', '.join(missing)}.")
    x = numbers[along]
    if not x:  # the run was stopped before they were measured
        return _nothing(found)
    if along == "jump_sigma":
        x, title = [math.log10(sigma) for sigma in x], f"log10 {title}"
    return plot.line_plot([(name, x, numbers[name]) for name in names], WORDS[found.kind][0], title, found.kind)


def _sizes(values) -> list[float]:
    """A number for each level: itself, or the root mean square over elements."""
    values = values.double()
    return values.tolist() if values.ndim < 2 else values.flatten(1).square().mean(1).sqrt().tolist()
