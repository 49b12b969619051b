"""One sampling run with several models.

Every model keeps an ordinary guider of its own. All of them are entered one inside the other: each is told to sample
with a stand-in for the sampler, which only notes the guider, now live, and enters the next. The innermost runs the real
sampler on a model that passes every call to the live guider whose turn it is. So loading, conditionings, ControlNets,
wrappers, hooks and cleaning up happen for every model as ComfyUI does them, exceptions included.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
from comfy.nested_tensor import NestedTensor

from ..solvers.stitch import Passage, Rule, Stages
from .attach import meter_of
from .bridge import process_of

POST_CFG = "sampler_post_cfg_function"
CFG1 = "disable_cfg1_optimization"


def standing_in(sampler, sample: Callable):
    """A SAMPLER that wrappers take for ``sampler`` and that does ``sample`` instead."""
    twin = copy.copy(sampler)
    twin.sample = sample
    return twin


class Seen:
    """The model as the sampler sees it: the last guider in everything but the calls."""

    def __init__(self, guider, call: Callable):
        self._guider, self._call = guider, call

    def __getattr__(self, name):
        return getattr(self._guider, name)

    def __call__(self, x, sigma, model_options=None, seed=None):
        return self._call(x, sigma, model_options or {}, seed)


class Run:
    """One stitched run: the guiders that are live, whose turn it is, how often each was called."""

    def __init__(self, guider, others: list, spaces, rule: Rule, settings, sigmas, given, seed, latent_shapes):
        self.others, self.memory, self.seed = others, settings.memory, seed
        self.last, self.sigmas, self.shape = len(others), sigmas, given[0].shape
        sampling = guider.model_patcher.get_model_object("model_sampling")
        times = sigmas.tolist()
        self.stages = Stages(times, rule(times, lambda share: float(sampling.percent_to_sigma(share))))
        main = process_of(guider.model_patcher)
        self.passages = [
            Passage(main, process_of(other.model_patcher), *space) for other, space in zip(others, spaces, strict=True)
        ]
        noise, latent, mask = given
        if mask is not None and mask.ndim == 4:
            mask = mask[:, :1]  # a guider repeats it for every channel, and would do so again
        self.given = noise, latent, mask
        packed = latent_shapes is not None and len(latent_shapes) > 1
        if packed:  # guiders pack a combined latent by themselves
            self.given = tuple(
                None if t is None else NestedTensor(comfy.utils.unpack_latents(t, latent_shapes)) for t in self.given
            )
        if packed and any(passage.shift is not None for passage in self.passages):
            raise ValueError(
                f"{settings.title}: these models shift their latents apart; combined latents allow no shift."
            )
        self.live: dict[int, tuple[Any, dict]] = {}
        self.calls: Counter[int] = Counter()
        self.clamped, self.turn, self.resident = 0, None, False

    def instead_of(self, sampler) -> Callable:
        """What the last guider does instead of ``sampler.sample``: enter the others, then sample with all of them."""

        def sample(guider, sigmas, extra_args, *args, **kwargs):
            made = []

            def run() -> None:
                self.prepare()
                try:
                    made.append(sampler.sample(Seen(guider, self.call), sigmas, extra_args, *args, **kwargs))
                finally:
                    self.report()  # here all meters still run

            self.live[self.last] = guider, extra_args["model_options"]
            try:
                # The first to compute is entered last: with little memory, that is the model left on the device.
                self.enter([k for k in range(self.last) if k in self.stages.models], sampler, run)
                return made[0]
            finally:
                self.live.clear()

        return sample

    def enter(self, waiting: list[int], sampler, run: Callable[[], None]) -> None:
        """Run inside of the guiders that wait, the last of them outermost."""
        if not waiting:
            run()
            return
        *waiting, k = waiting

        def note(guider, sigmas, extra_args, callback, noise, *unused, **unused_too):
            self.live[k] = guider, extra_args["model_options"]
            self.enter(waiting, sampler, run)
            return noise  # some latent; what this guider makes of it nobody sees

        noise, latent, mask = self.given
        self.others[k].sample(
            noise,
            latent,
            standing_in(sampler, note),
            self.theirs(k),
            denoise_mask=mask,
            disable_pbar=True,
            seed=self.seed,
        )

    def theirs(self, k: int) -> torch.Tensor:
        """The schedule in model k's own sigmas."""
        return self.sigmas.new_tensor([self.passages[k].time(t) for t in self.sigmas.tolist()])

    def prepare(self) -> None:
        """All are live: see to their memory and to what they share."""
        guiders = [guider for guider, _ in self.live.values()]
        owned = Counter(id(control) for guider in guiders for control in _controls(guider))
        self.shared = {control for control, owners in owned.items() if owners > 1}
        models = list({id(guider.model_patcher.model): guider.model_patcher for guider in guiders}.values())
        needs = [comfy.sampler_helpers.estimate_memory(g.model_patcher, self.shape, g.conds) for g in guiders]
        most, least = (max(values) for values in zip(*needs, strict=True))
        self.resident = self.memory == "resident" or (self.memory == "auto" and room_for(models, most))
        if self.resident and len(models) > 1:
            more = [model for guider in guiders for model in guider.loaded_models]
            comfy.model_management.load_models_gpu([*models, *more], most, minimum_memory_required=least)

    def take_turn(self, k: int) -> None:
        guider, _ = self.live[k]
        if not self.resident and len(self.live) > 1:
            comfy.sampler_helpers.prepare_sampling(guider.model_patcher, self.shape, guider.conds, guider.model_options)
        guider.inner_model.current_patcher = guider.model_patcher  # two guiders may share the network
        if self.shared & set(map(id, _controls(guider))):
            for conds in guider.conds.values():
                comfy.samplers.pre_run_control(guider.inner_model, conds)
        self.turn = k

    def call(self, x: torch.Tensor, sigma: torch.Tensor, options: dict, seed) -> torch.Tensor:
        """One call of the denoiser, by the model whose turn it is at this sigma (the largest, where rows differ)."""
        times = sigma.flatten().tolist()
        k = self.stages.at(max(times))
        if k != self.turn:
            self.take_turn(k)
        self.calls[k] += 1
        guider, theirs = self.live[k]
        if k == self.last:
            return guider(x, sigma, model_options=options, seed=seed)
        passage = self.passages[k]
        self.clamped += any(map(passage.clamped, times))
        theirs = comfy.model_patcher.create_model_options_clone(theirs)
        # CFG++ samplers read the unconditional prediction through a function that they add for the run.
        present = self.live[self.last][1].get(POST_CFG, [])
        added = [_translated(f, passage, x, sigma) for f in options.get(POST_CFG, []) if f not in present]
        if added:
            theirs[POST_CFG] = [*theirs.get(POST_CFG, []), *added]
        if options.get(CFG1):
            theirs[CFG1] = True
        moved, sigmas = passage.there(x, sigma, times)
        return passage.back(guider(moved, sigmas, model_options=theirs, seed=seed))

    def report(self) -> None:
        """Tell the meters of all models who made how many calls."""
        parts = [
            f"{self.calls[k]} by model {k + 1} ({type(guider.model_patcher.model).__name__})"
            for k, (guider, _) in sorted(self.live.items())
        ]
        text = "stitched calls: " + ", ".join(parts)
        if self.clamped:
            text += f"; {self.clamped} beyond the largest sigma of their model, asked there"
        for _, options in self.live.values():
            meter = meter_of(options)
            if meter is not None:
                meter.note(text)


def room_for(models: list, memory: float) -> bool:
    """Whether all models and one call fit on the device, if everything else left it."""
    device = models[0].load_device
    if comfy.model_management.is_device_cpu(device):
        return True
    loaded = [model for model in comfy.model_management.loaded_models() if model and model.load_device == device]
    room = comfy.model_management.get_free_memory(device) + sum(model.loaded_size() for model in loaded)
    spare = max(memory, comfy.model_management.minimum_inference_memory())
    return 1.1 * sum(model.model_size() for model in models) + spare <= room


def _controls(guider) -> set:
    return {cond["control"] for conds in guider.conds.values() for cond in conds if "control" in cond}


def _translated(function: Callable, passage: Passage, x, sigma) -> Callable:
    """A post-CFG function that lives in the last model's units, for another model."""

    def hook(args: dict):
        names = ("denoised", "cond_denoised", "uncond_denoised")
        ours = {name: passage.back(args[name]) for name in names if args.get(name) is not None}
        return passage.bring(function({**args, **ours, "input": x, "sigma": sigma}))

    return hook
