"""Find Score Mean and Measure Epsilon Scaling: what is wrong with a network's prediction, measured, and the nodes that use it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from comfy_api.latest import io

from ..solvers.artifact import Artifact, settings_of
from ..solvers.calibration import exposure, score_mean
from ..solvers.calibration.exposure import Choice, FoundEpsilonScaling, Norms
from ..solvers.calibration.families import Plan
from ..solvers.calibration.score_mean import ScoreMean, measure
from ..solvers.calibration.statistics import TEACHER
from ..solvers.calibration.statistics import levels as spread
from ..solvers.process import ForwardProcess
from . import artifacts, plot
from .bridge import distinct, process_of, transformed
from .calibration import MODEL, MORE, SEED, deterministic, prepared, whole
from .calibration_found import CATEGORY
from .calibration_statistics_run import (
    CFG,
    NAME,
    Course,
    gathered,
    kept,
    own_samples,
    samples_input,
    verdict,
)  # fmt: skip
from .derive import PREFIX, node
from .show import show_text

ANY = [io.Sampler.Input("sampler", tooltip="Any sampler, ComfyUI's own included.")]
OUTPUT = [io.Sampler.Output(display_name="sampler")]


class FindScoreMean(io.ComfyNode):
    """Measures the mean error of your model's prediction on pictures, at every level of noise; *Score mean calibration* takes it
    off.

    For each of ``levels`` levels of noise and each picture one network call: eta = mean of the pictures less mean of what the model
    makes of them with noise. Take many pictures of what the model was trained on, or of one concept with its prompt, at CFG 1; what
    the mean of too few pictures cannot tell is left out, and ``report`` says how much was found. Other prompts have other means.

    channel: one number for each channel, for any size. full: a latent, for this size; wants some thousand pictures.

    On a mixture of Gaussians with an error put into its mean, sampling with what was measured is as near to the data as without
    the error (energy distance more than 20 times smaller than with it). Well-trained models gain little.

    Source: Pang et al. (2023), arXiv:2302.10688.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "FindScoreMean",
            display_name="Find Score Mean (Quickstep)",
            category=CATEGORY,
            description="Measures the mean error of your model's prediction on pictures, at every level of noise; Score mean "
            "calibration takes it off.",
            search_aliases=["Calibrated-DPMs", "score mean", "calibrate"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                *MODEL,
                io.Latent.Input("pictures", tooltip="Pictures of the prompts, VAE-encoded, of the latent's size: 100 or more."),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance scale of the measurement: 1 for the positive prompt, 0 for the negative one alone.",
                ),
                io.Combo.Input(
                    "statistics",
                    options=list(score_mean.REDUCTIONS),
                    default="channel",
                    tooltip="channel: one number per channel, for any size. full: every element, for this size, from thousands.",
                ),
                samples_input(1024, "How many of the pictures are used at most."),
                io.Int.Input("levels", default=24, min=2, max=1000, tooltip="Levels of noise: 20 to 40."),
                SEED,
                NAME,
                MORE,
            ],
            outputs=[
                io.String.Output(display_name="file"),
                io.Image.Output(display_name="curve"),
                io.String.Output(display_name="report"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, negative, latent, pictures, cfg, statistics, samples, levels, seed, name, prompts=None
    ) -> io.NodeOutput:
        taker = "Find Score Mean"
        artifacts.free_path(name, ".safetensors", taker)
        given = prepared(model, positive, negative, latent, cfg, seed, prompts, taker)
        process, count = process_of(model), own_samples(samples, pictures)
        numbered = given.numbered(range(count))
        course = Course(levels * len(numbered))
        parts = gathered(given, numbered, pictures, course, taker)
        lam = spread(process, levels)
        eta = course.run(measure(parts, process, lam, statistics, seed), 1, lambda so_far: mean_error(lam, so_far))
        table = {"statistics": statistics, "samples": count, "levels": levels, "network": type(model.model).__name__}
        tensors = {"lam": torch.tensor(lam, dtype=torch.float64), "eta": eta}
        provenance = given.found_for(any_size=statistics == "channel")
        file, _ = kept(name, taker, Artifact(score_mean.KIND, table, tensors, provenance))
        size = sizes(eta)
        told = int((size > 0.0).sum())
        text = (
            f"Saved as {file}: {count} pictures, {levels} levels, CFG {cfg:g}.\nA mean error was told from chance at {told} of the "
            f"levels; its root mean square is {size.max():.4f} at most."
        )
        show_text(cls, text)
        return io.NodeOutput(file, plot.to_image(mean_error(lam, eta)), text)


def sizes(eta: torch.Tensor) -> torch.Tensor:
    """The RMS at each level."""
    return eta.flatten(1).square().mean(1).sqrt()


def mean_error(lam: list[float], eta: Sequence[torch.Tensor] | torch.Tensor):
    """The size of eta at as many of the levels as there are."""
    size = sizes(torch.stack(list(eta))).tolist()
    return plot.line_plot([("eta", lam[: len(size)], size)], "Mean error", "lambda = log(alpha / sigma)", "RMS")


class MeasureEpsilonScaling(io.ComfyNode):
    """Measures how much too large the predicted noise gets in runs of your model, sampler and steps, and whether scaling it helps.

    The model predicts noise on its own runs' samples and on noisy clean samples of the same prompts; the ratio of their norms is
    exposure bias. Divided by are: that ratio at each step, its mean, a line through it, or the best of some uniform factors,
    found by trying. Kept is what brings samples of other seeds nearest to those of 80 steps, or nothing if nothing does: that is
    what happens with exact networks. On flow models noise is scaled, not the velocity.

    For this sampler, schedule and about this guidance scale. The clean samples are the model's own, of 80 steps, so what is
    measured is the error of few steps; what is wrong with the network itself also at many steps is not seen.

    Source: Ning et al. (2023), arXiv:2308.15321; the choice by the finished samples is this pack's.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "MeasureEpsilonScaling",
            display_name="Measure Epsilon Scaling (Quickstep)",
            category=CATEGORY,
            description="Measures how much too large the predicted noise gets in runs of your model, sampler and steps, and "
            "whether scaling it helps.",
            search_aliases=["exposure bias", "ADM-ES", "epsilon scaling", "calibrate"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                *MODEL,
                io.Sampler.Input("sampler", tooltip="The sampler of the runs: a deterministic one of Quickstep's."),
                io.Sigmas.Input("sigmas", tooltip="The schedule of the runs, from the first sigma to 0."),
                CFG,
                samples_input(
                    16, "Seeds of the measurement; as many others choose, and half as many again say what it brings."
                ),
                SEED,
                NAME,
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
        cls, model, positive, negative, latent, sampler, sigmas, cfg, samples, seed, name, prompts=None
    ) -> io.NodeOutput:
        taker = "Measure Epsilon Scaling"
        artifacts.free_path(name, ".json", taker)
        solver = deterministic(sampler, taker)
        given = prepared(model, positive, negative, latent, cfg, seed, prompts, taker)
        process = process_of(model)
        plan = Plan(solver, whole(process, distinct(sigmas.tolist()), taker))
        cohorts, steps = given.split(samples), len(plan.times) - 1
        visits = sum(n * len(c.batches) for n, c in zip((12 + 2 * exposure.ROUNDS, 6, 3), cohorts, strict=True))
        course = Course(visits)
        searched = exposure.search(*cohorts, process, plan, TEACHER)
        choice: Choice = course.run(searched, 1, lambda so_far: factors_drawn(process, so_far))
        provenance = given.found_for(
            solver=solver.id, settings=settings_of(solver), steps=steps,
            loss_before=float(choice.before.mean()), loss_after=float(choice.after.mean()),
        )  # fmt: skip
        table = {**choice.scaling.calibration.table, "tried": choice.tried, "network": type(model.model).__name__}
        file, artifact = kept(name, taker, Artifact(exposure.KIND, table, {}, provenance))
        factors = table["factor"]
        text = (
            f"Saved as {file}: {choice.label}, factors {min(factors):.4f} to {max(factors):.4f}.\n"
            + verdict(choice.before, choice.after, f"{steps} steps of {solver.title}")
            + "\nErrors on the samples that choose: "
            + ", ".join(f"{label} {loss:.4f}" for label, loss in choice.tried.items())
        )
        show_text(cls, text)
        made = FoundEpsilonScaling(artifact) if choice.label != "none" else FoundEpsilonScaling()
        drawn = factors_drawn(process, choice.norms, ("kept", table["lambda"], factors))
        return io.NodeOutput(transformed(sampler, made), plot.to_image(drawn), text)


def factors_drawn(process: ForwardProcess, measured: Norms, *kept: plot.Series):
    """The measured ratios, if there are any, and the factors that are kept."""
    series = list(kept)
    if measured.times:
        series.insert(0, ("measured", [process.lam(t) for t in measured.times], measured.ratio.tolist()))
    title, x_label = "Predicted noise, too large by", "lambda = log(alpha / sigma)"
    return plot.line_plot(series, title, x_label, "factor")


def _around(transform, sampler) -> tuple:
    return (transformed(sampler, transform),)


ScoreMeanNode = node(ScoreMean, "samplers/around any sampler", _around, OUTPUT, before=ANY)
FoundEpsilonScalingNode = node(FoundEpsilonScaling, "samplers/around any sampler", _around, OUTPUT, before=ANY)
