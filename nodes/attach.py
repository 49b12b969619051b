"""Accelerator -> patched clone of a MODEL, and back.

Everything hangs on keyed wrappers of a clone; the state of a run is made when the run starts, travels in that run's own
``transformer_options`` and is dropped when it ends. So clones, second passes, nested runs and interrupted runs never
see each other's state, and putting the same accelerator on again replaces it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import get_executing_context

from ..solvers.artifact import settings_of
from ..solvers.caching.accelerator import Accelerator, Run, Session
from ..solvers.caching.composition import check, rank
from ..solvers.report import Ledger, Meter
from .bridge import Sampler, process_from
from .sites.blocks import blocks
from .sites.evaluation import evaluation
from .sites.guidance import guidance
from .sites.parts import parts
from .sites.tiles import tiles
from .sites.tokens import tokens
from .sites.tuning import tuning
from .sites.unet import unet

MEASURE = "quickstep.measure"
FORWARD = "quickstep.forward"
ON = "quickstep.on"


@dataclass(frozen=True)
class Site:
    """How accelerators of one ``Accelerator.site`` are carried out in ComfyUI.

    mount: ``(model, accelerator, key, forward_key) -> {kind of wrapper: wrapper}``; raises ``ValueError`` in one sentence
        where the accelerator cannot work on this model. Wrappers find the session of the run at ``transformer_options[key]``,
        and the record of the network pass (``report.Forward``) at ``transformer_options[forward_key]``.
    compiles: whether it works with torch.compile, that is, decides outside the compiled network.
    """

    mount: Callable
    compiles: bool = False


SITES: dict[str, Site] = {
    "evaluation": Site(evaluation, compiles=True),
    "guidance": Site(guidance, compiles=True),
    "tiles": Site(tiles, compiles=True),
    "unet": Site(unet),
    "blocks": Site(blocks),
    "modules": Site(parts),
    "tokens": Site(tokens),
    "tuning": Site(tuning),
}

log = logging.getLogger("quickstep")


def measure(model):
    """A clone of ``model`` whose runs are counted, with or without an accelerator; read them with ``ledger_of``.

    The ledger is new, and shared by all clones of the returned model. Measuring twice counts once.
    """
    clone = model.clone()
    clone.set_attachments(MEASURE, Ledger())
    wrappers = {
        WrappersMP.OUTER_SAMPLE: _measured_run,
        WrappersMP.PREDICT_NOISE: _measured_call,
        WrappersMP.APPLY_MODEL: _measured_forward,
    }
    for kind, wrapper in wrappers.items():
        clone.remove_wrappers_with_key(kind, MEASURE)
        # Outermost, or a call that another wrapper answers by itself would not be counted.
        clone.wrappers[kind] = {MEASURE: [wrapper], **clone.wrappers.get(kind, {})}
    return clone


def ledger_of(model) -> Ledger | None:
    """The ledger of a model that went through ``measure`` or ``attach``; None if it never did."""
    return model.get_attachment(MEASURE)


def meter_of(model_options: dict) -> Meter | None:
    """The meter of the run that these model options belong to."""
    return model_options.get("transformer_options", {}).get(MEASURE)


def sampler_name(sampler) -> str:
    """``euler`` for ComfyUI's ``sample_euler``; the class name for a sampler that is not a function."""
    function = getattr(sampler, "sampler_function", None)
    return getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_")


def sampler_settings(sampler) -> dict:
    """What a SAMPLER was made with, as JSON values: all parameters of ours, the options of any other."""
    if isinstance(sampler, Sampler):
        return settings_of(sampler.solver)
    options = getattr(sampler, "extra_options", None) or {}
    return {
        name: value if isinstance(value, bool | int | float | str) else repr(value) for name, value in options.items()
    }


def _measured_run(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    guider = executor.class_obj
    here = get_executing_context()
    steps = max(len(sigmas) - 1, 0)
    meter = Meter(label=f"{sampler_name(sampler)}, {steps} steps", steps=steps, group=here.prompt_id if here else "")
    guider.model_options["transformer_options"][MEASURE] = meter
    try:
        samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        comfy.model_management.synchronize()  # the clock must not stop while the device still works
        meter.finished = True
        return samples
    finally:
        guider.model_options["transformer_options"].pop(MEASURE, None)
        report = meter.report()
        ledger = ledger_of(guider.model_patcher)
        if ledger is not None:
            ledger.add(report)
        log.info("Quickstep: %s", report.line())


def _measured_call(executor, x, timestep, model_options, *args, **kwargs):
    meter = meter_of(model_options)
    if meter is None:
        return executor(x, timestep, model_options, *args, **kwargs)
    with meter.call():
        return executor(x, timestep, model_options, *args, **kwargs)


def _measured_forward(
    executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs
):
    options = dict(transformer_options or {})
    meter = options.get(MEASURE)
    if meter is not None:
        options[FORWARD] = meter.forward(x.numel())
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def attach(model, accelerator: Accelerator):
    """A clone of ``model`` that is sampled with ``accelerator``, and measured.

    The same kind of accelerator put on before is replaced. Raises ``ValueError`` in one sentence where the accelerator
    cannot work on this model, or not together with another one on it.
    """
    key = key_of(accelerator)
    site = SITES[accelerator.site]
    _refuse_others(model.wrappers, accelerator, site)
    start, end = accelerator.percents
    if start > end:
        raise ValueError(
            f"{accelerator.title}: the window from start_percent = {start:g} to end_percent = {end:g} ends before it starts."
        )
    check(accelerator, on(model))
    wrappers = site.mount(model, accelerator, key, FORWARD)
    clone = detach(measure(model), accelerator)
    clone.set_attachments(ON, (*on(clone), accelerator))

    def run(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        options = guider.model_options["transformer_options"]
        _refuse_others(options.get("wrappers", {}), accelerator, site)
        meter = meter_of(guider.model_options) or Meter()
        known = _run(guider, accelerator, sampler, sigmas, args, kwargs)
        why = accelerator.off(known)
        if why is not None:
            meter.note(f"{accelerator.title} is off: {why}")
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        if said := accelerator.note(known):
            meter.note(said)
        session = accelerator.start(known)
        outer = options.get(key)
        options[key] = session
        try:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            if outer is None:
                options.pop(key, None)
            else:
                options[key] = outer
            meter.held(key, session.store.peak)
            if session.store.overflowed:
                meter.note(f"{accelerator.title}: the cache reached max_cache_mb, so some calls were computed in full")
            for said in session.notes:
                meter.note(said)
            session.close()

    def call(executor, x, timestep, model_options, *args, **kwargs):
        session: Session | None = model_options.get("transformer_options", {}).get(key)
        if session is None:
            return executor(x, timestep, model_options, *args, **kwargs)
        with session.call(float(timestep.max())):
            return executor(x, timestep, model_options, *args, **kwargs)

    for kind, wrapper in {WrappersMP.OUTER_SAMPLE: run, WrappersMP.PREDICT_NOISE: call, **wrappers}.items():
        clone.add_wrapper_with_key(kind, key, wrapper)
    _in_order(clone)
    return clone


def detach(model, accelerator: Accelerator):
    """A clone of ``model`` without this kind of accelerator, whatever its settings. It stays measured."""
    clone = model.clone()
    for kind in list(clone.wrappers):
        clone.remove_wrappers_with_key(kind, key_of(accelerator))
    clone.set_attachments(ON, tuple(other for other in on(clone) if other.id != accelerator.id))
    return clone


def on(model) -> tuple[Accelerator, ...]:
    """The accelerators that are on this model."""
    return model.get_attachment(ON) or ()


def _in_order(model) -> None:
    """Bring the wrappers into the order of ``composition.SITES``, then of names, behind the meter, outside of other packs'."""
    ours = [MEASURE, *map(key_of, sorted(on(model), key=lambda accelerator: (rank(accelerator.site), accelerator.id)))]
    for kind, wrappers in model.wrappers.items():
        first = {key: wrappers[key] for key in ours if key in wrappers}
        model.wrappers[kind] = {**first, **{key: value for key, value in wrappers.items() if key not in first}}


def key_of(accelerator: Accelerator) -> str:
    """The key of this kind of accelerator among wrappers and in ``transformer_options``."""
    return f"quickstep.{accelerator.id}"


NOISY = ("ancestral", "sde", "lcm", "ddpm", "seeds", "sa_solver")
"""Parts of the names of ComfyUI's samplers that add noise as they are chosen in KSamplerSelect."""


def stochastic(sampler) -> bool:
    """Whether a SAMPLER adds noise on the way: by its settings where it is ours, else by its name and options."""
    if isinstance(sampler, Sampler):
        return sampler.solver.stochastic
    options = getattr(sampler, "extra_options", None) or {}
    named = any(part in sampler_name(sampler) for part in NOISY) and options.get("eta", 1.0) > 0.0
    return bool(named or options.get("eta", 0.0) or options.get("s_churn", 0.0))


def adaptive(sampler) -> bool:
    """Whether a SAMPLER chooses its steps by comparing calls."""
    if isinstance(sampler, Sampler):
        return sampler.solver.nfe(10) is None
    return "adaptive" in sampler_name(sampler)


def _run(guider, accelerator: Accelerator, sampler, sigmas, args, kwargs) -> Run:
    """What is known of a run when OUTER_SAMPLE is entered, with the rest of its arguments."""
    sampling = guider.model_patcher.get_model_object("model_sampling")
    start, end = accelerator.percents
    # A flow model's percentage 0 is sigma 1; what a sampler adds to it (churn) is still the beginning.
    first = math.inf if start <= 0.0 else float(sampling.percent_to_sigma(start))
    seed = kwargs.get("seed", args[3] if len(args) > 3 else None)
    return Run(
        times=sigmas.tolist(),
        window=(first, float(sampling.percent_to_sigma(end))),
        process=process_from(sampling),
        sampler=sampler_name(sampler),
        stochastic=stochastic(sampler),
        adaptive=adaptive(sampler),
        both_sides="cfg_pp" in sampler_name(sampler),
        cfg=getattr(guider, "cfg", None),
        seed=seed or 0,
    )


def _refuse_others(wrappers: dict, accelerator: Accelerator, site: Site) -> None:
    # The compiler would run the wrapper once and freeze what it decided into the graph.
    if not site.compiles and wrappers.get(WrappersMP.APPLY_MODEL, {}).get("torch.compile"):
        raise ValueError(
            f"{accelerator.title} decides anew in every network call, which torch.compile cannot; use one of the two."
        )
    if accelerator.site not in ("evaluation", "unet", "blocks", "modules"):
        return
    for key, name in (("easycache", "EasyCache"), ("lazycache", "LazyCache")):
        if any(key in kinds and kinds[key] for kinds in wrappers.values()):
            raise ValueError(
                f"{accelerator.title} and ComfyUI's {name} cannot both be on one model; use one of the two."
            )
