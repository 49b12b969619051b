"""Run several ways to sample side by side, from the same noise, against a converged reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io, ui

from ..solvers.compare import Row, markdown, rms_per_sample
from ..solvers.exponential import DPMSolverPP
from ..solvers.report import RunReport
from ..solvers.schedules import ExponentialSchedule
from .attach import ledger_of, measure, sampler_name
from .bridge import process_of, sampler
from .plot import line_plot, picture_grid, to_image, to_pictures
from .show import show_text

CandidateType = io.Custom("QUICKSTEP_CANDIDATE")
NO_SIGMAS = "needs at least two sigmas"


@dataclass(frozen=True)
class Contender:
    """What travels on a candidate link."""

    label: str
    sampler: object
    sigmas: torch.Tensor
    model: object | None = None


class Candidate(io.ComfyNode):
    """One way to sample, for the Compare node: a sampler, its sigmas and, if it needs one, a patched model.

    Without a model, Compare's own is used. Candidates with the same label become one line in the plot.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Quickstep_Candidate",
            display_name="Candidate (Quickstep)",
            category="Quickstep/tools",
            description="One way to sample, for the Compare node: a sampler, its sigmas and, if needed, a patched model.",
            inputs=[
                io.Sampler.Input("sampler", tooltip="Any sampler: Quickstep's or ComfyUI's (KSamplerSelect)."),
                io.Sigmas.Input("sigmas", tooltip="Any schedule, ending in 0."),
                io.Model.Input("model", optional=True, tooltip="A model with an accelerator; empty: Compare's model."),
                io.String.Input(
                    "label",
                    default="",
                    tooltip="Name in pictures, table and plot; empty: the sampler's. The same label makes one line in the plot.",
                ),
            ],
            outputs=[CandidateType.Output(display_name="candidate")],
        )

    @classmethod
    def execute(cls, sampler, sigmas, label="", model=None):
        label = label.strip() or sampler_name(sampler)
        if sigmas.ndim != 1 or len(sigmas) < 2:
            raise ValueError(f"Candidate '{label}' has sigmas of shape {tuple(sigmas.shape)}; it {NO_SIGMAS}.")
        if float(sigmas[-1]) != 0.0:
            raise ValueError(
                f"The sigmas of candidate '{label}' end at {float(sigmas[-1]):.4g}; to be compared they must end in 0."
            )
        return io.NodeOutput(Contender(label, sampler, sigmas, model))


class Compare(io.ComfyNode):
    """Runs every candidate from the same noise and a converged reference, and says what each costs and how far it is off.

    The reference is DPM-Solver++ (3M, exact) with ``reference_steps`` steps uniform in log-SNR, or the optional
    ``reference`` candidate. It is run once more with half the steps; the row "reference, half" shows how far the reference itself
    is from being converged, and no candidate closer than that can be told apart.

    The error is the root mean square difference to the reference per sample, in the units of the latent (for the demo
    model: pixels in [-1, 1]). It measures how faithfully a sampler solves the model's equation, not beauty. Stochastic
    samplers solve another equation: their error stays large and says nothing.

    "network work" is the share of the network that was computed, measured against calling all of it at every call. The
    plot counts calls times that share. Seconds exclude loading; the median of ``repeats`` runs.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Quickstep_Compare",
            display_name="Compare (Quickstep)",
            category="Quickstep/tools",
            description="Runs several samplers, schedules or accelerators from the same noise against a converged "
            "reference: pictures, a plot and a table of calls, seconds and error.",
            search_aliases=["benchmark", "xy plot", "grid"],
            inputs=[
                io.Model.Input("model", tooltip="The model of the reference, and of candidates without one of their own."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, used with CFG above 1."),
                io.Latent.Input("latent", tooltip="The latent to start from; its batch is the row of pictures."),
                io.Vae.Input("vae", tooltip="Decodes the pictures."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Every candidate starts from the noise of this seed.",
                ),
                io.Float.Input("cfg", default=3.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance scale of all runs."),
                io.Int.Input(
                    "reference_steps", default=100, min=4, max=1000, tooltip="Steps of the converged reference."
                ),
                io.Int.Input("repeats", default=1, min=1, max=20, tooltip="Runs per candidate; seconds are their median."),
                CandidateType.Input("reference", optional=True, tooltip="Instead of the built-in reference."),
                io.Autogrow.Input(
                    "candidates",
                    template=io.Autogrow.TemplatePrefix(
                        CandidateType.Input("candidate", tooltip="One way to sample."), prefix="candidate", min=1, max=16
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(display_name="pictures"),
                io.Image.Output(display_name="plot"),
                io.String.Output(display_name="table"),
            ],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent, vae, seed, cfg, reference_steps, repeats, candidates=None, reference=None
    ):
        contenders = [c for c in (candidates or {}).values() if c is not None]
        if not contenders:
            raise ValueError("Compare has no candidates; connect at least one Candidate node.")
        full, half = references(model, contenders, reference, reference_steps)
        plan = [(half, 1), (full, 1), *((c, repeats) for c in contenders)]
        bar = comfy.utils.ProgressBar(sum((len(c.sigmas) - 1) * n for c, n in plan))
        latent = dict(latent)
        latent["samples"] = comfy.sample.fix_empty_latent_channels(
            model, latent["samples"], *_downscale(latent)
        )

        pictures, rows, done, truth = [], [], 0, None
        half_run = None
        for contender, times in plan:
            runs = []
            for _ in range(times):
                samples, report = run(replace(contender, model=contender.model or model), positive, negative, latent, seed, cfg, bar, done)
                runs.append(report.seconds)
                done += len(contender.sigmas) - 1
            if contender is half:
                half_run = (samples, report)
                continue
            if contender is full:
                truth = samples
                rows.append(Row(full.label, report.calls, report.work, median(runs), ()))
                errors = tuple(rms_per_sample(half_run[0], truth))
                rows.append(Row(half.label, half_run[1].calls, half_run[1].work, half_run[1].seconds, errors))
                caption = f"{full.label}: {report.calls} calls"
            else:
                errors = tuple(rms_per_sample(samples, truth))
                rows.append(Row(contender.label, report.calls, report.work, median(runs), errors))
                caption = f"{contender.label}: {rows[-1].calls} calls, error {rows[-1].mean:.3f}, {rows[-1].seconds:.2f} s"
            pictures.append((caption, to_pictures(_decode(vae, samples))))

        sheet = to_image(picture_grid(pictures, cell=max(96, min(256, pictures[0][1][0].width))))
        plot = to_image(_plot(rows[2:]))
        table = markdown(rows)
        show_text(cls, table)
        return io.NodeOutput(sheet, plot, table, ui=ui.PreviewImage(sheet, cls=cls))


def references(model, contenders: list[Contender], given: Contender | None, steps: int) -> tuple[Contender, Contender]:
    """The reference and the same with half the steps."""
    if given is not None:
        kept = given.sigmas[:-1:2]
        half = torch.cat([kept, given.sigmas[-1:]])
        full, start = given, float(given.sigmas[0])
        made = (replace(full, label="reference"), replace(full, label="reference, half", sigmas=half))
    else:
        process, start = process_of(model), float(contenders[0].sigmas[0])
        solver = sampler(DPMSolverPP(order=3, third_order="exact", lower_order_final="never"))
        schedule = ExponentialSchedule()

        def sigmas(n: int) -> torch.Tensor:
            return torch.from_numpy(schedule(process, start, process.t_min, n)).float()

        made = (
            Contender("reference", solver, sigmas(steps)),
            Contender("reference, half", solver, sigmas(max(2, steps // 2))),
        )
    for contender in contenders:
        first = float(contender.sigmas[0])
        if abs(first - start) > 0.02 * start:
            raise ValueError(
                f"Candidate '{contender.label}' starts at sigma {first:.4g}, the reference at {start:.4g}; "
                "all must start from the same noise level."
            )
    return made


def run(contender: Contender, positive, negative, latent, seed, cfg, bar, done) -> tuple[torch.Tensor, RunReport]:
    """One measured sampling run; ``bar`` continues from ``done``."""
    model = measure(contender.model)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    noise = comfy.sample.prepare_noise(latent["samples"], seed, latent.get("batch_index"))
    previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

    def callback(step, x0, x, total):
        preview = previewer.decode_latent_to_preview_image("JPEG", x0) if previewer else None
        bar.update_absolute(done + step + 1, preview=preview)

    samples = guider.sample(
        noise,
        latent["samples"],
        contender.sampler,
        contender.sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return samples.to(comfy.model_management.intermediate_device()), ledger_of(model).runs[-1]


def _downscale(latent: dict) -> tuple:
    """What ComfyUI >= 0.17 notes on an empty latent so that it can be resized to the model's scale."""
    noted = [latent.pop(f"downscale_ratio_{kind}", None) for kind in ("spacial", "temporal")]
    return tuple(noted) if any(value is not None for value in noted) else ()


def _decode(vae, samples: torch.Tensor) -> torch.Tensor:
    """Pictures of a latent batch; the first frame of videos."""
    images = vae.decode(samples)
    return images[:, 0] if images.ndim == 5 else images


def _plot(rows: list[Row]):
    labels = list(dict.fromkeys(row.label for row in rows))
    series = []
    for label in labels:
        points = sorted((row.paid, row.mean) for row in rows if row.label == label)
        series.append((label, [p[0] for p in points], [max(p[1], 1e-6) for p in points]))
    return line_plot(
        series, "Error to the converged reference", "network calls, weighted with the share computed", "RMS error", log_y=True
    )


NODES = [Candidate, Compare]
