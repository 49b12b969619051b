"""Calibration on the user's own model: Optimize Schedule and Fit Solver."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from ..solvers.artifact import Artifact, load, settings_of
from ..solvers.calibration import fitted
from ..solvers.calibration.asking import check_sigmas
from ..solvers.calibration.decoupled import DecoupledTimes
from ..solvers.calibration.families import Plan, fitted_plan, written
from ..solvers.calibration.fitted import FittedSolver
from ..solvers.calibration.losses import LOSSES
from ..solvers.calibration.search import ScheduleSearch, SolverSearch
from ..solvers.deis import DEIS
from ..solvers.er_sde import ERSDE
from ..solvers.exponential import DDIM, DPMSolverPP
from ..solvers.method import Method
from ..solvers.momentum import GHVB, HB
from ..solvers.process import ForwardProcess
from ..solvers.sa import SASolver
from ..solvers.schedules import (
    BetaSchedule,
    CosineSchedule,
    ExponentialSchedule,
    KarrasSchedule,
    UniformSchedule,
)
from ..solvers.solver import Solver
from ..solvers.unipc import UniPC
from . import artifacts, calibration_found, plot
from .attach import on
from .bridge import distinct, process_of, sampler, solver_in
from .calibration_found import CATEGORY, warned
from .calibration_run import SCHEDULE, Pursuit, as_sigmas, curve, path, schedules
from .calibration_samples import Samples, samples
from .derive import PREFIX
from .show import show_text

STARTS = {
    "Karras": KarrasSchedule(),
    "Exponential": ExponentialSchedule(),
    "Karras, rho 3": KarrasSchedule(rho=3.0),
    "Beta": BetaSchedule(),
    "Beta, shift 3": BetaSchedule(shift=3.0),
    "Uniform": UniformSchedule(),
    "Uniform, shift 3": UniformSchedule(shift=3.0),
    "Cosine": CosineSchedule(),
}
"""Schedules that searches compare, and begin from the best of."""
SOLVERS = {
    "DPM-Solver++ 2M": DPMSolverPP(),
    "DEIS 2": DEIS(points=2, variable="rho"),
    "UniPC": UniPC(),
    "ER-SDE, ODE": ERSDE(phi="ode"),
    "SA-Solver, ODE": SASolver(eta=0.0),
    "Momentum, 2M": HB(DPMSolverPP()),
    "GHVB": GHVB(),
    "DDIM": DDIM(),
}
"""Samplers that Fit Solver compares on each of these; they are written as fitted solvers, which they all can be."""

MODEL = [
    io.Model.Input("model", tooltip="The model to calibrate, LoRAs and patches included. It is not changed."),
    io.Conditioning.Input("positive", tooltip="A prompt of the kind you are going to use. More of them below."),
    io.Conditioning.Input("negative", tooltip="The negative prompt."),
    io.Latent.Input(
        "latent",
        tooltip="A latent of the size to be sampled. Its batch size is how many samples run at once: as many as fit in memory.",
    ),
]
SEED = io.Int.Input(
    "seed",
    default=0,
    min=0,
    max=0xFFFFFFFF,
    control_after_generate=io.ControlAfterGenerate.fixed,
    tooltip="First of the seeds; the others follow it.",
)
BUDGET = [
    io.Float.Input(
        "cfg", default=4.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance scale: what is found is for this one."
    ),
    io.Int.Input(
        "steps", default=8, min=1, max=100, tooltip="Network calls of the runs to be improved; best between 4 and 12."
    ),
    io.Int.Input(
        "samples",
        default=16,
        min=2,
        max=1024,
        tooltip="Seeds of the fit. As many others choose what is kept, and half as many again measure it. With 8, what was chosen "
        "turned out worse on other samples; take 32 where the time is there.",
    ),
    io.Float.Input(
        "minutes",
        default=10.0,
        min=0.05,
        max=1440.0,
        step=0.5,
        tooltip="Stops after about this time with the best found so far. Stop earlier with ComfyUI's own button: the file is kept.",
    ),
    SEED,
    io.String.Input("name", default="my_calibration", tooltip="Name of the file in models/quickstep, without ending."),
    io.Combo.Input(
        "loss",
        options=list(LOSSES),
        default="rms",
        tooltip="rms: the mean error. log: its mean logarithm, closer to the median. mse: mean square, ruled by few outliers.",
        advanced=True,
    ),
]
MORE = io.Autogrow.Input(
    "prompts",
    template=io.Autogrow.TemplatePrefix(
        io.Conditioning.Input(
            "prompt",
            tooltip="Another prompt; samples take turns. Different prompts help more than further seeds of the same: best one for "
            "each sample.",
            optional=True,
        ),
        prefix="prompt",
        min=0,
        max=32,
    ),
    optional=True,
)
OUTPUTS = [  # with ids: ComfyUI's own tell the place in the node that it has asked first, and these have several places
    io.Image.Output("curve_image", display_name="curve"),
    io.Image.Output("schedule_image", display_name="schedule"),
    io.String.Output("report_text", display_name="report"),
]


def resume(kind: str) -> io.Combo.Input:
    return io.Combo.Input(
        "resume",
        options=artifacts.files(kind),
        tooltip="A file of an earlier search with the same steps, to go on from.",
    )


class OptimizeSchedule(io.ComfyNode):
    """Finds the sigmas for your model, sampler and number of steps: those with which few steps end nearest to many.

    It samples your prompts with many steps (the *teacher*), and moves the sigmas of few steps until they end as near to that as
    they can. Some seeds are for moving them, as many others for choosing what is kept, and others still for ``report``: on those
    it may even be worse than a usual schedule, so read ``report`` before you use the file.

    Takes the best of the usual schedules and moves all its sigmas, by Levenberg-Marquardt on the finished samples, from up to
    three starts. Needs no gradients. The teacher is DPM-Solver++ (3M) with so many steps that doubling them changes nothing that
    matters. Error: mean over samples of the root mean square difference to the teacher's latent.

    The result is for this sampler, number of steps and about this guidance scale; other prompts and seeds are served as well.
    The file lies in ComfyUI's models/quickstep folder: *Found Schedule* uses it, here or elsewhere. Interrupt at any time: the
    best so far is in the file, and ``resume`` goes on from it.

    Deterministic Quickstep samplers only, and no accelerators on the model, which would see other runs here than later.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "OptimizeSchedule",
            display_name="Optimize Schedule (Quickstep)",
            category=CATEGORY,
            description="Finds the sigmas for your model, sampler and number of steps: those with which few steps end nearest to "
            "many.",
            search_aliases=["align your steps", "calibrate", "schedule search", "optimal steps"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                *MODEL,
                io.Sampler.Input(
                    "sampler", tooltip="The sampler to find sigmas for: a deterministic one of Quickstep's."
                ),
                *BUDGET,
                resume(SCHEDULE),
                MORE,
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas"), *OUTPUTS],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent, sampler, cfg, steps, samples, minutes, seed, name, loss="rms",
        resume=artifacts.NONE, prompts=None,
    ) -> io.NodeOutput:  # fmt: skip
        solver = movable(sampler, "Optimize Schedule")
        given = prepared(model, positive, negative, latent, cfg, seed, prompts, "Optimize Schedule")
        found = resumable(resume, SCHEDULE, model, "Optimize Schedule")
        resumed = None if found is None else Plan(solver, sigmas_of(found, steps, "Optimize Schedule"))
        process = process_of(model)
        fit, select, report = given.split(samples)
        search = ScheduleSearch(
            process, fit, select, report, starts(process, steps, solver), resumed, LOSSES[loss], solver=solver
        )
        file = path(name, ".json", "Optimize Schedule")
        pursuit = Pursuit(search, given, minutes, SCHEDULE, solver.id, settings_of(solver), file)
        return io.NodeOutput(as_sigmas(pursued(cls, pursuit)), *pictures(cls, pursuit))


class FitSolver(io.ComfyNode):
    """Fits a sampler to your model: the weights with which each step mixes its predictions, and the sigmas with them.

    It samples your prompts with many steps (the *teacher*), and changes a run of few steps until it ends as near to that as it
    can. Some seeds are for changing it, as many others for choosing what is kept, and others still for ``report``: read that
    before you use the file.

    A usual multistep sampler extrapolates in the same way for all models. Here each step's weights are fitted: first by least
    squares along the teacher's trajectory, then by Levenberg-Marquardt on the finished samples, together with the sigmas, the
    sizes of what a step is made of (``rescale``), and the noise levels that the network is told (``decouple``, as in LD3). Needs
    no gradients. The start is the best of eight usual samplers (DDIM, DPM-Solver++ 2M and with momentum, GHVB, DEIS, UniPC, ER-SDE
    and SA-Solver without noise) on eight usual schedules.

    The result is for this number of steps; other prompts and seeds are served as well, other guidance scales and sizes less
    (see *Fitted solver*). Use both outputs, ``sampler`` and ``sigmas``, or the nodes *Fitted solver* and *Found Schedule* with the
    same file. Interrupt at any time: the best so far is in the file, and ``resume`` goes on from it.

    Connect many prompts: with 32 samples of 32 prompts, at CFG 4, with ``loss`` = log and 10 minutes on two CPU cores, the mean
    error of 48 other samples and prompts was at 8 and 10 steps .031 and .025 on the demo UNet, where the best pair of ComfyUI's
    core has .061 and .049, and .053 and .036 on the demo DiT (core .067 and .047 with a shift of 3, .094 and .073 without). The
    mean is ruled by the few samples that end in another picture than the converged one; the geometric mean says how near all
    others come: .019 and .013 (core .032 and .018), .030 and .021 (.043 and .032). With 8 prompts instead of 32, and an earlier
    version, the UNet's error at 8 steps was .043. At 5 and 6 steps on the DiT, core's best pair had the smaller mean.

    With a SIGMAS connected the schedule stays as it is, and only weights are fitted.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "FitSolver",
            display_name="Fit Solver (Quickstep)",
            category=CATEGORY,
            description="Fits a sampler to your model: the weights with which each step mixes its predictions, and the sigmas with "
            "them.",
            search_aliases=["calibrate", "bespoke solver", "BNS", "S4S", "least squares"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                *MODEL,
                *BUDGET,
                io.Int.Input(
                    "memory",
                    default=10,
                    min=2,
                    max=20,
                    tooltip="How many predictions a step mixes at most. Lower it, to 3, for more than 12 steps or few minutes.",
                ),
                resume(fitted.KIND),
                io.Boolean.Input(
                    "decouple",
                    default=True,
                    tooltip="Also find for each call the noise level that the network is told, as LD3 does. Without, there is less "
                    "to fit: for few samples.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "rescale",
                    default=True,
                    tooltip="Also find for each step how much of the sample and of the predictions it takes, which usual samplers "
                    "keep as they must be for constant predictions.",
                    advanced=True,
                ),
                io.Sigmas.Input("sigmas", optional=True, tooltip="To fit weights on these sigmas, which then stay."),
                MORE,
            ],
            outputs=[io.Sampler.Output(display_name="sampler"), io.Sigmas.Output(display_name="sigmas"), *OUTPUTS],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent, cfg, steps, samples, minutes, seed, name, loss="rms", memory=10,
        resume=artifacts.NONE, decouple=True, rescale=True, sigmas=None, prompts=None,
    ) -> io.NodeOutput:  # fmt: skip
        given = prepared(model, positive, negative, latent, cfg, seed, prompts, "Fit Solver")
        process = process_of(model)
        if sigmas is None:
            schedules = {name: plan.times for name, plan in starts(process, steps, FittedSolver()).items()}
        else:
            schedules = {"your sigmas": whole(process, distinct(sigmas.tolist()), "Fit Solver")}
            steps = len(schedules["your sigmas"]) - 1
        begun = {
            f"{s}, {name}": written(SOLVERS[s], process, times) for name, times in schedules.items() for s in SOLVERS
        }
        found = resumable(resume, fitted.KIND, model, "Fit Solver")
        resumed = None
        if found is not None:
            FittedSolver(found)  # refuses damaged ones
            times = sigmas_of(found, steps, "Fit Solver")
            if sigmas is not None:
                check_sigmas(schedules["your sigmas"], times, "Fit Solver", "the file to resume was fitted")
                times = schedules["your sigmas"]
            resumed = fitted_plan(
                times, found.table["weights"], *(found.table.get(name) for name in ("offsets", "scales"))
            )
        fit, select, report = given.split(samples)
        search = SolverSearch(
            process, fit, select, report, begun, resumed, LOSSES[loss], memory=memory, joint=sigmas is None,
            rescale=rescale, decouple=decouple,
            folder=folder_paths.get_temp_directory(), samples=samples, shape=given.shape,
        )  # fmt: skip
        pursuit = Pursuit(search, given, minutes, fitted.KIND, FittedSolver.id, {}, path(name, ".json", "Fit Solver"))
        times = pursued(cls, pursuit)
        made = FittedSolver(load(pursuit.path, fitted.KIND))
        return io.NodeOutput(sampler(made), as_sigmas(times), *pictures(cls, pursuit))


def deterministic(sampler, taker: str) -> Solver:
    """The solver of a SAMPLER, if it makes the same run every time."""
    solver = solver_in(sampler, taker)
    if solver.stochastic or solver.nfe(1) is None:
        why = "adds noise" if solver.stochastic else "chooses its own steps"
        raise ValueError(
            f"{taker}: {solver.title} {why} with these settings; connect a deterministic sampler of fixed steps."
        )
    return solver


def movable(sampler, taker: str) -> Solver:
    """A deterministic solver that runs on any sigmas, for searches that move them."""
    solver = deterministic(sampler, taker)
    tied = _tied(solver)
    if tied is not None:
        raise ValueError(
            f"{taker}: {tied.title} runs on the sigmas of its file alone, and here they are moved; connect a sampler without that "
            "file."
        )
    return solver


def _tied(method: Method) -> Method | None:
    """What in it refuses other sigmas than those of its file."""
    if isinstance(method, FittedSolver) and method.calibration is not None and method.elsewhere == "refuse":
        return method
    if isinstance(method, DecoupledTimes) and method.calibration is not None:
        return method
    inner = (_tied(made_of) for made_of in vars(method).values() if isinstance(made_of, Method))
    return next((found for found in inner if found is not None), None)


def resumable(file: str, kind: str, model, taker: str) -> Artifact | None:
    """What an earlier search found, if it can be gone on from with this model; None without a file."""
    found = artifacts.read(file, kind, taker)
    if found is not None:
        warned(found, model, file, taker)
    return found


def prepared(model, positive, negative, latent, cfg, seed, prompts, taker: str) -> Samples:
    """The calibration set; refuses models with accelerators."""
    if on(model):
        names = ", ".join(a.title for a in on(model))
        raise ValueError(f"{taker}: {names} is on the model; take it off to calibrate, and put it on again to sample.")
    others = [prompt for prompt in (prompts or {}).values() if prompt is not None]
    return samples(model, [positive, *others], negative, latent, cfg, seed)


def starts(process: ForwardProcess, steps: int, solver: Solver) -> dict[str, Plan]:
    """All usual schedules that have so many steps on this model."""
    found = {}
    for name, schedule in STARTS.items():
        try:
            times = schedule(process, process.t_max, process.t_min, steps)
        except ValueError:
            continue
        found[name] = Plan(solver, times.tolist())
    return found


def whole(process: ForwardProcess, times: list[float], taker: str) -> list[float]:
    """``times``, if they are those of a whole run."""
    if len(times) < 2 or times[-1] != 0.0 or abs(times[0] - process.t_max) > 1e-3 * process.t_max:
        raise ValueError(f"{taker}: the sigmas must run from {process.t_max:g} to 0; leave denoise at 1.")
    return [process.t_max, *times[1:]]


def sigmas_of(found: Artifact, steps: int, taker: str) -> list[float]:
    times = found.table.get("sigmas")
    if not isinstance(times, list) or len(times) != steps + 1:
        raise ValueError(f"{taker}: the file to resume is not for {steps} steps.")
    return [float(t) for t in times]


def pursued(cls, pursuit: Pursuit) -> list[float]:
    """Runs it, and returns the times that were found."""
    pursuit.run()
    assert pursuit.search.best is not None
    return pursuit.search.best.times


def pictures(cls, pursuit: Pursuit) -> tuple:
    search, text = pursuit.search, pursuit.report()
    show_text(cls, text)
    assert search.best is not None and search.base is not None
    shown = {"found": search.best.times, search.base_label: search.base.times}
    return plot.to_image(curve(search)), plot.to_image(schedules(search.process, shown)), text


NODES = [OptimizeSchedule, FitSolver, *calibration_found.NODES]
