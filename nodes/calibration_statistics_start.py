"""Measure Gaussian, Teleport and Signal Leak: how a run begins, from the mean and covariance of pictures."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import replace

import torch
from comfy_api.latest import io

from ..solvers.artifact import Artifact
from ..solvers.calibration.cohort import Cohort, track
from ..solvers.calibration.gaussian import KIND, GaussianStatistics
from ..solvers.calibration.statistics import TEACHER
from ..solvers.calibration.teacher import lesson
from ..solvers.noise import gaussian
from ..solvers.process import ForwardProcess
from ..solvers.solver import check_times
from . import artifacts, plot
from .bridge import distinct, empty_as_model_wants, process_of
from .calibration import MODEL, MORE, SEED, prepared
from .calibration_found import CATEGORY
from .calibration_statistics_run import (
    CFG,
    NAME,
    PICTURES,
    STEPS,
    Course,
    gathered,
    kept,
    own_samples,
    samples_input,
)  # fmt: skip
from .derive import PREFIX
from .show import show_text

GOOD = 0.02
"""Relative error of a jump up to which the report recommends it."""

FILE_TIP = "A file of Measure Gaussian in models/quickstep."


class MeasureGaussian(io.ComfyNode):
    """Measures mean and covariance of pictures of your prompts, for *Teleport*, which leaves out the first steps of a run, and for
    *Signal Leak*, which begins it at the right brightness.

    The pictures are ``pictures``, or ``samples`` that the guided model makes of your prompts in 20 steps; one prompt gives
    statistics of that prompt. They are kept for the ``frequencies`` lowest frequencies in each dimension, the rest as one number
    for each channel, so that other sizes can be served. rank 0 keeps the variance of each frequency, which 32 samples tell; a rank
    keeps so many directions (at most half as many as samples), for some hundred samples or more.

    ``report`` says how far a jump from the start to each sigma is from the model's own way there, on samples of other seeds: that
    is where *Teleport* should end. Guidance makes a model less Gaussian: on the demo networks at CFG 4, with 16 samples of one
    prompt, the jump is off by 2 % at sigma 13 and 5.5 % at 8.4 from 4519 (UNet), by 2 % at 0.99 and 5 % at 0.96 from 1 (DiT).

    Source: Wang and Vastola (2024), arXiv:2412.09726; Everaert et al. (2023), arXiv:2309.15842. The frequencies are this pack's.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "MeasureGaussian",
            display_name="Measure Gaussian (Quickstep)",
            category=CATEGORY,
            description="Measures mean and covariance of pictures of your prompts, for Teleport, which leaves out the first steps "
            "of a run, and for Signal Leak, which begins it at the right brightness.",
            search_aliases=["Gaussian score", "analytic teleportation", "signal leak", "calibrate"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                *MODEL,
                CFG,
                samples_input(64, "How many samples: 32 to 64 with rank 0, more than twice the rank otherwise."),
                io.Int.Input(
                    "frequencies",
                    default=16,
                    min=1,
                    max=4096,
                    tooltip="Frequencies in each dimension that are kept; 3 is enough for Signal Leak. No more than the smallest "
                    "size it will be used at.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Directions of the covariance among the kept frequencies; 0: each frequency for itself.",
                ),
                SEED,
                NAME,
                PICTURES,
                MORE,
            ],
            outputs=[
                io.String.Output(display_name="file"),
                io.Image.Output(display_name="curve"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent, cfg, samples, frequencies, rank, seed, name, pictures=None, prompts=None
    ) -> io.NodeOutput:
        taker = "Measure Gaussian"
        artifacts.free_path(name, ".safetensors", taker)
        given = prepared(model, positive, negative, latent, cfg, seed, prompts, taker)
        if len(given.shape) < 2:
            raise ValueError(f"{taker}: a latent of shape {given.shape} has no dimensions besides its channels.")
        process, count = process_of(model), own_samples(samples, pictures)
        _, _, aside = given.split(min(count, 32))
        numbered = given.numbered(range(count))
        made = 0 if pictures else STEPS * len(numbered)
        course = Course(made + TEACHER * len(aside.batches))
        parts = gathered(given, numbered, pictures, course, taker)
        statistics = GaussianStatistics.measured(torch.cat([part.x0 for part in parts]), frequencies, rank)
        table = {
            "jump_error": [], "jump_sigma": [], "samples": count, "rank": len(statistics.eig),
            "network": type(model.model).__name__,
        }  # fmt: skip
        artifact = Artifact(KIND, table, statistics.tensors(), given.found_for())
        file, _ = kept(name, taker, artifact)  # already, since what follows may be stopped
        jumped = jumps(aside, process, statistics)
        times, errors = course.run(jumped, TEACHER, lambda so_far: jumps_drawn(process, *so_far))
        sigma = next((t for t, e in reversed(list(zip(times, errors, strict=True))) if e <= GOOD), None)
        whole = replace(artifact, table={**table, "jump_error": errors, "jump_sigma": times})
        kept(name, taker, whole, before=file)
        shown = range(0, len(times), max(len(times) // 12, 1))
        text = (
            f"Saved as {file}: {count} samples, {statistics.mean[0].size} frequencies, rank {len(statistics.eig)}.\n"
            + (
                f"A jump down to sigma {sigma:.3g} is off by no more than {GOOD:.0%} of the sample."
                if sigma is not None
                else f"Every jump is off by more than {GOOD:.0%} of the sample: do not teleport."
            )
            + "\nsigma: error of the jump\n"
            + "\n".join(f"{times[i]:.4g}: {errors[i]:.2%}" for i in shown)
        )
        show_text(cls, text)
        return io.NodeOutput(file, plot.to_image(jumps_drawn(process, times, errors)), text)


def jumps_drawn(process: ForwardProcess, times: list[float], errors: list[float]):
    lam = [process.lam(t) for t in times]
    return plot.line_plot(
        [("jump", lam, errors)], "Error of a jump to there", "lambda = log(alpha / sigma)", "share of x"
    )


Jumps = tuple[list[float], list[float]]
"""Times, and the error of a jump to each."""


def jumps(cohort: Cohort, process: ForwardProcess, statistics: GaussianStatistics) -> Generator[Jumps, None, Jumps]:
    """Times of the teacher's run, and how far a jump from the start to each is from its state there, as a share of its RMS.
    Yields those of the samples so far."""
    plan = lesson(process, TEACHER)
    times = [t for t in plan.times[1:-1] if process.sigma(t) > 0.05 * process.alpha(t)][::2]
    totals, samples, errors = [0.0] * len(times), 0, []
    for batch in cohort.batches:
        trail = cohort.visit(batch, lambda problem, x: track(problem, plan, x))
        states = dict(zip(plan.times, (mark.x.cpu().double() for mark in trail), strict=True))
        for i, t in enumerate(times):
            off = statistics.jump(process, states[plan.times[0]], plan.times[0], t) - states[t]
            share = off.flatten(1).norm(dim=1) / states[t].flatten(1).norm(dim=1).clamp_min(1e-12)
            totals[i] += float(share.sum())
        samples += len(trail[0].x)
        errors = [total / samples for total in totals]
        yield times, errors
    return times, errors


class Teleport(io.ComfyNode):
    """Leaves out the first steps of a run: jumps from the noise to where the step after them begins, by an exact formula for
    pictures that are Gaussian, which at high noise they nearly are. No network call.

    Connect ``latent`` and ``sigmas`` to a custom sampler with Disable Noise in place of the noise (or to KSampler (Advanced) with
    add_noise off and start_at_step = skip). The noise is the one you would have sampled from, so the seed makes the same picture.
    Give the schedule as many steps more as are skipped. Any sampler; what it adds of noise later is its own affair.

    x_t = alpha_t m + F (x_s - alpha_s m), see ``gaussian.py``; statistics from *Measure Gaussian*, whose report says how far down
    a jump is good. They draw all pictures to those they are of: measure them for your prompt and CFG. 15 to 30 % of the steps of
    EDM's schedule were skipped at equal FID in the paper, without guidance; of guided latents only that report tells.

    Raises ValueError for a file for another process, or a latent of other channels.

    Source: Wang and Vastola (2024), arXiv:2412.09726.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "Teleport",
            display_name="Teleport (Quickstep)",
            category=CATEGORY,
            description="Leaves out the first steps of a run: jumps from the noise to where the step after them begins, by an "
            "exact formula for pictures that are Gaussian, which at high noise they nearly are.",
            search_aliases=["Gaussian score", "analytic teleportation"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will sample."),
                io.Noise.Input("noise", tooltip="The noise you would sample from, such as RandomNoise."),
                io.Latent.Input("latent", tooltip="The latent you would sample from, usually empty."),
                io.Sigmas.Input("sigmas", tooltip="The whole schedule, from the first sigma on."),
                io.Combo.Input("file", options=artifacts.files(KIND), tooltip=FILE_TIP),
                io.Int.Input(
                    "skip", default=2, min=1, max=1000, tooltip="Steps to leave out; see Measure Gaussian's report."
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent"), io.Sigmas.Output(display_name="sigmas")],
        )

    @classmethod
    def execute(cls, model, noise, latent, sigmas, file, skip) -> io.NodeOutput:
        taker, process = "Teleport", process_of(model)
        statistics = chosen(file, taker)
        times = distinct(sigmas.tolist())
        check_times(times, process)
        if not 0 < skip < len(times) or times[skip] <= 0.0:
            raise ValueError(
                f"{taker}: skip = {skip} must leave a sigma above 0; the schedule has {len(times) - 1} steps."
            )
        latent = empty_as_model_wants(model, latent)
        x = begun(model, noise.generate_noise(latent), latent["samples"], times[0])
        x = statistics.jump(process, x, times[0], times[skip])
        sampling = model.get_model_object("model_sampling")
        x = sampling.inverse_noise_scaling(torch.tensor(times[skip], dtype=x.dtype), x)
        made = {**latent, "samples": model.model.process_latent_out(x)}
        return io.NodeOutput(made, torch.tensor(times[skip:], dtype=sigmas.dtype))

    @classmethod
    def fingerprint_inputs(cls, file, **unused):
        return artifacts.modified(file)


def begun(model, noise: torch.Tensor, latent: torch.Tensor, sigma: float) -> torch.Tensor:
    """The noisy start that ComfyUI's samplers make of these."""
    sampling = model.get_model_object("model_sampling")
    top = float(sampling.sigma_max)
    full = math.isclose(top, sigma, rel_tol=1e-5) or sigma > top
    inner = model.model.process_latent_in(latent) if latent.count_nonzero() else latent
    start = torch.tensor([sigma], dtype=torch.float32)
    return sampling.noise_scaling(start, noise.float().clone(), inner.float().clone(), full)


def chosen(file: str, taker: str) -> GaussianStatistics:
    """What is in the chosen file."""
    found = artifacts.read(file, KIND, taker)
    if found is None:
        raise ValueError(f"{taker}: choose a file of Measure Gaussian.")
    return GaussianStatistics.of(found)


class SignalLeak(io.ComfyNode):
    """A latent to sample from instead of an empty one: what of a picture is still to be seen at a model's first sigma, drawn at
    random from the statistics of pictures. Against pictures that all come out equally bright.

    Models that are no flow models were trained to see pictures at their first sigma, about one fifteenth of the noise in Stable
    Diffusion, but are sampled from noise alone. x = sigma noise + x~ with x~ from *Measure Gaussian*: give it to any sampler as
    latent, with noise and denoise 1. Statistics of few pictures (7 or more) of one style carry that style's colours over.

    Flow models and those with zero terminal SNR begin with pure noise, where nothing leaks: the latent has no effect there unless
    the schedule begins lower. Here high frequencies have one variance for each channel, in the paper a mean and variance for each
    pixel.

    Source: Everaert et al. (2023), arXiv:2309.15842.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "SignalLeak",
            display_name="Signal Leak (Quickstep)",
            category=CATEGORY,
            description="A latent to sample from instead of an empty one: what of a picture is still to be seen at a model's first "
            "sigma. Against pictures that all come out equally bright.",
            search_aliases=["signal-leak bias", "offset noise", "brightness"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will sample."),
                io.Latent.Input("latent", tooltip="An empty latent of the size and batch to be sampled."),
                io.Combo.Input("file", options=artifacts.files(KIND), tooltip=FILE_TIP),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Factor of the leak: 1 is right, 0 is an empty latent, more exaggerates a style.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the leak; another one than that of the noise changes brightness and layout alone.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, model, latent, file, strength, seed) -> io.NodeOutput:
        statistics = chosen(file, "Signal Leak")
        latent = empty_as_model_wants(model, latent)
        # Not the stream that the same seed gives ComfyUI's noise.
        z = gaussian(torch.zeros_like(latent["samples"], dtype=torch.float32, device="cpu"), seed)(1.0, 0.0)
        leak = strength * statistics.draw(z)
        return io.NodeOutput({**latent, "samples": model.model.process_latent_out(leak)})

    @classmethod
    def fingerprint_inputs(cls, file, **unused):
        return artifacts.modified(file)
