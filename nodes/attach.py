"""Accelerator -> patched clone of a MODEL, and back.

Everything hangs on keyed wrappers of a clone; the state of a run is made when the run starts, travels in that run's own
``transformer_options`` and is dropped when it ends. So clones, second passes, nested runs and interrupted runs never
see each other's state, and putting the same accelerator on again replaces it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import comfy.model_management
from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import get_executing_context

from ..solvers.caching.accelerator import Accelerator, Session
from ..solvers.report import Ledger, Meter
from . import unet

MEASURE = "quickstep.measure"
FORWARD = "quickstep.forward"
SITES: dict[str, Callable] = {"unet": unet.deepcache}
"""For each ``Accelerator.site``: (model, accelerator, key, FORWARD) -> wrappers, or ``ValueError``."""

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
    cannot work on this model.
    """
    key = key_of(accelerator)
    _refuse_compiled(model.wrappers, accelerator.title)
    start, end = accelerator.percents
    if start > end:
        raise ValueError(
            f"{accelerator.title}: the window from start_percent = {start:g} to end_percent = {end:g} ends before it starts."
        )
    site = SITES[accelerator.site](model, accelerator, key, FORWARD)
    clone = detach(measure(model), accelerator)

    def run(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        options = guider.model_options["transformer_options"]
        _refuse_compiled(options.get("wrappers", {}), accelerator.title)
        meter = meter_of(guider.model_options)
        if "adaptive" in sampler_name(sampler):
            # It compares stages of a step to choose the next; kept features would look like a step that went well.
            if meter is not None:
                meter.note(f"{accelerator.title} is off: the sampler chooses its steps by comparing network calls")
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        session = accelerator.start(sigmas.tolist(), _window(guider.model_patcher, accelerator))
        options[key] = session
        try:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            options.pop(key, None)
            if meter is not None:
                meter.held(key, session.store.peak)
            session.close()

    def call(executor, x, timestep, model_options, *args, **kwargs):
        session: Session | None = model_options.get("transformer_options", {}).get(key)
        if session is None:
            return executor(x, timestep, model_options, *args, **kwargs)
        with session.call(float(timestep.max())):
            return executor(x, timestep, model_options, *args, **kwargs)

    for kind, wrapper in {WrappersMP.OUTER_SAMPLE: run, WrappersMP.PREDICT_NOISE: call, **site}.items():
        clone.add_wrapper_with_key(kind, key, wrapper)
    return clone


def detach(model, accelerator: Accelerator):
    """A clone of ``model`` without this kind of accelerator, whatever its settings. It stays measured."""
    clone = model.clone()
    for kind in list(clone.wrappers):
        clone.remove_wrappers_with_key(kind, key_of(accelerator))
    return clone


def key_of(accelerator: Accelerator) -> str:
    """The key of this kind of accelerator among wrappers and in ``transformer_options``."""
    return f"quickstep.{accelerator.id}"


def _window(model, accelerator: Accelerator) -> tuple[float, float]:
    """The sigmas between which the accelerator may work, by the model's own percentages."""
    sampling = model.get_model_object("model_sampling")
    start, end = accelerator.percents
    # A flow model's percentage 0 is sigma 1; what a sampler adds to it (churn) is still the beginning.
    return math.inf if start <= 0.0 else float(sampling.percent_to_sigma(start)), float(sampling.percent_to_sigma(end))


def _refuse_compiled(wrappers: dict, title: str) -> None:
    # The compiler would run the wrapper once and freeze what it decided into the graph.
    if wrappers.get(WrappersMP.APPLY_MODEL, {}).get("torch.compile"):
        raise ValueError(f"{title} decides anew in every network call, which torch.compile cannot; use one of the two.")
