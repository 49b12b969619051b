"""Search AutoDiffusion: sigmas, and the parts of the user's own network that each step leaves out."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

from comfy_api.latest import io

from ..solvers.artifact import load, mismatches, settings_of
from ..solvers.caching import block_skip
from ..solvers.caching.auto_diffusion import KIND, AutoDiffusion, skips_of
from ..solvers.caching.block_skip import BlockSkip, Unit
from ..solvers.calibration.families import Plan
from ..solvers.calibration.losses import LOSSES
from ..solvers.calibration.skip_search import SkipSearch
from ..solvers.calibration.skip_space import Allowance, Left, Skipping, called_at
from ..solvers.process import ForwardProcess
from ..solvers.solver import Solver
from . import artifacts, plot
from .attach import attach
from .bridge import process_of
from .calibration import BUDGET, MODEL, MORE, OUTPUTS, movable, prepared, resumable, resume, starts
from .calibration_found import CATEGORY
from .calibration_run import Pursuit, as_sigmas, curve, path, schedules
from .derive import PREFIX
from .fingerprint import fingerprint
from .plot_cells import skipped
from .show import show_text
from .sites.tuning import held

TITLE, KEY = "Search AutoDiffusion", "quickstep.search_auto_diffusion"
ENGINES = ("tpe", "nsga-ii", "quasi-random")
log = logging.getLogger(__name__)


class SearchAutoDiffusion(io.ComfyNode):
    """Finds sigmas, and for each step the parts of your network that it can do without, so that a run costs no more than a share
    of the work that whole steps would. On both demo networks fewer whole steps were better.

    Needs the scores that Block Sensitivity makes of a model: the parts with the least score per work may be left out. The error
    is that of the finished sample against many steps of the whole network. Sigmas and sets of parts are improved in turns: the
    sigmas by their slopes, the sets by Optuna, ``tpe``, or ``nsga-ii``, a genetic search as in the paper. Every set that is tried
    is within ``budget``, the mean over steps of the work that is done: where too little is left out, parts of the least score per
    work of that part of the run are added, and what is left out in vain is computed. (The published program does not check this
    again after it has changed a candidate, and its change of the layers does nothing, by a slip.)

    The outputs ``model`` and ``sigmas`` belong together, with the same sampler. Later, use AutoDiffusion and Found Schedule with
    the file. For this sampler, number of steps and about this guidance scale.

    Fewer whole steps save work too, and few-step samplers are good at it: ``report`` says what as many whole steps as the budget
    pays for would give on the best usual schedule, and if that is better, says so. Then take those.

    Measured with DPM-Solver++ 2M, 8 steps, CFG 4, 8 samples and 4 minutes on a shared core: fewer whole steps were better on both
    demo networks. DiT, budget 0.8, 220 sets tried: 0.180 with parts left out, 0.104 with 6 whole steps. UNet, budget 0.9, 27
    sets tried: 0.118, and 0.051 with 7 whole steps. All attention and feed-forward layers of that UNet are 19 % of its work, so
    0.8 cannot be met there. Against leaving out what the scores say, the search lowered the error on samples kept aside to 0.90
    (DiT) and 0.98 (UNet). Large networks, where single blocks matter less, were not measured.

    Samplers of one network call for each sigma only. Needs the Python package optuna, which does not come with ComfyUI.

    Source: Li et al. (2023), arXiv:2309.10438 (AutoDiffusion); the error, the turns and the repair are this pack's own.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "SearchAutoDiffusion",
            display_name=f"{TITLE} (Quickstep)",
            category=CATEGORY,
            description="Finds sigmas, and for each step the parts of your network that it can do without, so that a run costs no "
            "more than a share of the work that whole steps would.",
            search_aliases=["skip layers", "block skip", "calibrate", "optuna", "NAS"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                *MODEL,
                io.Sampler.Input(
                    "sampler",
                    tooltip="The sampler to search for: a deterministic one of Quickstep's, one call for each step.",
                ),
                io.Combo.Input(
                    "scores",
                    options=artifacts.files(block_skip.KIND),
                    tooltip="A file of Block Sensitivity, for this model: the parts that may be left out.",
                ),
                *BUDGET,
                io.Float.Input(
                    "budget",
                    default=0.8,
                    min=0.05,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the network's work that a run may cost, the mean over its steps. 1 leaves nothing out.",
                ),
                io.Int.Input(
                    "trials", default=300, min=1, max=100_000, tooltip="How many sets of parts to try at most."
                ),
                io.Int.Input(
                    "parts",
                    default=12,
                    min=1,
                    max=1000,
                    tooltip="How many parts of the network may be left out, those of the least score per work. Raise it if the "
                    "budget cannot be met; more parts take more trials.",
                ),
                io.Combo.Input(
                    "search",
                    options=list(ENGINES),
                    default="tpe",
                    tooltip="Who proposes the sets. tpe: learns which parts matter. nsga-ii: a genetic search; needs more trials.",
                    advanced=True,
                ),
                resume(KIND),
                MORE,
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Sigmas.Output(display_name="sigmas"),
                *OUTPUTS[:-1],
                io.Image.Output(display_name="left out"),
                OUTPUTS[-1],
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent, sampler, scores, cfg, steps, samples, minutes, seed, name, loss="rms", budget=0.8,
        trials=300, parts=12, search="tpe", resume=artifacts.NONE, prompts=None,
    ) -> io.NodeOutput:  # fmt: skip
        solver, process = movable(sampler, TITLE), process_of(model)
        given = prepared(model, positive, negative, latent, cfg, seed, prompts, TITLE)
        attach(model, AutoDiffusion())  # refuses what it could not be used with
        allowance = allowed(model, scores, parts, steps, budget)
        found = resumable(resume, KIND, model, TITLE)
        left = Left()
        given = replace(given, model=held(model, allowance.units, lambda: left.names, TITLE, KEY))
        begun = {
            label: Plan(Skipping(solver, allowance.within([()] * steps), left), plan.times)
            for label, plan in starts(process, steps, solver).items()
        }
        once(solver, process, next(iter(begun.values())).times)
        resumed = None
        if found is not None:
            known = skips_of(found)
            if len(known.left_out) != steps:
                raise ValueError(
                    f"{TITLE}: the file to resume is for {len(known.left_out)} steps, and steps = {steps}."
                )
            resumed = Plan(Skipping(solver, allowance.within(known.left_out), left), list(known.sigmas))
        fewer = max(math.floor(budget * steps + 1e-9), 1)
        whole = {f"{fewer} whole steps, {label}": plan for label, plan in starts(process, fewer, solver).items()}
        made = SkipSearch(
            process, *given.split(samples), begun, resumed, LOSSES[loss], solver=solver, allowance=allowance, network=left,
            whole=whole, sampler=search, tries=trials, seed=seed,
        )  # fmt: skip
        pursuit = Pursuit(made, given, minutes, KIND, solver.id, settings_of(solver), path(name, ".json", TITLE))
        pursuit.run()
        assert made.best is not None and made.base is not None
        result, text = load(pursuit.path, KIND), f"{pursuit.report()}\n{in_words(made)}"
        show_text(cls, text)
        shown = {"found": made.best.times, made.base_label: made.base.times}
        return io.NodeOutput(
            attach(model, AutoDiffusion(result)), as_sigmas(made.best.times), plot.to_image(curve(made)),
            plot.to_image(schedules(process, shown)), plot.to_image(skipped(skips_of(result))), text,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, **given):
        return [artifacts.modified(given.get(key, artifacts.NONE)) for key in ("scores", "resume")]


def allowed(model, scores: str, parts: int, steps: int, budget: float) -> Allowance:
    """The parts that may be left out of this model, and how much of its work has to be."""
    found = artifacts.read(scores, block_skip.KIND, TITLE)
    if found is None:
        raise ValueError(f"{TITLE}: choose scores; Block Sensitivity makes them, once for each model.")
    for sentence in mismatches(found, model=fingerprint(model)):
        log.warning("%s: the scores may not fit. %s", TITLE, sentence)

    def price(unit: Unit) -> float:
        return unit.score / unit.work

    able = sorted((unit for unit in BlockSkip(found).units() if unit.work > 0.0), key=price)
    try:
        return Allowance(tuple(able[:parts]), steps, budget)
    except ValueError as error:
        raise ValueError(f"{TITLE}: {error}") from None


def once(solver: Solver, process: ForwardProcess, times: list[float]) -> None:
    """Refuses samplers that call the network elsewhere than once at each sigma: the share of the work would be another one."""
    if called_at(solver, process, times) != times[:-1]:
        raise ValueError(
            f"{TITLE}: {solver.title} calls the network more than once in a step, or between the sigmas; connect a sampler of one "
            "call for each step, such as DPM-Solver++ or UniPC."
        )


def in_words(made: SkipSearch) -> str:
    """What is left out, and what fewer whole steps would give."""
    extra = made.extra()
    lines = [
        f"A run costs {extra['kept']:.1%} of the work of {made.allowance.steps} whole steps; {len(made.seen)} different sets of "
        "parts were tried."
    ]
    if made.whole_label:
        found, whole = map(made.loss.error, (made.select_loss, made.whole_select))
        lines.append(
            f"On the samples that select, the error is {found:.4f}, and with the whole network in fewer steps ({made.whole_label}) "
            f"{whole:.4f}."
        )
        lines.append(
            "FEWER WHOLE STEPS ARE BETTER at this budget: use those, with nothing left out."
            if whole < found
            else "So leaving parts out is better here. Optimize Schedule would improve the sigmas of the fewer steps too."
        )
    return "\n".join(lines)


NODES = [SearchAutoDiffusion]
