"""Accelerators that answer whole calls of the denoiser: a wrapper around the guided prediction.

At this level one tensor stands for everything inside a call (all conditionings, ControlNets, guidance passes), so nothing has
to be told apart, and neither torch.compile nor several GPUs see any of it.
"""

from __future__ import annotations

from collections.abc import Callable

from comfy.model_base import ModelType
from comfy.patcher_extension import WrappersMP

from ...solvers.caching.accelerator import Answering, Plan

DIRECT = (ModelType.IMG_TO_IMG, ModelType.IMG_TO_IMG_FLOW)


def evaluation(model, settings, key: str, forward_key: str) -> dict[str, Callable]:
    """The wrappers that carry out the plans of an ``Answering`` session."""
    if model.model.model_type in DIRECT:
        raise ValueError(
            f"{settings.title}: this model ({type(model.model).__name__}) makes its picture from another one in a single "
            "call; there is no second call to leave out."
        )

    def call(executor, x, timestep, model_options, *args, **kwargs):
        session: Answering | None = model_options.get("transformer_options", {}).get(key)
        if session is None or session.plan is not None:
            return executor(x, timestep, model_options, *args, **kwargs)
        t = float(timestep.max())
        with session.call(t):
            if session.plan is Plan.SKIP:
                answer = session.answer(x, t)
                if answer is not None:
                    return answer
                session.plan = Plan.FULL
            x0 = executor(x, timestep, model_options, *args, **kwargs)
            if session.plan is Plan.FULL:
                session.learn(x, t, x0)
            return x0

    return {WrappersMP.PREDICT_NOISE: call}
