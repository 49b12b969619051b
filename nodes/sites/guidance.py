"""Accelerators that do without the unconditional side of a guided call: a wrapper around the batch of conditionings.

ComfyUI computes no entry that is None, and returns zeros for it; what stands in for it is filled in here. Everything after
that (CFG functions, CFG++, guidance passes of others) sees two predictions as always.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from comfy.patcher_extension import WrappersMP

from ...solvers.artifact import Artifact
from ...solvers.caching.accelerator import Accelerator, Plan
from ...solvers.caching.guiding import Guiding
from ...solvers.method import parts
from ..fingerprint import fingerprint

log = logging.getLogger(__name__)


def guidance(model, settings: Accelerator, key: str, forward_key: str) -> dict[str, Callable]:
    """The wrapper that carries out the plans of a ``Guiding`` session.

    Only the first call for [positive, negative] within a call of the denoiser is touched, one for each context window:
    what comes after it is a guidance pass of somebody else, made with other patches.
    """
    for declared in parts(type(settings)):
        found = getattr(settings, declared.name)
        if isinstance(found, Artifact) and found.found_for.model not in (None, fingerprint(model)):
            log.warning("%s: the calibration may not fit. It was made for another model.", settings.title)

    def batch(executor, model, conds, x, timestep, model_options):
        options = model_options.get("transformer_options", {})
        session: Guiding | None = options.get(key)
        if session is None or session.plan in (None, Plan.PLAIN):
            return executor(model, conds, x, timestep, model_options)
        pair = len(conds) == 2 and all(side is not None for side in conds)
        window = getattr(options.get("context_window"), "index_list", None)
        name = (tuple(window) if window else None, tuple(x.shape), x.dtype, str(x.device))
        session.met(pair)
        # At time 0 (autoregressive samplers ask for it) there is no noise to speak of a difference in.
        if not pair or session.t <= 0.0 or session.branches([name])[0][1] > 0:
            return executor(model, conds, x, timestep, model_options)
        positive, negative = conds
        if session.plan is Plan.PARTIAL and session.ready(name):
            D_c = executor(model, [positive, None], x, timestep, model_options)[0]
            return [D_c, session.answer(name, x, timestep, D_c)]
        D_c, D_u = executor(model, [positive, negative], x, timestep, model_options)
        session.learn(name, x, timestep, D_c, D_u)
        return [D_c, D_u]

    return {WrappersMP.CALC_COND_BATCH: batch}
