"""Several models in one sampling run, and a gate that has a branch computed only if a score asks for it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import comfy.model_sampling
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ..solvers.stitch import Alternate, Rule, TStitch, TStitchModel
from .attach import ledger_of, measure
from .derive import PREFIX, node
from .stitch_run import Run, standing_in

KEY = "quickstep.stitch"
IMAGE_TO_IMAGE = (comfy.model_sampling.IMG_TO_IMG, comfy.model_sampling.IMG_TO_IMG_FLOW)
Space = tuple[float, torch.Tensor | None]
WIDTHS = ("context_dim", "context_in_dim", "text_dim", "cap_feat_dim", "joint_attention_dim", "caption_channels")

log = logging.getLogger("quickstep")


# ---- before the run: what can be stitched ----------------------------------------------------------------------------


def stitched(guiders: list, settings: TStitch | Alternate):
    """``(guider, its model)``: the last of ``guiders``, sampling with all of them. None of those given is changed."""
    title, rule = settings.title, settings.rule(len(guiders))
    for number, guider in enumerate(guiders, 1):
        if not isinstance(guider, comfy.samplers.CFGGuider):
            raise ValueError(f"{title}: guider {number} is a {type(guider).__name__}, which has no model to call.")
    guiders = [copy.copy(guider) for guider in guiders]
    *others, last = guiders
    spaces = [space(last.model_patcher, other.model_patcher, title) for other in others]
    for i, guider in enumerate(guiders):
        if any(torn(g.model_patcher, guider.model_patcher, hooked(g) or hooked(guider)) for g in guiders[:i]):
            run_on(guider, independent(guider.model_patcher, title))
    run_on(last, _with_wrapper(last.model_patcher, lambda live: others, spaces, rule, settings))
    return last, last.model_patcher


def stitched_model(model, small, settings: TStitchModel):
    """A clone of ``model``, measured, whose first part of sampling ``small`` computes, whatever the guider."""
    title = settings.title
    spaces = [space(model, small, title)]
    same_prompts(model, small, title)
    if torn(model, small, hooks=False):
        small = independent(small, title)

    def others(live) -> list:
        if hooked(live) and live.model_patcher.model is small.model:
            raise ValueError(f"{title}: both models are one, and the prompts have hooks, which change its weights.")
        return [run_on(copy.copy(live), small)]

    return _with_wrapper(model, others, spaces, settings.rule(2), settings)


def run_on(guider, model):
    """The guider, changed to call ``model``."""
    guider.model_patcher, guider.model_options = model, model.model_options
    return guider


def _with_wrapper(model, others: Callable, spaces: list[Space], rule: Rule, settings):
    """A measured clone of ``model`` whose runs are stitched with the guiders that ``others`` gives for the live one."""
    clone = model.clone() if ledger_of(model) is not None else measure(model)

    def run(
        executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, disable_pbar=False, seed=None,
        **shapes,
    ):  # fmt: skip
        guider, given = executor.class_obj, (noise, latent_image, denoise_mask)
        if len(sigmas) > 1:
            made = Run(guider, others(guider), spaces, rule, settings, sigmas, given, seed, shapes.get("latent_shapes"))
            sampler = standing_in(sampler, made.instead_of(sampler))
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **shapes)

    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, run)
    return clone


def space(last, model, title: str) -> Space:
    """Scale a and shift b with ``a z + b`` the latents of ``model`` that are z for ``last``; refuses other latents."""
    for patcher in (last, model):
        if KEY in patcher.wrappers.get(WrappersMP.OUTER_SAMPLE, {}):
            raise ValueError(f"{title}: a model is stitched already; give T-Stitch up to four guiders instead.")
        if isinstance(patcher.get_model_object("model_sampling"), IMAGE_TO_IMAGE):
            raise ValueError(f"{title}: {type(patcher.model).__name__} turns an image into another without noise.")
    ours, theirs = last.model.latent_format, model.model.latent_format
    names = f"{type(model.model).__name__} and {type(last.model).__name__}"
    for what in ("latent_channels", "latent_dimensions", "spacial_downscale_ratio"):
        a, b = (getattr(latents, what, None) for latents in (theirs, ours))
        if a != b:
            raise ValueError(f"{title}: {names} do not share their latents ({what} {a} and {b}); they need one VAE.")
    previews = ours.taesd_decoder_name, theirs.taesd_decoder_name
    if type(ours) is not type(theirs) and (previews[0] is None or previews[0] != previews[1]):
        kinds = f"{type(theirs).__name__} and {type(ours).__name__}"
        raise ValueError(f"{title}: the latents of {names} ({kinds}) belong to different VAEs; they need one VAE.")
    # Both formats only scale and shift, each channel by itself: 0 and 1 tell all.
    corners = torch.stack([torch.zeros(ours.latent_channels), torch.ones(ours.latent_channels)]).double()
    corners = last.model.process_latent_out(corners.view(2, -1, *[1] * ours.latent_dimensions))
    zero, one = model.model.process_latent_in(corners).split(1)
    gains = (one - zero).flatten()
    if float(gains.max() - gains.min()) > 1e-4 * float(gains.abs().max()):
        raise ValueError(f"{title}: {names} scale the channels of one VAE differently, so no sigma fits all of them.")
    scale = float(gains.mean())
    return (1.0 if abs(scale - 1.0) < 1e-6 else scale), (None if float(zero.abs().max()) < 1e-6 else zero.float())


def same_prompts(model, small, title: str) -> None:
    """Refuse a small model that reads other text encodings than the large one."""

    def reads(patcher) -> tuple[int | None, bool]:
        config = patcher.model.model_config.unet_config
        embedder = (config.get("context_embedder_config") or {}).get("params", {})
        widths = [embedder.get("in_features"), *map(config.get, WIDTHS)]
        return next((width for width in widths if isinstance(width, int)), None), bool(config.get("adm_in_channels"))

    (width, pooled), (wants, wants_pooled) = reads(model), reads(small)
    if (None not in (width, wants) and width != wants) or (wants_pooled and not pooled):
        pool = ("", " and a pooled one")
        raise ValueError(
            f"{title}: {type(small.model).__name__} reads text encodings of {wants} numbers{pool[wants_pooled]}, "
            f"{type(model.model).__name__} of {width}{pool[pooled]}; give each a guider of its own in T-Stitch."
        )


def hooked(guider) -> bool:
    """Whether the guider's conditionings change weights or options on the way."""
    conds = [cond for conds in guider.original_conds.values() for cond in conds]
    return any("hooks" in cond or ("control" in cond and cond["control"].get_extra_hooks()) for cond in conds)


def torn(a, b, hooks: bool) -> bool:
    """Whether two models share one copy of the weights and want it different."""
    objects = [{name: id(value) for name, value in patcher.object_patches.items()} for patcher in (a, b)]
    equal = a.patches_uuid == b.patches_uuid and objects[0] == objects[1] and a.injections == b.injections
    return a.model is b.model and (hooks or not equal or a.weight_wrapper_patches != b.weight_wrapper_patches)


def independent(model, title: str):
    """A clone of ``model`` with a copy of the weights of its own, from the file."""
    name = type(model.model).__name__
    if model.cached_patcher_init is None:
        raise ValueError(
            f"{title}: two of the models are one {name} with different patches (LoRA, shift, hooks), which share "
            "its weights, and its loader cannot load it again; save one of them and load that."
        )
    log.info("Quickstep: %s loads a second %s, for what is patched differently.", title, name)
    load, arguments, *place = model.cached_patcher_init
    fresh = load(*arguments)
    return model.clone(model_override=(fresh[place[0]] if place else fresh).get_clone_model_override())


# ---- the nodes -------------------------------------------------------------------------------------------------------


def _guiders() -> io.Input:
    one = io.Guider.Input("guider", tooltip="A model with its prompt and scale: CFGGuider, BasicGuider or their like.")
    return io.Autogrow.Input(
        "guiders",
        template=io.Autogrow.TemplatePrefix(one, prefix="guider", min=2, max=4),
        tooltip="Two to four guiders in the order of use, each with its model; the schedule is made for the last.",
    )


def _of_guiders(settings, guiders=None) -> tuple:
    given = [guider for guider in (guiders or {}).values() if guider is not None]
    if len(given) < 2:
        raise ValueError(f"{settings.title} needs at least two guiders; {len(given)} is connected.")
    return stitched(given, settings)


class ScoreGate(io.ComfyNode):
    """Passes the quick result on if its score is good enough; only if not, has the better one computed.

    For a distilled student and its teacher: sample with the student, score its picture with any node that gives a number
    (a reward model, an aesthetic score), and connect the student's latent through a KSampler with the teacher, at a denoise
    of about 0.4, to ``refined``; or another run from noise, to make the picture anew. That branch is not executed while
    the score is good. A score that is not a number counts as bad.

    Where a good threshold lies depends on the scorer: look at the scores of some of your pictures and take the one that a
    share of them stays below. With k percent below, a picture costs the student's steps and k percent of the teacher's.

    Source: Starodubcev et al. (2023), arXiv:2312.10835.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "ScoreGate",
            display_name="Score Gate (Quickstep)",
            category="Quickstep/accelerators",
            description="Passes the quick result on if its score is good enough; only if not, has the better one computed.",
            search_aliases=["teacher student", "conditional refine", "lazy switch", "arXiv:2312.10835"],
            inputs=[
                io.Float.Input("score", force_input=True, tooltip="What a scorer says about the quick result."),
                io.Latent.Input("quick", tooltip="The result to keep if its score is good enough."),
                io.Latent.Input("refined", lazy=True, tooltip="What to compute and use instead if it is not."),
                io.Float.Input(
                    "threshold", default=0.5, min=-1e6, max=1e6, step=0.001, tooltip="Where good enough begins."
                ),
                io.Combo.Input(
                    "good", options=["high", "low"], tooltip="Whether scores above or below the threshold are good."
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="result"),
                io.Boolean.Output(display_name="was_refined"),
            ],
        )

    @classmethod
    def passes(cls, score: float, threshold: float, good: str) -> bool:
        return score >= threshold if good == "high" else score <= threshold

    @classmethod
    def check_lazy_status(cls, score, quick, threshold=0.5, good="high", refined=None):
        return ["refined"] if refined is None and not cls.passes(score, threshold, good) else []

    @classmethod
    def execute(cls, score, quick, threshold=0.5, good="high", refined=None) -> io.NodeOutput:
        kept = cls.passes(score, threshold, good)
        return io.NodeOutput(quick if kept else refined, not kept)


GUIDER = [
    io.Guider.Output(display_name="guider"),
    io.Model.Output(display_name="model", tooltip="The last model as it is sampled with: for Report."),
]
NODES = [
    node(TStitch, "accelerators", _of_guiders, GUIDER, before=[_guiders()]),
    node(
        TStitchModel,
        "accelerators",
        lambda settings, model, small_model: (stitched_model(model, small_model, settings),),
        [io.Model.Output(display_name="model")],
        before=[
            io.Model.Input("model", tooltip="The model that computes the rest. It is not changed."),
            io.Model.Input("small_model", tooltip="The model that computes the first part, with the same prompts."),
        ],
    ),
    node(Alternate, "accelerators", _of_guiders, GUIDER, before=[_guiders()]),
    ScoreGate,
]
