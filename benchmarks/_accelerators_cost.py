"""Part B of ``accelerators.py``: arithmetic, seconds and memory on networks of real size with random weights.

A candidate's *work, counted* is the arithmetic of its run over that of the plain run, by torch's own counter; *work,
reported* is what the accelerator says of itself. They should agree. Seconds are ratios of a run to the plain runs right before and
after it. ``pass`` holds the seconds of single network passes by the share that was computed, of which any schedule can be
put together.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from functools import lru_cache

import _accelerators_models as models
import comfy.samplers
import torch
from _accelerators_candidates import COST, Candidate, usable
from _accelerators_clock import Clock
from quickstep.nodes.accelerators import ACCELERATORS
from quickstep.nodes.attach import FORWARD, attach, ledger_of, measure
from torch.utils.flop_counter import FlopCounterMode

CLASSES = {accelerator.id: accelerator for accelerator in ACCELERATORS}
SIZES = {"sd15": 16, "sdxl": 16, "sd3": 16}  # on a CPU; a 512 px picture is 64, a 1024 px one 128


class Bed:
    """One network under one load."""

    def __init__(self, name: str, size: int, steps: int, cfg: float, dtype: torch.dtype):
        torch.manual_seed(0)
        self.name, self.steps, self.cfg = name, steps, cfg
        self.model = models.build(name, dtype)
        self.plain = measure(self.model)
        self.clock = Clock(self.model.model.diffusion_model, FORWARD)
        self.prompts = models.prompt(name, 1), models.prompt(name, 2)
        channels = self.model.model.latent_format.latent_channels
        self.latent = torch.zeros(1, channels, size, size)
        self.noise = torch.randn(self.latent.shape)
        self._latest = None

    def run(self, model):
        """The report, and seconds with computed share of every pass."""
        self.clock.read()
        device = model.load_device
        with torch.inference_mode():
            ks = comfy.samplers.KSampler(model, self.steps, device, "euler", "normal", None, model.model_options)
            ks.sample(self.noise, *self.prompts, self.cfg, latent_image=self.latent, disable_pbar=True, seed=0)
        return ledger_of(model).runs[-1], self.clock.read()

    def latest(self, again: bool = False):
        """``run`` of the plain model: the newest one, or a new one."""
        if again or self._latest is None:
            self._latest = self.run(self.plain)
        return self._latest

    def flops(self, model) -> int:
        with FlopCounterMode(display=False) as counter:
            self.run(model)
        return counter.get_total_flops()


_one: dict[tuple, Bed] = {}


def bed(*load) -> Bed:
    """Only the newest stays in memory: they are large."""
    if load not in _one:
        _one.clear()
        _one[load] = Bed(*load)
    return _one[load]


def todo(options) -> list:
    gpu = torch.cuda.is_available()
    dtype = getattr(torch, options.dtype or ("bfloat16" if gpu else "float32"))
    found, refused = usable(COST, CLASSES)
    for label, why in refused.items():
        print(f"left out, {label}: {why}", flush=True)
    if options.only:
        found = [c for c in found if any(word.lower() in c.label.lower() for word in options.only)]
    jobs = []
    for name in options.models or (["sd15"] if options.quick else models.MODELS):
        load = (name, options.size or (128 if gpu else SIZES[name]), options.steps, options.cfg, dtype)
        device = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
        key = "|".join((name, str(load[1]), f"{options.steps} steps", f"cfg {options.cfg:g}", str(dtype)[6:], device))
        for candidate in [Candidate(), *found]:
            make = lambda load=load, c=candidate: [contest(bed(*load), c, options.repeats)]  # noqa: E731
            jobs.append((f"{key}|{candidate.label}", make))
    return jobs


def contest(here: Bed, candidate: Candidate, repeats: int) -> dict:
    """The record of a candidate; of the plain model, what is the same for all."""
    record = {"label": candidate.label, "method": candidate.method}
    if not candidate.parts:
        return {**record, "network": models.describe(here.model), "flops": whole(here), "calls": here.steps}
    wall, network, shares = [], [], defaultdict(list)
    try:
        model = here.model
        for accelerator in candidate.make(CLASSES):
            model = attach(model, accelerator)
        for _ in range(repeats):
            before, (report, own), after = here.latest(), here.run(model), here.latest(again=True)
            plain = [sum(seconds for seconds, _ in passes) for _, passes in (before, after)]
            wall.append(2 * report.seconds / (before[0].seconds + after[0].seconds))
            network.append(2 * sum(seconds for seconds, _ in own) / sum(plain))
            for seconds, share in [*own, *after[1]]:
                shares[share].append(seconds)
        record["counted"] = here.flops(model) / whole(here)
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        return record | {"failed": f"{type(error).__name__}: {error}"[:300]}
    record |= {"calls": report.calls, "full": report.full, "partial": report.partial, "skipped": report.skipped}
    record |= {
        "work": report.work,
        "cache": report.cache_bytes,
        "notes": report.notes,
        "wall": wall,
        "network": network,
    }
    record["plain"] = after[0].seconds
    record["pass"] = [[share, round(statistics.median(s), 5), len(s)] for share, s in shares.items()]
    return record


@lru_cache(maxsize=2)
def whole(here: Bed) -> int:
    """Arithmetic of the plain run."""
    return here.flops(here.plain)
