"""DiSA around ComfyUI's autoregressive video sampler: a SAMPLER whose network is not asked in every step."""

from __future__ import annotations

import comfy.samplers
import torch
from comfy_api.latest import io

from ..solvers.caching.disa import DiSA
from .attach import sampler_name
from .derive import node

AUTOREGRESSIVE = "ar_video"


def annealed(settings: DiSA, sampler) -> comfy.samplers.KSAMPLER:
    """A SAMPLER like ``sampler``, of fewer network calls in later blocks."""
    if sampler_name(sampler) != AUTOREGRESSIVE:
        raise ValueError(
            f"DiSA: sampler is {sampler_name(sampler)}, which makes the whole latent at once; connect Sampler AR Video."
        )
    inner = sampler.sampler_function

    @torch.no_grad()
    def sample_ar_video_disa(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        seen = _Blocks(model, settings, x, sigmas, options.get("num_frame_per_block", 1))
        return inner(seen, x, sigmas, extra_args=extra_args, callback=callback, disable=disable, **options)

    return comfy.samplers.KSAMPLER(sample_ar_video_disa, sampler.extra_options, sampler.inpaint_options)


class _Blocks:
    """ComfyUI's model as the sampler sees it. In steps that a block leaves out it gives the block's last prediction again.

    The sampler adds noise to that and goes on, so the next real call starts from where it would after one long step.
    """

    def __init__(self, model, settings: DiSA, x, sigmas, frames: int):
        self._model, self._settings = model, settings
        self._steps = len(sigmas) - 1
        self._frames, self._length = frames, x.shape[2]
        self._tokens = -(-x.shape[-2] // 2) * -(-x.shape[-1] // 2)  # of a frame, as the sampler counts them
        self._first: int | None = None  # frame of the first block; before it lies the picture that a video starts from
        self._start, self._step = -1, 0
        self._taken: list[int] = []
        self._last = x

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, x, sigma, **given):
        state = given["model_options"]["transformer_options"]["ar_state"]
        if float(sigma.max()) == 0.0:  # for the cache alone: what is clean is written into it
            return self._model(x, sigma, **given)
        if state["start_frame"] != self._start:
            self._start, self._step = state["start_frame"], 0
            self._first = self._start if self._first is None else self._first
            block, blocks = ((n - self._first) // self._frames for n in (self._start, self._length + self._frames - 1))
            self._taken = self._settings.taken(block, blocks, self._steps)
        step, self._step = self._step, self._step + 1
        if step in self._taken:
            self._last = self._model(x, sigma, **given)
        else:
            # The sampler takes back, after every step, what it believes the call has written.
            for cache in state["kv_caches"]:
                cache["end"] += x.shape[2] * self._tokens
        return self._last


NODES = [
    node(
        DiSA,
        "accelerators",
        lambda settings, sampler: (annealed(settings, sampler),),
        [io.Sampler.Output()],
        before=[io.Sampler.Input("sampler", tooltip="Sampler AR Video.")],
    )
]
