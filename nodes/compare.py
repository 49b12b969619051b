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
from ..solvers.solver import check_times
from .attach import ledger_of, measure, sampler_name
from .bridge import distinct, empty_as_model_wants, process_of, sampler
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
                io.Model.Input(
                    "model", tooltip="The model of the reference, and of candidates without one of their own."
                ),
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
                io.Int.Input(
                    "repeats", default=1, min=1, max=20, tooltip="Runs per candidate; seconds are their median."
                ),
                CandidateType.Input("reference", optional=True, tooltip="Instead of the built-in reference."),
                io.Autogrow.Input(
                    "candidates",
                    template=io.Autogrow.TemplatePrefix(
                        CandidateType.Input("candidate", tooltip="One way to sample."),
                        prefix="candidate",
                        min=1,
                        max=16,
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
        cls,
        model,
        positive,
        negative,
        latent,
        vae,
        seed,
        cfg,
        reference_steps,
        repeats,
        candidates=None,
        reference=None,
    ):
        contenders = [c for c in (candidates or {}).values() if c is not None]
        if not contenders:
            raise ValueError("Compare has no candidates; connect at least one Candidate node.")
        if latent["samples"].is_nested:
            raise ValueError("Compare takes one kind of latent, not a combined audio and video latent.")
        full, half = references(model, contenders, reference, reference_steps)
        check(model, [full, half, *contenders])
        bench = Bench(model, positive, negative, empty_as_model_wants(model, latent), seed, cfg)
        bench.expect(full, half, *contenders * repeats)

        half_samples, half_report = bench.run(half)
        truth, report = bench.run(full)
        rows = [row(full, [report], ()), row(half, [half_report], rms_per_sample(half_samples, truth))]
        pictures = [(f"{full.label}: {report.calls} calls", decoded(vae, truth))]
        for contender in contenders:
            runs = [bench.run(contender) for _ in range(repeats)]
            samples = runs[-1][0]
            rows.append(row(contender, [report for _, report in runs], rms_per_sample(samples, truth)))
            caption = f"{contender.label}: {rows[-1].calls} calls, error {rows[-1].mean:.3f}, {rows[-1].seconds:.2f} s"
            pictures.append((caption, decoded(vae, samples)))

        sheet = to_image(picture_grid(pictures, cell=max(96, min(256, pictures[0][1][0].width))))
        table = markdown(rows)
        show_text(cls, table)
        return io.NodeOutput(sheet, to_image(_plot(rows[2:])), table, ui=ui.PreviewImage(sheet, cls=cls))


def references(model, contenders: list[Contender], given: Contender | None, steps: int) -> tuple[Contender, Contender]:
    """The reference and the same with half the steps."""
    if given is not None:
        if len(given.sigmas) < 5:
            raise ValueError(f"The reference has {len(given.sigmas) - 1} steps; with fewer than 4 it is none.")
        half = torch.cat([given.sigmas[:-1:2], given.sigmas[-1:]])
        return replace(given, label="reference"), replace(given, label="reference, half", sigmas=half)
    process, start = process_of(model), float(contenders[0].sigmas[0])
    solver = sampler(DPMSolverPP(order=3, third_order="exact", lower_order_final="never"))

    def made(label: str, n: int) -> Contender:
        times = ExponentialSchedule()(process, start, process.t_min, n)
        return Contender(label, solver, torch.from_numpy(times).float())

    return made("reference", steps), made("reference, half", steps // 2)


def check(model, contenders: list[Contender]) -> None:
    """Refuse, before anything runs, what cannot be sampled or not be compared."""
    process, start = process_of(model), float(contenders[0].sigmas[0])
    for contender in contenders:
        times = distinct(contender.sigmas.tolist())
        try:
            check_times(times, process)
        except ValueError as error:
            raise ValueError(f"Candidate '{contender.label}': {error}") from error
        if abs(times[0] - start) > 0.02 * start:
            raise ValueError(
                f"Candidate '{contender.label}' starts at sigma {times[0]:.4g}, the reference at {start:.4g}; "
                "all must start from the same noise level."
            )


class Bench:
    """Sampling runs under equal conditions, with one progress bar over all of them."""

    def __init__(self, model, positive, negative, latent: dict, seed: int, cfg: float):
        self.model, self.positive, self.negative = model, positive, negative
        self.latent, self.seed, self.cfg = latent, seed, cfg
        self.done, self.bar = 0, comfy.utils.ProgressBar(1)

    def expect(self, *contenders: Contender) -> None:
        """Say what is going to be run."""
        self.bar = comfy.utils.ProgressBar(sum(len(c.sigmas) - 1 for c in contenders))

    def run(self, contender: Contender) -> tuple[torch.Tensor, RunReport]:
        """The samples, and what they cost."""
        model = measure(contender.model or self.model)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(self.positive, self.negative)
        guider.set_cfg(self.cfg)
        start = self.latent["samples"]
        noise = comfy.sample.prepare_noise(start, self.seed, self.latent.get("batch_index"))
        previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

        def callback(step, x0, x, total):
            preview = previewer.decode_latent_to_preview_image("JPEG", x0) if previewer else None
            self.bar.update_absolute(self.done + step + 1, preview=preview)

        samples = guider.sample(
            noise,
            start,
            contender.sampler,
            contender.sigmas,
            denoise_mask=self.latent.get("noise_mask"),
            callback=callback,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=self.seed,
        )
        self.done += len(contender.sigmas) - 1
        ledger = ledger_of(model)
        assert ledger is not None  # measure() gave it one
        return samples.to(comfy.model_management.intermediate_device()), ledger.runs[-1]


def row(contender: Contender, reports: list[RunReport], errors) -> Row:
    last = reports[-1]
    return Row(contender.label, last.calls, last.work, median(r.seconds for r in reports), tuple(errors))


def decoded(vae, samples: torch.Tensor):
    """Pictures of a latent batch; the first frame of videos."""
    images = vae.decode(samples)
    return to_pictures(images[:, 0] if images.ndim == 5 else images)


def _plot(rows: list[Row]):
    labels = list(dict.fromkeys(row.label for row in rows))
    series = []
    for label in labels:
        points = sorted((row.paid, row.mean) for row in rows if row.label == label)
        series.append((label, [p[0] for p in points], [max(p[1], 1e-6) for p in points]))
    return line_plot(
        series,
        "Error to the converged reference",
        "network calls, weighted with the share computed",
        "RMS error",
        log_y=True,
    )


NODES = [Candidate, Compare]
