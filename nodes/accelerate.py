"""Accelerate: a target instead of knobs, met by what was measured on the user's own model."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from zlib import crc32

import torch
from comfy_api.latest import io

from ..solvers.artifact import Artifact, FoundFor, load, process_name, save
from ..solvers.caching import budget
from ..solvers.caching.budget import Trial
from ..solvers.compare import rms_per_sample
from . import artifacts
from .attach import attach, on, sampler_name, sampler_settings
from .bridge import empty_as_model_wants, process_of
from .compare import Bench, Contender
from .derive import PREFIX
from .fingerprint import fingerprint
from .show import show_text

GOALS = ["speed-up", "fidelity"]
GOAL_INPUTS = [
    io.Combo.Input(
        "goal",
        options=GOALS,
        default="speed-up",
        tooltip="What is given: the speed-up (the least error for it is chosen), or how close to the uncached result it has to "
        "stay (the least work for it is chosen).",
    ),
    io.Float.Input(
        "speed_up",
        default=1.5,
        min=1.0,
        max=5.0,
        step=0.1,
        tooltip="For the goal speed-up: 2 is half of the network's work.",
    ),
    io.Float.Input(
        "max_error",
        default=0.05,
        min=0.0,
        max=1.0,
        step=0.005,
        tooltip="For the goal fidelity: the largest difference to the uncached result, as a fraction of its size. 0.05 is hard "
        "to see, 0.2 changes details.",
    ),
]


class Accelerate(io.ComfyNode):
    """Accelerates a model by a target instead of knobs: it tries what fits this model, and takes what is best for the target.

    The first run with a model, sampler with its settings, schedule and CFG samples one picture with every recipe that the model
    takes, about ten runs, next to the uncached one and to plain runs with fewer steps. What it measured is kept in
    ComfyUI's models/quickstep folder and used from then on, for other targets too; *Acceleration plan* uses it on
    another machine. ``report`` says what was chosen, what it costs, and what simply taking fewer steps would have done: where
    that is better, it says so.

    Work is counted in network arithmetic, not in seconds, so it is the same on every machine. The error is the root mean
    square difference to the uncached latent, relative to that latent's.

    The recipes are one accelerator or two at a few settings (forecast of whole calls, DeepCache, block caches, guidance cache).
    Samplers that add noise leave only those that do not forecast whole calls. Measured on the given prompt and seed: other
    prompts are similar, other resolutions and samplers are measured anew.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "Accelerate",
            display_name="Accelerate (Quickstep)",
            category="Quickstep/accelerators",
            description="Accelerates a model by a target (2x faster, or at most so much error) instead of knobs: tries what fits "
            "this model once, and takes the best.",
            search_aliases=["speed", "auto", "faster", "budget"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The model to accelerate. It is not changed."),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.Sampler.Input("sampler", tooltip="The sampler the model will be used with."),
                io.Sigmas.Input("sigmas", tooltip="Its schedule."),
                io.Latent.Input("latent", tooltip="A latent of the size to be sampled; its first picture is used."),
                io.Float.Input("cfg", default=4.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance scale of the runs."),
                *GOAL_INPUTS,
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the picture that is tried on.",
                ),
                io.Boolean.Input(
                    "measure_again",
                    default=False,
                    tooltip="Measure even if there is a plan for this model, sampler, schedule and CFG.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, sampler, sigmas, latent, cfg, goal, speed_up, max_error, seed, measure_again
    ) -> io.NodeOutput:
        if len(sigmas) < 3:
            raise ValueError(f"Accelerate: sigmas holds {len(sigmas)} values; it needs at least 3, that is two steps.")
        if latent["samples"].is_nested:
            raise ValueError("Accelerate takes one kind of latent, not a combined audio and video latent.")
        if on(model):
            names = ", ".join(a.title for a in on(model))
            raise ValueError(
                f"Accelerate chooses the accelerators by itself, but {names} is on the model; take it off."
            )
        latent = empty_as_model_wants(model, latent)
        one = {"samples": latent["samples"][:1]}
        if latent.get("noise_mask") is not None:
            one["noise_mask"] = latent["noise_mask"][:1]
        known = FoundFor(
            model=fingerprint(model),
            process=process_name(process_of(model)),
            solver=sampler_name(sampler),
            settings={"sampler": sampler_settings(sampler), "sigmas": sigmas.tolist()},
            steps=len(sigmas) - 1,
            cfg=cfg,
            shape=tuple(one["samples"].shape[1:]),
            seed=seed,
        )
        path = _path(known)
        trials = []
        if os.path.exists(path) and not measure_again:
            found = load(path, budget.KIND)
            trials = budget.from_table(found.table) if _same(found.found_for, known) else []
        if not trials:
            trials = _measured(Bench(model, positive, negative, one, seed, cfg), sampler, sigmas)
            save(path, Artifact(budget.KIND, budget.to_table(trials), {}, known), overwrite=True)
        made, text = chosen(model, trials, goal, speed_up, max_error)
        show_text(cls, text)
        return io.NodeOutput(made, text)


class AccelerationPlan(io.ComfyNode):
    """Accelerates a model by a plan that Accelerate measured, here or elsewhere, for the target you choose now.

    The file lies in ComfyUI's models/quickstep folder. A plan is for one model: for another one it is refused.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "AccelerationPlan",
            display_name="Acceleration plan (Quickstep)",
            category="Quickstep/accelerators",
            description="Accelerates a model by a plan that Accelerate measured, here or elsewhere, for the target you choose now.",
            inputs=[
                io.Model.Input("model", tooltip="The model to accelerate. It is not changed."),
                io.Combo.Input(
                    "plan", options=artifacts.files(budget.KIND), tooltip="The plan's file in models/quickstep."
                ),
                *GOAL_INPUTS,
            ],
            outputs=[io.Model.Output(display_name="model"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, model, plan, goal, speed_up, max_error) -> io.NodeOutput:
        found = artifacts.read(plan, budget.KIND, "Acceleration plan")
        if found is None:
            raise ValueError("Acceleration plan: no plan is chosen; Accelerate makes one.")
        if found.found_for.model != fingerprint(model):
            raise ValueError(
                f"Acceleration plan: {plan} was measured on another model; let Accelerate measure this one."
            )
        made, text = chosen(model, budget.from_table(found.table), goal, speed_up, max_error)
        return io.NodeOutput(made, text)

    @classmethod
    def fingerprint_inputs(cls, plan, **given):
        return artifacts.modified(plan)


def chosen(model, trials: list[Trial], goal: str, speed_up: float, max_error: float):
    """The accelerated model, and a text that says what was taken and why."""
    if goal == GOALS[0]:
        best, asked = budget.cheapest_enough(trials, 1.0 / speed_up), f"{speed_up:g} times faster"
    else:
        best, asked = budget.close_enough(trials, max_error), f"an error of at most {max_error:g}"
    if best is None:
        return model, f"For {asked}: nothing that was tried helps here, so the model is left as it is."
    plain = budget.fewer_steps(trials, best.work)
    lines = [f"For {asked}: {best.label}. {1 / best.work:.2f} times less network work, error {best.error:.3f}."]
    if goal == GOALS[0] and best.work > budget.ROOM / speed_up:
        lines.append("That is less than asked for: nothing that was tried saves more.")
    if plain is not None:
        lines.append(
            f"{plain.label.capitalize()}: {1 / plain.work:.2f} times less, error {plain.error:.3f}"
            + (" - simply taking fewer steps is better here." if plain.error <= best.error else ".")
        )
    for trial in sorted(trials, key=lambda t: t.work):
        lines.append(f"  {trial.label}: work {100 * trial.work:.0f} %, error {trial.error:.3f}, {trial.seconds:.2f} s")
    for accelerator in best.accelerators:
        model = attach(model, accelerator)
    return model, "\n".join(lines)


def _measured(bench: Bench, sampler, sigmas: torch.Tensor) -> list[Trial]:
    """All trials: plain runs with fewer steps, and every recipe that this model takes."""
    whole = Contender("uncached", sampler, sigmas)
    mounted = set()
    for accelerator in budget.ACCELERATORS:
        try:
            attach(bench.model, accelerator())
            mounted.add(accelerator.id)
        except ValueError:
            continue
    tried = []
    for parts in budget.recipes(mounted):
        model = bench.model
        for part in parts:
            model = attach(model, budget.made(part))
        tried.append((parts, replace(whole, model=model)))
    shorter = [replace(whole, sigmas=thinned(sigmas, share)) for share in (0.8, 0.65, 0.5, 0.35)]
    shorter = [s for s in shorter if 2 < len(s.sigmas) < len(sigmas)]
    bench.expect(whole, *shorter, *(c for _, c in tried))
    samples, report = bench.run(whole)
    calls, scale = report.calls, float(samples.double().square().mean().sqrt()) or 1.0
    trials = []
    for parts, contender in [((), s) for s in shorter] + tried:
        made, cost = bench.run(contender)
        known = cost.work is not None and calls
        work = cost.work * cost.calls / calls if known else cost.seconds / max(report.seconds, 1e-9)
        error = rms_per_sample(made, samples)[0] / scale
        trials.append(Trial(parts, len(contender.sigmas) - 1, work, error, cost.seconds))
    return trials


def thinned(sigmas: torch.Tensor, share: float) -> torch.Tensor:
    """The schedule with this share of its steps, at the same places of its curve."""
    steps = len(sigmas) - 1
    wanted = max(round(steps * share), 1)
    at = torch.linspace(0, steps, wanted + 1, dtype=torch.float64)
    left = at.floor().long().clamp(max=steps - 1)
    s = sigmas.double()
    return (s[left] + (at - left) * (s[left + 1] - s[left])).to(sigmas.dtype)


def _path(known: FoundFor) -> str:
    """Where the plan for these conditions is kept; what the name has no room for, as a number."""
    size = "x".join(map(str, known.shape or ()))
    rest = crc32(json.dumps(known.settings, sort_keys=True).encode())
    name = f"plan_{known.model}_{known.solver}_{known.steps}_cfg{known.cfg:g}_{size}_{rest:08x}.json"
    return os.path.join(artifacts.folder(), "".join(c if c.isalnum() or c in "._-" else "_" for c in name))


def _same(found: FoundFor, known: FoundFor) -> bool:
    names = ("model", "process", "solver", "settings", "steps", "cfg", "shape")
    return all(getattr(found, name) == getattr(known, name) for name in names)


NODES = [Accelerate, AccelerationPlan]
