"""Part A of ``accelerators.py``: what accelerators cost and how far they are off, on the demo UNet and DiT.

Every candidate runs the same pictures as the plain model: same noise, captions, sampler, schedule and steps. Baselines: the
plain model with fewer steps, core's EasyCache and LazyCache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from statistics import mean

import comfy.samplers
import torch
from _accelerators_candidates import QUALITY, Candidate, usable
from _accelerators_clock import Clock
from _problems import OUTPUT, SEED, Network
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from quickstep.nodes.accelerators import ACCELERATORS
from quickstep.nodes.attach import FORWARD, attach, ledger_of, measure
from quickstep.solvers.compare import rms_per_sample

CFG = 4.0
SAMPLERS = {"unet": (("dpmpp_2m", "karras"), ("euler", "karras")), "dit": (("dpmpp_2m", "simple"), ("euler", "simple"))}
STEPS = (25, 20, 30)  # in this order: a run may be stopped at any time
CURVE = range(4, 31)  # fewer plain steps
YARDSTICK = 6  # steps of the plain runs before and after a candidate that its seconds are compared with
CORE = {  # with thresholds from where they begin to skip to where the pictures fall apart
    "EasyCache": (EasyCacheNode, (0.05, 0.1, 0.2, 0.4, 0.8)),
    "LazyCache": (LazyCacheNode, (0.02, 0.05, 0.1, 0.2, 0.4)),
}
CLASSES = {accelerator.id: accelerator for accelerator in ACCELERATORS}


@dataclass(frozen=True)
class Cell:
    """Where candidates compete: a network, a sampler with its schedule, a number of steps."""

    network: str
    sampler: str
    scheduler: str
    steps: int
    pictures: int

    @property
    def name(self) -> str:
        return f"{self.network}|{self.sampler}|{self.scheduler}|{self.steps}|{self.pictures} pictures"


def cells(options) -> Iterator[Cell]:
    for steps in STEPS[:1] if options.quick else STEPS:
        for pairs in zip(*SAMPLERS.values(), strict=True):
            for network, pair in zip(SAMPLERS, pairs, strict=True):
                if network in options.networks:
                    yield Cell(network, *pair, steps, options.pictures)


@dataclass(frozen=True)
class Bed:
    """A demo network with its pictures and a clock."""

    network: str
    pictures: int

    @cached_property
    def problem(self) -> Network:
        return Network(self.network, self.pictures)

    @cached_property
    def latest(self) -> dict:
        return {}

    @cached_property
    def clock(self) -> Clock:
        return Clock(self.problem.model.model.diffusion_model, FORWARD)

    def run(self, model, sampler: str, scheduler: str, steps: int) -> tuple[torch.Tensor, dict]:
        """The pictures, and what they cost."""
        self.clock.read()
        sigmas = comfy.samplers.calculate_sigmas(self.problem.sampling, scheduler, steps)
        noise, positive, negative, _ = self.problem.setting
        with torch.inference_mode():
            made = comfy.sample.sample_custom(
                model, noise, CFG, comfy.samplers.sampler_object(sampler), sigmas, positive, negative,
                torch.zeros_like(noise), disable_pbar=True, seed=7,
            )  # fmt: skip
        report, passes = ledger_of(model).runs[-1], self.clock.read()
        cost = {"calls": report.calls, "full": report.full, "partial": report.partial, "skipped": report.skipped}
        cost |= {"work": report.work, "cache": report.cache_bytes, "notes": report.notes}
        return made.cpu(), {**cost, "network": sum(s for s, _ in passes), "wall": report.seconds}

    def yardstick(self, again: bool = False) -> dict:
        """What a short plain run costs: the newest one, or a new one."""
        if again or not self.latest:
            self.latest.update(self.run(self.problem.model, "euler", "normal", YARDSTICK)[1])
        return dict(self.latest)

    def plain(self, sampler: str, scheduler: str, steps: int) -> torch.Tensor:
        """The plain model's pictures; kept in ``output/``, many are needed again and again."""
        file = OUTPUT / "accelerators" / f"{self.network}-{sampler}-{scheduler}-{CFG:g}-{self.pictures}-{SEED}.pt"
        kept = torch.load(file) if file.exists() else {}
        if steps not in kept:
            kept[steps] = self.run(self.problem.model, sampler, scheduler, steps)[0]
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(kept, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
        return kept[steps]

    def errors(self, made: torch.Tensor, cell: Cell) -> dict:
        """Per picture, relative: to the plain model at the same steps, and to the converged solution."""
        plain, truth = self.plain(cell.sampler, cell.scheduler, cell.steps), self.problem.truth(CFG)
        return {"uncached": relative(made, plain), "converged": relative(made, truth)}


@lru_cache(maxsize=4)
def bed(network: str, pictures: int) -> Bed:
    return Bed(network, pictures)


def relative(made: torch.Tensor, reference: torch.Tensor) -> list[float]:
    size = rms_per_sample(reference, torch.zeros_like(reference))
    return [float(f"{e / s:.5g}") for e, s in zip(rms_per_sample(made, reference), size, strict=True)]


def wanted(options) -> tuple[list[tuple[str, Candidate | float]], dict[str, str]]:
    """``(label, what)``: core's caches with their thresholds, then our candidates; and what cannot be had, with why."""
    found, refused = usable(QUALITY, CLASSES)
    if options.only:
        found = [c for c in found if any(word.lower() in c.label.lower() for word in options.only)]
    core = [(f"core {name}, threshold {t:g}", t) for name, (_, thresholds) in CORE.items() for t in thresholds]
    return [*core, *((c.label, c) for c in found)], refused


def applies(cell: Cell, label: str) -> bool:
    """EasyCache does nothing on MMDiT, whose ``forward`` never asks the wrappers it hangs on: to be shown once only."""
    return cell.network == "unet" or not label.startswith("core EasyCache") or label.endswith(" 0.8")


def accelerated(model, label: str, what: Candidate | float):
    """The clone to be sampled."""
    if isinstance(what, Candidate):
        for accelerator in what.make(CLASSES):
            model = attach(model, accelerator)
        return model
    name = label.split()[1].rstrip(",")
    clone = CORE[name][0].execute(model, what, 0.15, 0.95, False).args[0]
    if name == "EasyCache" and hasattr(model.model.diffusion_model, "out_channels"):
        # It sits inside the network, and the demo UNet works on 2 x 2 patches: 12 channels there, not 3.
        holder = clone.model_options["transformer_options"]["easycache"]
        holder.output_channels = model.model.diffusion_model.out_channels
    return measure(clone)


def curve(cell: Cell) -> list[dict]:
    """The plain model with fewer steps."""
    here, found = bed(cell.network, cell.pictures), []
    for steps in CURVE:
        made = here.plain(cell.sampler, cell.scheduler, steps)
        found.append(
            {"label": "plain", "method": "plain", "calls": steps, "work": steps / cell.steps, **here.errors(made, cell)}
        )
    return found


def contest(cell: Cell, label: str, what: Candidate | float, repeats: int) -> dict:
    """The record of a candidate in a cell. What cannot be run says why under ``failed``.

    Seconds are those of the plain model at the same steps times ``network`` or ``wall``, one number per repeat: each is
    compared with short plain runs right before and after it.
    """
    here = bed(cell.network, cell.pictures)
    record = {"label": label, "method": what.method if isinstance(what, Candidate) else label.partition(",")[0]}
    try:
        model = accelerated(here.problem.model, label, what)
        ratios: dict[str, list[float]] = {"network": [], "wall": []}
        for _ in range(repeats):
            before = here.yardstick()
            made, cost = here.run(model, cell.sampler, cell.scheduler, cell.steps)
            rows, after = here.clock.rows_read, here.yardstick(again=True)
            for key, values in ratios.items():
                whole = mean((before[key], after[key])) / YARDSTICK * cell.steps
                values.append(round(cost[key] / whole, 4))
        if not isinstance(what, Candidate) and rows:
            # EasyCache answers inside the network, where our meter cannot see it; at CFG above 1 a picture has two rows.
            cost["full"] = rows // (2 * cell.pictures)
            cost |= {"skipped": cell.steps - cost["full"], "work": cost["full"] / cell.steps}
        if not made.isfinite().all():
            return record | {"failed": "not finite"}
        return record | {**cost, **here.errors(made, cell), **ratios}
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        return record | {"failed": f"{type(error).__name__}: {error}"[:300]}
