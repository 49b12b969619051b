"""Estimate Model Statistics: what DPM-Solver-v3 knows of the user's own model."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..solvers import ems
from ..solvers.artifact import Artifact
from ..solvers.calibration.statistics import levels as spread
from ..solvers.dpm_solver_v3 import DPMSolverV3
from ..solvers.ems import ModelStatistics
from ..solvers.ems_estimate import CALLS, estimate
from ..solvers.exponential import DPMSolverPP
from . import artifacts, plot
from .bridge import process_of, sampler
from .calibration import MODEL, MORE, SEED, prepared
from .calibration_found import CATEGORY
from .calibration_shown import statistics_curve
from .calibration_statistics_run import (
    CFG,
    NAME,
    PICTURES,
    STEPS,
    Course,
    contest,
    contest_calls,
    gathered,
    kept,
    own_samples,
    samples_input,
    verdict,
)  # fmt: skip
from .derive import PREFIX
from .show import show_text

KINDS = {
    "economy": ("scalar", "full", "l and s one number, b for every element"),
    "scalar": ("scalar", "channel", "l and s one number, b per channel"),
    "channel": ("channel", "channel", "all per channel"),
    "full": ("full", "full", "all for every element, as in the paper"),
}
"""What is measured: reduction of l and s, of b, and in words."""


class EstimateStatistics(io.ComfyNode):
    """Measures what DPM-Solver-v3 wants to know of your model: how its prediction changes with the sample and along the run.

    At ``levels`` levels of noise, on ``samples`` noisy samples, five network calls each: differences of the guided model give
    the statistics l, s and b (see *DPM-Solver-v3*). Needs no gradients. The samples are ``pictures``, or what the model makes
    of your prompts in 20 steps. The file lies in models/quickstep, where *DPM-Solver-v3* lists it; ``sampler`` is that sampler.

    economy: l and s are one number for each level, b is a latent: 20 levels and 64 samples do, but only for this size.
    scalar and channel: b is one number for each channel, so other sizes are served too; with less gain where pictures have a
    structure in common, such as a plain background or one subject. full: the paper's, which has 1024 samples or more and 120 to
    1200 levels, days of work for a large model; below some hundred samples it is no better than economy.

    For about this guidance scale; other prompts, seeds, steps and schedules are served as well. On a mixture of 12 Gaussians,
    economy with 9 000 calls cuts the root mean square error of DPM-Solver++ 2M by a third at 5, 8, 10 and 20 steps;
    most of that is that fewer samples end elsewhere, and the median sample is hardly better. A fitted solver (*Fit Solver*) gains
    more for one number of steps. ``report`` compares on your model, each
    sampler on its best of three usual schedules, and the gain may be none.

    Source: Zheng et al. (2023), arXiv:2310.13268, section 3. Differences, economy and smoothing are this pack's.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "EstimateStatistics",
            display_name="Estimate Model Statistics (Quickstep)",
            category=CATEGORY,
            description="Measures what DPM-Solver-v3 wants to know of your model: how its prediction changes with the sample and "
            "along the run.",
            search_aliases=["DPM-Solver-v3", "EMS", "empirical model statistics", "calibrate"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                *MODEL,
                CFG,
                io.Combo.Input(
                    "statistics",
                    options=list(KINDS),
                    default="economy",
                    tooltip="; ".join(f"{name}: {words}" for name, (_, _, words) in KINDS.items())
                    + ". Take scalar or channel for use at other sizes.",
                ),
                samples_input(64, "How many samples: 64 for economy, scalar and channel, 1024 or more for full."),
                io.Int.Input(
                    "levels",
                    default=24,
                    min=3,
                    max=2000,
                    tooltip="Levels of noise: 20 to 40 for economy, the paper has 120 to 1200.",
                ),
                io.Int.Input(
                    "steps",
                    default=8,
                    min=1,
                    max=100,
                    tooltip="Steps of the runs by which the report says how much it helps; the file serves any number.",
                ),
                SEED,
                NAME,
                io.Float.Input(
                    "delta",
                    default=0.05,
                    min=0.001,
                    max=0.5,
                    step=0.001,
                    tooltip="Size of the differences. Raise it to 0.1 for models in half precision if the curves are noisy.",
                    advanced=True,
                ),
                PICTURES,
                MORE,
            ],
            outputs=[
                io.Sampler.Output(display_name="sampler"),
                io.Image.Output(display_name="curve"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent, cfg, statistics, samples, levels, steps, seed, name, delta=0.05, pictures=None,
        prompts=None,
    ) -> io.NodeOutput:  # fmt: skip
        taker = "Estimate Model Statistics"
        artifacts.free_path(name, ".safetensors", taker)
        given = prepared(model, positive, negative, latent, cfg, seed, prompts, taker)
        process, count = process_of(model), own_samples(samples, pictures)
        numbered = given.numbered(range(count))
        _, _, aside = given.split(min(count, 32))
        course = Course(
            len(numbered) * (levels * CALLS + (0 if pictures else STEPS)) + len(aside.batches) * contest_calls(steps, 2)
        )
        parts = gathered(given, numbered, pictures, course, taker)
        estimated = _estimated(parts, process, levels, KINDS[statistics], seed, delta)
        measured = course.run(estimated, CALLS, lambda so_far: statistics_curve(so_far()))
        found = DPMSolverV3(statistics=measured)
        sized = KINDS[statistics][1] == "full"
        table = {"statistics": statistics, "samples": count, "levels": levels, "network": type(model.model).__name__}
        artifact = Artifact(ems.KIND, table, measured.tensors(), given.found_for(any_size=not sized))
        file, _ = kept(name, taker, artifact)  # already, since what follows may be stopped
        before, after = contest(aside, process, steps, (DPMSolverPP(), found), course)
        losses = dict(loss_before=float(before.mean()), loss_after=float(after.mean()))
        kept(name, taker, replace(artifact, found_for=replace(artifact.found_for, **losses)), before=file)
        text = (
            f"Saved as {file}: {statistics}, {count} samples, {levels} levels.\n"
            + verdict(before, after, f"{steps} steps, against DPM-Solver++ 2M")
            + f"\nFor {cfg:g} CFG"
            + (f" and latents of shape {given.shape}." if sized else " and latents of any size.")
        )
        show_text(cls, text)
        solver = DPMSolverV3(statistics=ModelStatistics.of(artifact))
        return io.NodeOutput(sampler(solver), plot.to_image(statistics_curve(measured)), text)


def _estimated(parts, process, count: int, kind, seed: int, delta: float):
    """The statistics; after every visit yields what computes those so far."""
    last = None
    for progress in estimate(parts, process, spread(process, count, 2 * delta), *kind[:2], seed=seed, delta=delta):
        if progress.statistics is None:
            yield progress.so_far
        last = progress
    return last.statistics
