"""What TeaCache and MagCache need to know of a model, measured on it."""

from __future__ import annotations

import os

import comfy.sample
import comfy.utils
import latent_preview
from comfy_api.latest import io

from ..solvers.artifact import Artifact, FoundFor, now, process_name, save
from ..solvers.caching.profile import KIND
from ..solvers.caching.profiling import BlockProfiler
from . import artifacts
from .attach import attach, on, sampler_name
from .bridge import empty_as_model_wants, process_of
from .derive import PREFIX
from .fingerprint import fingerprint
from .sites.families import chain

NAME = "Calibrate Block Caches"


class CalibrateBlocks(io.ComfyNode):
    """Samples once and writes a file about this model for TeaCache and MagCache, in models/quickstep.

    Give it the model as you use it, LoRAs included, but before any accelerator; the prompt, steps, sampler and guidance scale
    that you use; a latent of the usual size. Nothing is skipped in that run. One prompt is enough, more of them in one batch
    are better. The file holds a polynomial of degree 4, from the change of the first block's modulated input to the change of
    what all blocks add (least squares), and how the size of that changes along sampling. It belongs to this model's weights:
    another model refuses it, other steps or another guidance scale than here are said in the report.

    An existing file is never overwritten: the name gets a number.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "CalibrateBlocks",
            display_name=f"{NAME} (Quickstep)",
            category="Quickstep/accelerators",
            description="Samples once and writes a file about this model for TeaCache and MagCache, in models/quickstep.",
            search_aliases=["TeaCache", "MagCache", "calibration"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model, before any accelerator."),
                io.Conditioning.Input("positive", tooltip="A usual prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, used with CFG above 1."),
                io.Float.Input("cfg", default=4.0, min=0.0, max=100.0, step=0.1, tooltip="The guidance scale you use."),
                io.Sampler.Input("sampler", tooltip="The sampler you use; not one that adds noise, if you can choose."),
                io.Sigmas.Input("sigmas", tooltip="The schedule you use; at least 20 steps."),
                io.Latent.Input("latent", tooltip="An empty latent of the size you use."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip="Of the noise."),
                io.String.Input("name", default="my_model", tooltip="Name of the file, without folders or ending."),
            ],
            outputs=[io.String.Output(display_name="file")],
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg, sampler, sigmas, latent, seed, name) -> io.NodeOutput:
        if on(model):
            raise ValueError(f"{NAME}: {on(model)[0].title} is on this model; take the model from before it.")
        network = model.get_model_object("diffusion_model")
        found = chain(network, type(model.model).__name__, NAME)
        path = artifacts.free_path(name, ".json", NAME)
        profiler = BlockProfiler()
        measured = attach(model, profiler)
        image = empty_as_model_wants(measured, latent)["samples"]
        comfy.sample.sample_custom(
            measured, comfy.sample.prepare_noise(image, seed, latent.get("batch_index")), cfg, sampler, sigmas, positive,
            negative, image, noise_mask=latent.get("noise_mask"), seed=seed,
            callback=latent_preview.prepare_callback(measured, len(sigmas) - 1),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        )  # fmt: skip
        try:
            profile = profiler.profile_of(type(network).__name__, len(found))
        except ValueError as error:
            raise ValueError(f"{NAME}: {error}") from None
        found_for = FoundFor(
            model=fingerprint(model),
            process=process_name(process_of(model)),
            steps=len(sigmas) - 1,
            cfg=float(cfg),
            shape=tuple(image.shape[1:]),
            seed=seed,
            settings={"sampler": sampler_name(sampler)},
            created=now(),
        )
        save(path, Artifact(KIND, profile.table(), found_for=found_for))
        return io.NodeOutput(os.path.basename(path))


NODES = [CalibrateBlocks]
