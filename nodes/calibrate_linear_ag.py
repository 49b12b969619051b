"""Calibration of LinearAG: a few runs with full guidance, then least squares."""

from __future__ import annotations

import os

import comfy.sample
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ..solvers.artifact import Artifact, FoundFor, now, process_name, save
from ..solvers.caching.guiding import direction
from ..solvers.caching.linear_ag import KIND
from ..solvers.caching.linear_ag_fit import fit, full_steps, loss
from . import artifacts
from .attach import on, sampler_name
from .bridge import empty_as_model_wants, process_of
from .derive import PREFIX
from .fingerprint import fingerprint
from .show import show_text

TITLE = "Calibrate LinearAG"


class CalibrateLinearAG(io.ComfyNode):
    """Finds LinearAG's coefficients for a model, prompt, sampler and schedule, and saves them to models/quickstep.

    Samples ``runs`` times with full guidance from different noise, records both sides of every call, and fits the
    coefficients by least squares on all runs but the last. The last run is kept aside: the text says how far the
    negative side is off there, relative to the difference of the two sides, with reuse of the last difference and with
    the fit. The latent's batch counts as runs too. Use the CFG, sampler and sigmas of the runs to be accelerated.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "CalibrateLinearAG",
            display_name=f"{TITLE} (Quickstep)",
            category="Quickstep/calibration",
            description="Finds LinearAG's coefficients for a model, sampler and schedule, and saves them to models/quickstep.",
            search_aliases=["adaptive guidance", "CFG", "calibration"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The model to calibrate for, without accelerators."),
                io.Conditioning.Input("positive", tooltip="A typical prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt of the runs to be accelerated."),
                io.Sampler.Input("sampler", tooltip="A sampler with one network call per step."),
                io.Sigmas.Input("sigmas", tooltip="The schedule; the calibration fits this one only."),
                io.Latent.Input("latent_image", tooltip="Size and batch of the runs, usually empty."),
                io.Float.Input("cfg", default=7.0, min=1.0, max=100.0, step=0.1, tooltip="Guidance scale of the runs."),
                io.Int.Input("interval", default=3, min=2, max=20, tooltip="Both sides are computed in one step of this many."),
                io.Int.Input("warmup", default=4, min=1, max=100, tooltip="First steps in which both sides are computed."),
                io.Int.Input(
                    "history", default=2, min=1, max=6, tooltip="How many steps back the coefficients reach.", advanced=True
                ),
                io.Int.Input("runs", default=3, min=2, max=64, tooltip="Runs with full guidance; the last is kept aside."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip="Noise of the first run."),
                io.String.Input("name", default="linear_ag", tooltip="Name of the file, without folders or ending."),
            ],
            outputs=[io.String.Output(display_name="file"), io.String.Output(display_name="text")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, negative, sampler, sigmas, latent_image, cfg, interval, warmup, history, runs, seed, name
    ) -> io.NodeOutput:
        path = artifacts.free_path(name, ".json", TITLE)
        if on(model):
            raise ValueError(f"{TITLE}: give it the model without accelerators; this one has {on(model)[0].title}.")
        times, steps = sigmas.tolist(), len(sigmas) - 1
        if all(full_steps(steps, interval, warmup)):
            raise ValueError(f"{TITLE}: with warmup = {warmup} nothing is left out in {steps} steps; lower it.")
        latent = empty_as_model_wants(model, latent_image)["samples"]
        made = []
        for i in range(runs):
            own = (seed + i) % 2**64
            noise = comfy.sample.prepare_noise(latent, own)
            made.append(_recorded(model, noise, cfg, sampler, sigmas, positive, negative, latent, own))
            if len(made[-1]) != steps:
                raise ValueError(
                    f"{TITLE}: {sampler_name(sampler)} made {len(made[-1])} guided calls in {steps} steps; it takes a "
                    "sampler with one call per step, a CFG other than 1, and a guider with one negative side."
                )
        coefficients = fit(made[:-1], steps, interval, warmup, history)
        before, after = (loss(made[-1], c) for c in (fit([], steps, interval, warmup, history), coefficients))
        found_for = FoundFor(
            model=fingerprint(model), process=process_name(process_of(model)), solver=sampler_name(sampler),
            settings={"interval": interval, "warmup": warmup, "history": history, "runs": runs},
            steps=steps, cfg=float(cfg), shape=tuple(latent.shape[1:]), seed=seed, created=now(),
            loss_before=before, loss_after=after,
        )  # fmt: skip
        save(path, Artifact(KIND, {"times": times, "steps": coefficients}, found_for=found_for))
        text = f"{os.path.basename(path)}: guidance off by {before:.1%} with reuse, {after:.1%} with the fit"
        show_text(cls, text)
        return io.NodeOutput(os.path.basename(path), text)


def _recorded(model, noise, cfg, sampler, sigmas, positive, negative, latent, seed):
    """(d_c, d_u) of every guided call of a run, on the CPU."""
    made: list[tuple[torch.Tensor, torch.Tensor]] = []

    def record(executor, base, conds, x, timestep, model_options):
        out = executor(base, conds, x, timestep, model_options)
        if len(conds) == 2 and None not in conds:
            made.append(tuple(direction(x, timestep, side).cpu() for side in out))
        return out

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, f"{PREFIX}record", record)
    comfy.sample.sample_custom(
        clone, noise, cfg, sampler, sigmas, positive, negative, latent, disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )  # fmt: skip
    return made


NODES = [CalibrateLinearAG]
