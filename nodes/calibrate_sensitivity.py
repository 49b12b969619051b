"""Block Sensitivity: which parts of a network matter least, measured once for a model and kept in a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io
from torch import nn

from ..solvers.artifact import Artifact, FoundFor, now, process_name, save
from ..solvers.caching.block_skip import KIND, PROBED, Unit, change
from ..solvers.caching.layers import CROSS, layer_work
from . import artifacts
from .attach import on
from .bridge import empty_as_model_wants, process_of
from .derive import PREFIX
from .fingerprint import fingerprint
from .sites.families import chain
from .sites.layers import blocks_of
from .sites.modules import unet_work
from .sites.scoped import scoped
from .sites.tuning import without

STEPS = 12
TITLE = "Block Sensitivity"


def candidates(model, work: Callable[[nn.Module], float]) -> list[tuple[str, bool, float]]:
    """(path, whole block or not, share of the network's work) of everything that may be left out.

    Of a UNet every layer of its transformers. Of a transformer every block but the first and the last.
    """
    network = model.get_model_object("diffusion_model")
    if hasattr(network, "input_blocks"):
        # A block that changes the number of channels inside has no identity to fall back on.
        blocks = [block for block in blocks_of(network) if getattr(block.module, "is_res", True)]
        return [(layer.name, False, work(module)) for block in blocks for layer, module in block.layers]
    found = chain(network, type(model.model).__name__, TITLE).blocks
    paths = {module: path for path, module in network.named_modules()}
    size = [sum(p.numel() for p in block.parameters() if p.ndim > 1) for block in found]
    return [(paths[block], True, n / sum(size)) for block, n in list(zip(found, size, strict=True))[1:-1]]


class _Probe:
    """A sampler function: Euler steps, and at some of them the same call without each unit in turn."""

    def __init__(self, model, probed: set[int]):
        self.network = model.get_model_object("diffusion_model")
        self.model, self.probed = model, probed
        self.names: list[tuple[str, bool, float]] = []
        self.scores: dict[str, list[float]] = {}

    def __call__(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        ones, extra_args = x.new_ones(len(x)), extra_args or {}
        with _counted(self.network) as work:
            model(x, sigmas[0] * ones, **extra_args)
        self.names = candidates(self.model, work)
        progress = comfy.utils.ProgressBar(len(self.probed) * len(self.names))
        for i, (s, t) in enumerate(pairwise(sigmas)):
            denoised = model(x, s * ones, **extra_args)
            for name, whole, share in self.names if i in self.probed else ():
                comfy.model_management.throw_exception_if_processing_interrupted()
                ((_, module, instead),) = without(self.network, [Unit(name, whole, share, ())], TITLE)
                with scoped({module: instead}):
                    changed = model(x, s * ones, **extra_args)
                self.scores.setdefault(name, []).append(change(x, denoised, changed))
                progress.update(1)
            x = x + (x - denoised) / s * (t - s)
        return x


class _counted:
    """Inside, notes how much each layer of a UNet works; gives a function from module to its share of the network."""

    def __init__(self, network: nn.Module):
        self.network, self.work, self.whole = network, {}, 0.0
        self.handles = []

    def __enter__(self):
        if hasattr(self.network, "input_blocks"):
            self.handles.append(self.network.input_blocks[0][0].register_forward_pre_hook(self._enter))
            for block in blocks_of(self.network):
                for layer, module in block.layers:
                    self.handles.append(module.register_forward_pre_hook(self._layer(layer), with_kwargs=True))
        return lambda module: self.work.get(module, 0.0) / self.whole

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def _enter(self, module, args):
        self.whole += unet_work(self.network, args[0].shape, 0)

    def _layer(self, layer):
        def hook(module, args, kwargs):
            x = args[0]
            context = kwargs.get("context") if layer.kind == CROSS else None
            other = None if context is None else context.shape[1]
            done = len(x) * layer_work(module, layer.kind, x.shape[1:-1].numel(), other)
            self.work[module] = self.work.get(module, 0.0) + done

        return hook


def scan(model, positive, negative, latent: torch.Tensor, cfg: float, seed: int) -> list[dict]:
    """The scores of every unit, the least important first."""
    if on(model):
        raise ValueError(f"{TITLE}: this model has an accelerator on it; take it as it is loaded.")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    if not candidates(model, lambda module: 0.0):
        raise ValueError(
            f"{TITLE}: there is nothing to leave out in this model: its first and last blocks always stay."
        )
    probe = _Probe(model, {round(p * (STEPS - 1)) for p in PROBED})
    noise = comfy.sample.prepare_noise(latent, seed)
    comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        comfy.samplers.KSAMPLER(probe),
        sigmas,
        positive,
        negative,
        latent,
        disable_pbar=True,
        seed=seed,
    )
    rows = [
        {"name": name, "whole": whole, "work": work, "scores": probe.scores[name]} for name, whole, work in probe.names
    ]
    return sorted(rows, key=lambda row: sum(row["scores"]))


class BlockSensitivity(io.ComfyNode):
    """Measures how much each layer or block of a model matters, and saves the scores for Block Skip.

    A run of 12 steps; at 20, 50 and 80 % of it the network is called once more without each part in turn. A UNet of SD
    1.5 takes 144 extra calls, SDXL 630, a transformer three for every block; once for each model, at a small size if
    you like. The score is the relative squared change of the prediction. Models that already have an accelerator are
    refused.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "BlockSensitivity",
            display_name=f"{TITLE} (Quickstep)",
            category="Quickstep/calibration",
            description="Measures how much each layer or block of a model matters, and saves the scores for Block Skip.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model as it is loaded, with its LoRAs, without accelerators."),
                io.Conditioning.Input("positive", tooltip="A typical prompt."),
                io.Conditioning.Input("negative", tooltip="A typical negative prompt."),
                io.Latent.Input("latent", tooltip="An empty latent of the size you use; a smaller one is faster."),
                io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1, tooltip="The guidance scale you use."),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, tooltip="The noise of the run."),
                io.String.Input("name", default="my_scores", tooltip="Name of the file, without folders or ending."),
            ],
            outputs=[io.String.Output(display_name="file"), io.String.Output(display_name="scores")],
        )

    @classmethod
    def execute(cls, model, positive, negative, latent, cfg, seed, name) -> io.NodeOutput:
        path = artifacts.free_path(name, ".json", TITLE)
        samples = empty_as_model_wants(model, latent)["samples"]
        rows = scan(model, positive, negative, samples, cfg, seed)
        found_for = FoundFor(
            model=fingerprint(model), process=process_name(process_of(model)), steps=STEPS, cfg=float(cfg), seed=seed,
            shape=tuple(samples.shape[1:]), created=now(),
        )  # fmt: skip
        save(path, Artifact(KIND, {"units": rows}, found_for=found_for))
        return io.NodeOutput(os.path.basename(path), in_words(rows))


def in_words(rows: list[dict]) -> str:
    """One line per unit."""
    return "\n".join(
        f"{sum(r['scores']) / len(r['scores']):.2e}  {100 * r['work']:5.2f} % of the work  {r['name']}" for r in rows
    )


NODES = [BlockSensitivity]
