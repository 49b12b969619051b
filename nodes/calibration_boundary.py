"""Find Start Noise and Start noise (found): one noise that is good for all inputs of a model that is conditioned on pictures."""

from __future__ import annotations

import comfy.sample
import torch
from comfy_api.latest import io

from ..solvers.calibration.boundary import KIND, Race, Reference
from ..solvers.calibration.families import Plan
from . import artifacts, plot
from .bridge import distinct, latent_in, process_of
from .calibration import SEED, deterministic, prepared, whole
from .calibration_boundary_run import Hunt, curve
from .calibration_found import CATEGORY, fits
from .calibration_samples import Samples, batch_of
from .calibration_shown import in_words
from .calibration_statistics_run import CFG
from .derive import PREFIX
from .show import show_text


def _more(id: str, what: str) -> io.Autogrow.Input:
    template = io.Conditioning.Input(id, tooltip=f"The {what} of the next reference, in their order.", optional=True)
    return io.Autogrow.Input(
        f"{id}s", template=io.Autogrow.TemplatePrefix(template, prefix=id, min=0, max=100), optional=True
    )


class FindStartNoise(io.ComfyNode):
    """Finds one start noise that is good for all inputs of a model that gets a picture to work on (upscaling, inpainting,
    restoration), so that few steps give steady results. *Start noise (found)* uses it.

    Give it pictures as they should come out, VAE-encoded, as ``references``, and what the model gets for each as ``positive`` and
    ``negative``: either one conditioning that holds a batch of as many pictures, or one conditioning for each reference, the
    others under ``positive0`` and on. One alone without pictures serves all. ``candidates`` random noises race: all on ``few``
    references, the best share ``keep`` on more of them, the last on all; the least mean RMS difference of latents wins. With three
    references or more the last third is kept aside, and ``report`` says how the noise does on it against eight random ones. Runs
    begin from an empty latent with no mask, which is how to use the noise too.

    For this model, size, sampler, sigmas and about this guidance scale. Stop at any time: the file has the best so far.

    Honest limits: the demo networks get no pictures, so what it brings on a model that does was not measured. On pictures that are
    Gaussian given the input it brings little, and less the larger they are: the best of 64 noises on 16 references has 0.987 of a
    random one's error at 4x32x32 and 0.999 at 16x128x128. The RMS of latents rewards smooth results, where the paper compares
    decoded pictures by LPIPS. All results share one noise, so a texture it brings is in all of them.

    Raises ValueError for references of other channels than the model's, as many conditionings as are neither one nor one for each
    reference, and samplers that add noise.

    Source: Ma et al. (2023), arXiv:2305.15357; the race and the loss are this pack's.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "FindStartNoise",
            display_name="Find Start Noise (A+) (Quickstep)",
            category=CATEGORY,
            description="Finds one start noise that is good for all inputs of a model that gets a picture to work on (upscaling, "
            "inpainting, restoration), so that few steps give steady results.",
            search_aliases=["A+", "optimal boundary condition", "super-resolution", "noise search", "calibrate"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The model, LoRAs and patches included. It is not changed."),
                io.Conditioning.Input("positive", tooltip="With the pictures to work on, or that of the first one."),
                io.Conditioning.Input(
                    "negative", tooltip="The negative of the same node; many hold the pictures as well."
                ),
                io.Latent.Input("references", tooltip="What should come out for each input, VAE-encoded, as a batch."),
                io.Sampler.Input("sampler", tooltip="The sampler of the runs: a deterministic one of Quickstep's."),
                io.Sigmas.Input("sigmas", tooltip="The schedule of the runs, from the first sigma to 0."),
                CFG,
                io.Int.Input("candidates", default=64, min=1, max=100_000, tooltip="Noises that race: 64 to 1000."),
                io.Float.Input(
                    "minutes",
                    default=10.0,
                    min=0.05,
                    max=1440.0,
                    step=0.5,
                    tooltip="Ends the race after about this time with the best so far.",
                ),
                SEED,
                io.String.Input(
                    "name", default="my_noise", tooltip="Name of the file in models/quickstep, without ending."
                ),
                io.Int.Input(
                    "few",
                    default=4,
                    min=1,
                    max=100_000,
                    tooltip="References that all candidates run on. As many as there are: no race, all run on all.",
                    advanced=True,
                ),
                io.Float.Input(
                    "keep",
                    default=0.25,
                    min=0.05,
                    max=0.9,
                    step=0.05,
                    tooltip="Share of the candidates that go on, each time on so many times more references. Raise it if few "
                    "references tell little.",
                    advanced=True,
                ),
                io.Int.Input(
                    "together",
                    default=4,
                    min=1,
                    max=4096,
                    tooltip="How many noises run at once: as many as fit in memory.",
                    advanced=True,
                ),
                _more("positive", "positive"),
                _more("negative", "negative"),
            ],
            outputs=[
                io.Noise.Output(display_name="noise"),
                io.Image.Output(display_name="curve"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, references, sampler, sigmas, cfg, candidates, minutes, seed, name, few=4, keep=0.25,
        together=4, positives=None, negatives=None,
    ) -> io.NodeOutput:  # fmt: skip
        taker = "Find Start Noise"
        path = artifacts.free_path(name, ".safetensors", taker)
        solver = deterministic(sampler, taker)
        plan = Plan(solver, whole(process_of(model), distinct(sigmas.tolist()), taker))
        given = prepared(model, positive, negative, references, cfg, seed, None, taker)
        count = len(given.latent["samples"])
        pairs = zip(
            each(positive, positives, count, f"{taker}: positive"),
            each(negative, negatives, count, f"{taker}: negative"),
            strict=True,
        )
        every = wanted(given, list(pairs), taker)
        fit = count - count // 3
        empty = torch.zeros_like(given.latent["samples"][:1], device="cpu")

        def draw(i: int) -> torch.Tensor:
            return comfy.sample.prepare_noise(empty, seed + i)

        race = Race(every[:fit], plan, draw, candidates, few, keep, together)
        hunt = Hunt(race, every[fit:], given, minutes, path)
        hunt.run()
        assert race.best is not None
        text = hunt.report()
        show_text(cls, text)
        return io.NodeOutput(FoundNoise(draw(race.best)[0], seed + race.best), plot.to_image(curve(race)), text)


def each(first: list, more: dict | None, count: int, where: str) -> list[list]:
    """A conditioning for each of so many references: taken from a batch, one for all, or as many as there are."""
    them = [first, *(one for one in (more or {}).values() if one is not None)]
    if len(them) == 1:
        if count > 1 and any(_hints(options.get("control")) > 1 for _, options in first):
            raise ValueError(
                f"{where}: its ControlNet has a batch of pictures, which is not taken apart; connect one conditioning for each "
                "reference."
            )
        return [[[_row(text, i, count), _rows(options, i, count)] for text, options in first] for i in range(count)]
    if len(them) != count:
        raise ValueError(
            f"{where}: {len(them)} conditionings are connected; connect one, or {count}, one per reference."
        )
    return them


def _hints(control) -> int:
    """Of the pictures in a chain of ControlNets, the largest batch."""
    most = 0
    while control is not None:
        most = max(most, 0 if control.cond_hint_original is None else len(control.cond_hint_original))
        control = control.previous_controlnet
    return most


def _rows(options: dict, i: int, count: int) -> dict:
    return {
        name: [_row(v, i, count) for v in value] if isinstance(value, list) else _row(value, i, count)
        for name, value in options.items()
    }


def _row(value, i: int, count: int):
    """That of the i-th reference, of a tensor that has a row for each."""
    return value[i : i + 1] if isinstance(value, torch.Tensor) and value.ndim and len(value) == count else value


def wanted(given: Samples, pairs: list[tuple[list, list]], taker: str) -> list[Reference]:
    """The references, and runs with the conditionings of each."""
    channels = given.model.get_model_object("latent_format").latent_channels
    if given.shape[0] != channels:
        raise ValueError(
            f"{taker}: the references have {given.shape[0]} channels, but the model has {channels}; encode them with its VAE."
        )
    x0 = latent_in(given.model, given.latent).cpu().float()

    def begin(positive, negative):
        def batch(noise: torch.Tensor):
            return batch_of(
                given.model, positive, negative, given.cfg, noise, torch.zeros_like(noise), None, given.seed
            )

        return batch

    return [Reference(x0[i : i + 1], begin(*pair)) for i, pair in enumerate(pairs)]


class FoundNoise:
    """A NOISE of ComfyUI's: the same one for every latent of a batch; ``seed`` is what samplers draw their own noise with."""

    def __init__(self, noise: torch.Tensor, seed: int):
        self.noise, self.seed = noise, seed

    def generate_noise(self, input_latent: dict) -> torch.Tensor:
        latent = input_latent["samples"]
        here = None if latent.is_nested else tuple(latent.shape[1:])
        if here != tuple(self.noise.shape):
            raise ValueError(
                f"Start noise (found): it was found for latents of shape {tuple(self.noise.shape)}, and this one is "
                f"{'a combined audio and video latent' if here is None else f'of shape {here}'}; find one for this size."
            )
        return self.noise.to("cpu", latent.dtype).repeat(len(latent), *[1] * self.noise.ndim)


class StartNoise(io.ComfyNode):
    """The noise that *Find Start Noise* found, in place of RandomNoise, for SamplerCustomAdvanced.

    Every latent of a batch gets the same noise, as it is good for all inputs. Only for latents of the size it was found for, and
    for the model, sampler, sigmas and about the guidance scale that ``about`` names; begin from an empty latent with denoise 1.
    Connect the model to have it checked: another kind of network is refused, other weights of it are said in ``about``.

    Raises ValueError for a latent of another shape.

    Source: Ma et al. (2023), arXiv:2305.15357.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "StartNoise",
            display_name="Start noise (found) (Quickstep)",
            category=CATEGORY,
            description="The noise that Find Start Noise found, in place of RandomNoise, for SamplerCustomAdvanced.",
            search_aliases=["A+", "optimal boundary condition", "super-resolution"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=artifacts.files(KIND),
                    tooltip="A file of Find Start Noise in models/quickstep.",
                ),
                io.Model.Input("model", optional=True, tooltip="The model it is used with, to check that it fits."),
            ],
            outputs=[io.Noise.Output(display_name="noise"), io.String.Output(display_name="about")],
        )

    @classmethod
    def execute(cls, file, model=None) -> io.NodeOutput:
        taker = "Start noise (found)"
        found = artifacts.read(file, KIND, taker)
        if found is None:
            raise ValueError(f"{taker}: choose a file of Find Start Noise.")
        noise, seed = found.tensors.get("noise"), found.table.get("seed")
        if noise is None or not isinstance(seed, int):
            raise ValueError(f"{taker}: {file} is damaged: it has no noise or no seed.")
        said = [] if model is None else fits(found, model, file, taker)
        return io.NodeOutput(FoundNoise(noise, seed), "\n".join([in_words(found), *said]))

    @classmethod
    def fingerprint_inputs(cls, file, model=None):
        return artifacts.modified(file)


NODES = [FindStartNoise, StartNoise]
