"""Diffusion Time: where a run may begin."""

from __future__ import annotations

import math

import torch
from comfy_api.latest import io

from ..solvers.calibration.diffusion_time import lowest, mismatch, spectrum
from ..solvers.calibration.gaussian import KIND
from ..solvers.solver import check_times
from . import artifacts
from .bridge import distinct, empty_as_model_wants, process_of
from .calibration_found import CATEGORY
from .calibration_statistics_start import FILE_TIP, chosen
from .derive import PREFIX
from .show import show_text

NEAR = 0.9999
"""Sigmas less apart than that are one."""


class DiffusionTime(io.ComfyNode):
    """Begins a run lower, where noise can still be taken for noised pictures of your prompts, and says how far from that it is. For
    5 steps and less, on models whose first sigma is higher than it need be.

    The divergence is that between N(m, Lambda + k^2) and N(0, k^2), k = sigma / alpha, see ``diffusion_time.py``; mean m and
    covariance Lambda come from *Measure Gaussian*. It bounds how far pictures get from the model's own because of the start, if
    steps were exact. ``sigmas`` begin with the lowest sigma within ``nats``, then follow those of the given schedule below it.
    ``sigma`` is that start, for schedules that take one.

    Latents have many numbers, and their divergence is the sum of all: with a mean of 0.5 in one channel of 128 x 128, a start at
    sigma 14.6 is 10 nats away already. Then the node changes nothing, and says so. *Teleport* and *Signal Leak* begin with the
    right mean and covariance instead of noise (the paper's second model does that too): they have no divergence of this kind, and
    *Measure Gaussian* says how low they may begin.

    On a mixture of Gaussians in 16 dimensions, Karras from 14.6 and from 6 (0.012 nats), energy distance to the data: 5 steps,
    Euler .071 .054, 2M .051 .046; 8 steps .027 .026, .012 .011; 10 steps .019 .020, .007 .010. From 3 (0.08 nats) it is worse from
    8 steps on.

    Raises ValueError for a file that is not of this latent's channels, and for sigmas the model does not have.

    Source: Franzese et al. (2022), arXiv:2206.05173 (read in its abstract): the divergence is a part of its bound. The other part,
    the error of the score, which grows with the diffusion time, is not measured.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "DiffusionTime",
            display_name="Diffusion Time (Quickstep)",
            category=CATEGORY,
            description="Begins a run lower, where noise can still be taken for noised pictures of your prompts, and says how far "
            "from that it is. For 5 steps and less, on models whose first sigma is higher than it need be.",
            search_aliases=["start sigma", "how much is enough", "2206.05173"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The model that will sample."),
                io.Latent.Input("latent", tooltip="A latent of the size to be sampled."),
                io.Sigmas.Input("sigmas", tooltip="The whole schedule, from the first sigma on."),
                io.Combo.Input("file", options=artifacts.files(KIND), tooltip=FILE_TIP),
                io.Float.Input(
                    "nats",
                    default=0.02,
                    min=0.0001,
                    max=10000.0,
                    step=0.001,
                    tooltip="Divergence that is allowed at the start: 0.02 can change one picture in ten. Raise it to begin lower.",
                ),
            ],
            outputs=[
                io.Sigmas.Output(display_name="sigmas"),
                io.Float.Output(display_name="sigma"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(cls, model, latent, sigmas, file, nats) -> io.NodeOutput:
        taker, process = "Diffusion Time", process_of(model)
        statistics = chosen(file, taker)
        times = distinct(sigmas.tolist())
        check_times(times, process)
        shape = empty_as_model_wants(model, latent)["samples"].shape
        if shape[1] != len(statistics.mean):
            raise ValueError(
                f"{taker}: the file is of latents with {len(statistics.mean)} channels, and this latent has {shape[1]}."
            )
        pictures = spectrum(statistics, tuple(shape[2:]), process.noise_scale)
        start = lowest(process, pictures, nats)
        if start > NEAR * times[0]:
            start = times[0]
        made = [start, *(t for t in times if t < NEAR * start)]
        far = {t: mismatch(pictures, float(process.rho(t)[0])) for t in (*times[:-1], start)}
        text = (
            (
                f"The run begins at sigma {start:.4g} instead of {times[0]:.4g}: {len(made) - 1} steps."
                if start < times[0]
                else f"It begins at sigma {times[0]:.4g} as before: no lower sigma is within {nats:g} nats."
            )
            + "\nsigma: nats between noise and noised pictures; at most this share of pictures changes\n"
            + "\n".join(
                f"{t:.4g}: {far[t]:.3g}; {min(math.sqrt(far[t] / 2.0), 1.0):.0%}" for t in sorted(far, reverse=True)
            )
        )
        show_text(cls, text)
        return io.NodeOutput(torch.tensor(made, dtype=sigmas.dtype), start, text)

    @classmethod
    def fingerprint_inputs(cls, file, **unused):
        return artifacts.modified(file)


NODES = [DiffusionTime]
