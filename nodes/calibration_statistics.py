"""Statistics of the user's own model: what nodes that gather them share, and the statistics of DPM-Solver-v3."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io

from ..solvers import ems
from ..solvers.artifact import Artifact, FoundFor, now, process_name, save
from ..solvers.calibration.cohort import Cohort, Running
from ..solvers.calibration.families import Plan
from ..solvers.calibration.statistics import TEACHER, Part, compared, drawn, levels
from ..solvers.dpm_solver_v3 import DPMSolverV3
from ..solvers.ems import ModelStatistics
from ..solvers.ems_estimate import CALLS, estimate
from ..solvers.exponential import DPMSolverPP
from ..solvers.process import ForwardProcess
from ..solvers.schedules import ExponentialSchedule, KarrasSchedule, UniformSchedule
from ..solvers.solver import Solver
from . import artifacts, plot
from .bridge import latent_in, process_of, sampler
from .calibration import MODEL, MORE, prepared
from .calibration_found import CATEGORY
from .calibration_samples import Samples
from .derive import PREFIX
from .fingerprint import fingerprint
from .show import show_text

STEPS = 20
"""Of the runs that make clean samples where no pictures are given."""

CFG = io.Float.Input(
    "cfg", default=4.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance scale: what is measured is for this one."
)
SEED = io.Int.Input(
    "seed",
    default=0,
    min=0,
    max=0xFFFFFFFF,
    control_after_generate=io.ControlAfterGenerate.fixed,
    tooltip="First of the seeds; the others follow it.",
)
NAME = io.String.Input("name", default="my_statistics", tooltip="Name of the file in models/quickstep, without ending.")
PICTURES = io.Latent.Input(
    "pictures",
    optional=True,
    tooltip="Pictures of the prompts, VAE-encoded, of the size of the latent. Without them the model makes its own.",
)


def samples_input(default: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input("samples", default=default, min=1, max=65536, tooltip=tooltip)


@dataclass
class Course:
    """Runs what yields after every visit of the network, with a progress bar of so many network calls, until the user stops it."""

    total: int
    done: int = 0
    bar: Any = field(init=False)

    def __post_init__(self):
        self.bar = comfy.utils.ProgressBar(self.total)
        self.bar.update_absolute(0)

    def run(self, running: Running, each: int) -> Any:
        """What it returns; a visit is ``each`` calls."""
        while True:
            comfy.model_management.throw_exception_if_processing_interrupted()
            try:
                next(running)
            except StopIteration as end:
                return end.value
            self.done += each
            self.bar.update_absolute(min(self.done, self.total))


def own_samples(given: Samples, count: int, pictures: dict | None) -> int:
    """How many samples there are to be, pictures or made ones."""
    return count if pictures is None else min(count, len(pictures["samples"]))


def gathered(given: Samples, count: int, pictures: dict | None, course: Course, taker: str) -> list[Part]:
    """Clean samples beside the batches that know their prompts: pictures if there are some, else made in ``STEPS`` steps."""
    process = process_of(given.model)
    numbered = given.numbered(range(own_samples(given, count, pictures)))
    if pictures is None:
        return course.run(drawn([batch for _, batch in numbered], process, STEPS), STEPS)
    x0 = latent_in(given.model, pictures).cpu().float()
    if tuple(x0.shape[1:]) != given.shape:
        raise ValueError(
            f"{taker}: the pictures are of shape {tuple(x0.shape[1:])}, but the latent is of shape {given.shape}; make them the "
            "same size."
        )
    return [Part(batch, x0[rows]) for rows, batch in numbered]


def found_for(given: Samples, **more) -> FoundFor:
    """The provenance of what was measured on these samples."""
    return FoundFor(
        model=fingerprint(given.model), process=process_name(process_of(given.model)), cfg=given.cfg, shape=given.shape,
        seed=given.seed, created=now(), **more,
    )  # fmt: skip


def kept(name: str, taker: str, artifact: Artifact) -> tuple[str, Artifact]:
    """Writes the file; its name, and what is in it."""
    path = artifacts.free_path(name, ".safetensors" if artifact.tensors else ".json", taker)
    save(path, artifact)
    return os.path.basename(path), artifact


def schedules(process: ForwardProcess, steps: int) -> list[list[float]]:
    """Those on which samplers are compared, each at its best."""
    made = (UniformSchedule(), KarrasSchedule(), ExponentialSchedule())
    return [schedule(process, process.t_max, process.t_min, steps).tolist() for schedule in made]


def contest(aside: Cohort, process: ForwardProcess, steps: int, solvers: Sequence[Solver], course: Course) -> list:
    """The errors of each solver, on that of the usual schedules where their mean is least."""
    plans = [Plan(solver, times) for solver in solvers for times in schedules(process, steps)]
    errors = course.run(compared(aside, process, plans), contest_calls(steps, len(solvers)) // (1 + len(plans)))
    each = len(plans) // len(solvers)
    return [min(errors[i : i + each], key=lambda e: float(e.mean())) for i in range(0, len(errors), each)]


def contest_calls(steps: int, solvers: int) -> int:
    """Network calls of ``contest`` for one batch."""
    return TEACHER + 3 * solvers * steps


def verdict(before: torch.Tensor, after: torch.Tensor, what: str) -> str:
    """One sentence about errors of the same samples without and with what was measured."""
    better = int((after < before).sum())
    return (
        f"{what}: error {before.mean():.4f} before, {after.mean():.4f} with it, on {len(before)} samples kept aside, of which "
        f"{better} are nearer to the teacher."
    )


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
    economy with 9 000 calls cuts the root mean square error of DPM-Solver++ 2M by a third at 5, 8 and 10 steps and by half at 20;
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
        process, count = process_of(model), own_samples(given, samples, pictures)
        batches = len(given.numbered(range(count)))
        _, _, aside = given.split(min(count, 32))
        course = Course(
            batches * (levels * CALLS + (0 if pictures else STEPS)) + len(aside.batches) * contest_calls(steps, 2)
        )
        parts = gathered(given, samples, pictures, course, taker)
        measured = course.run(_estimated(parts, process, levels, KINDS[statistics], seed, delta), CALLS)
        found = DPMSolverV3(statistics=measured)
        before, after = contest(aside, process, steps, (DPMSolverPP(), found), course)
        provenance = found_for(given, loss_before=float(before.mean()), loss_after=float(after.mean()))
        table = {"statistics": statistics, "samples": count, "levels": levels, "network": type(model.model).__name__}
        file, artifact = kept(name, taker, Artifact(ems.KIND, table, measured.tensors(), provenance))
        text = (
            f"Saved as {file}: {statistics}, {count} samples, {levels} levels.\n"
            + verdict(before, after, f"{steps} steps, against DPM-Solver++ 2M")
            + f"\nFor {cfg:g} CFG"
            + (
                f" and latents of shape {given.shape}."
                if KINDS[statistics][1] == "full"
                else " and latents of any size."
            )
        )
        show_text(cls, text)
        solver = DPMSolverV3(statistics=ModelStatistics.of(artifact))
        return io.NodeOutput(sampler(solver), plot.to_image(curve(measured)), text)


def _estimated(parts, process, count: int, kind, seed: int, delta: float) -> Running:
    """The statistics, yielding after every visit."""
    last = None
    for progress in estimate(parts, process, levels(process, count, 2 * delta), *kind[:2], seed=seed, delta=delta):
        if progress.statistics is None:
            yield
        last = progress
    return last.statistics


def curve(statistics: ModelStatistics):
    """The statistics against lambda, averaged over elements."""
    lam = statistics.lam.tolist()
    series = [
        (name, lam, value.flatten(1).mean(1).tolist() if value.ndim > 1 else value.tolist())
        for name, value in (("l", statistics.l), ("s", statistics.s), ("b", statistics.b))
    ]
    return plot.line_plot(series, "Model statistics", "lambda = log(alpha / sigma)", "mean over elements")


NODES = [EstimateStatistics]
