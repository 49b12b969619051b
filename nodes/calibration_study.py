"""Search Solver: a black-box search of solver schedules on the user's own model, by as many machines as there are."""

from __future__ import annotations

import hashlib
import os

import folder_paths
from comfy_api.latest import io

from ..solvers.artifact import process_name
from ..solvers.calibration.engine import FRONT, SAMPLERS
from ..solvers.calibration.losses import LOSSES
from ..solvers.calibration.space import KNOWN, Space, plan_of
from ..solvers.calibration.study import Study
from ..solvers.process import ForwardProcess
from ..solvers.usf import USF
from . import plot
from .bridge import process_of, sampler
from .calibration import BUDGET, MODEL, MORE, OUTPUTS, prepared, starts
from .calibration_found import CATEGORY
from .calibration_run import as_sigmas, schedules
from .calibration_study_run import Watch, picture
from .derive import PREFIX
from .fingerprint import fingerprint
from .show import show_text

_DECIDE = {
    "derivatives": ("derivative", "how derivatives are estimated: by more points, or relaxed."),
    "predictions": ("prediction", "whether a step integrates data or noise predictions."),
    "correctors": ("corrector", "whether a step is corrected, as UniPC does, at no further call."),
    "times": ("times", "the sigmas. Without, they are those of the best usual schedule."),
}


class SearchSolver(io.ComfyNode):
    """Searches a sampler for your model step by step: sigmas, order, data or noise prediction, derivatives, correctors.

    Try *Fit Solver* first: it follows slopes and needs fewer calls. This search also decides what has no slope, and several
    machines can share it. The result is a solver schedule (a USF table) for this number of calls and guidance scale; the nodes
    Load Solver Table and USF use its file.

    All usual samplers on all usual schedules are tried first. Then Optuna proposes: ``tpe``, Parzen estimators; ``predictor``,
    trees that learn to rank schedules and a genetic search on them (S^3); ``cma-es``, sigmas alone, about the best start;
    ``quasi-random``, Sobol points; ``nsga-ii``, error against calls, from ``fewest`` to ``steps``, one file for each number of
    calls. A trial that is clearly worse than the best after some samples is stopped (Wilcoxon's test). What is best is measured
    on other samples, on which the winner is chosen, and the sigmas of the winner are refined in the last quarter of the time.

    On a mixture in 16 dimensions, 5 steps, 16 samples, 150 trials, the error went from 0.087 to 0.059 with tpe, 0.063 with
    cma-es and 0.075 with predictor; quasi-random found nothing better. One problem, one seed: which search is
    best on your model is not known.

    Every finished trial is in the study: a SQLite file in ComfyUI's user/quickstep folder, or a PostgreSQL database. Run the
    node again with the same ``study`` to go on, also after a crash, which loses at most the trial that ran. Workers on other
    machines join through a PostgreSQL URL; see docs/search.md in the repository.

    Needs the Python packages optuna, cmaes and scikit-learn, which do not come with ComfyUI. Open only databases that you
    trust: Optuna keeps the state of cma-es in them as pickle.

    Source: Liu et al. (2023), arXiv:2312.07243, for the space and the predictor; Akiba et al. (2019), arXiv:1907.10902.
    """

    @classmethod
    def define_schema(cls):
        toggles = [
            io.Boolean.Input(name, default=True, tooltip=f"Search {what}", advanced=True)
            for name, (_, what) in _DECIDE.items()
        ]
        return io.Schema(
            node_id=PREFIX + "SearchSolver",
            display_name="Search Solver (Quickstep)",
            category=CATEGORY,
            description="Searches a sampler for your model step by step: sigmas, order, data or noise prediction, derivatives, "
            "correctors.",
            search_aliases=["USF", "S3", "optuna", "TPE", "CMA-ES", "NSGA-II", "black-box"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                *MODEL,
                *BUDGET,
                io.Combo.Input(
                    "search", options=list(SAMPLERS), default="tpe", tooltip="Who proposes what is tried; see the help page."
                ),
                io.Int.Input(
                    "trials",
                    default=300,
                    min=1,
                    max=100_000,
                    tooltip="Ends when the study has so many, those of all workers together; raise it to go on.",
                ),
                io.Int.Input(
                    "fewest",
                    default=3,
                    min=1,
                    max=100,
                    tooltip="For nsga-ii: the fewest steps to be tried; the most are steps.",
                ),
                io.Int.Input("order", default=3, min=1, max=4, tooltip="Highest order of a step.", advanced=True),
                *toggles,
                io.String.Input(
                    "study", default="", tooltip="Name of the study to begin or go on with. Empty: the name of the file."
                ),
                io.String.Input(
                    "storage",
                    default="",
                    tooltip="URL of its database, postgresql://user@host/name for several machines. Empty: a file of its own.",
                ),
                io.Combo.Input(
                    "role",
                    options=["lead", "worker"],
                    tooltip="worker: runs trials of a study that another leads, and writes no file.",
                    advanced=True,
                ),
                MORE,
            ],
            outputs=[
                io.Sampler.Output(display_name="sampler"),
                io.Sigmas.Output(display_name="sigmas"),
                io.String.Output(display_name="table"),
                *OUTPUTS,
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model, positive, negative, latent, cfg, steps, samples, minutes, seed, name, loss="rms", search="tpe",
        trials=300, fewest=3, order=3, derivatives=True, predictions=True, correctors=True, times=True, study="",
        storage="", role="lead", prompts=None,
    ) -> io.NodeOutput:  # fmt: skip
        if search == FRONT and fewest >= steps:
            raise ValueError(f"Search Solver: fewest = {fewest} must be below steps = {steps} for nsga-ii.")
        if loss not in LOSSES:
            raise ValueError(f"Search Solver: loss = {loss!r} must be one of {', '.join(LOSSES)}.")
        given = prepared(model, positive, negative, latent, cfg, seed, prompts, "Search Solver")
        process = process_of(model)
        chosen = {"derivatives": derivatives, "predictions": predictions, "correctors": correctors, "times": times}
        decisions = ("order", *(_DECIDE[key][0] for key, on in chosen.items() if on))
        space = Space(process, fewest if search == FRONT else steps, steps, order, decisions)
        title = study.strip() or name
        about = {"model": fingerprint(model), "process": process_name(process), "cfg": cfg, "shape": list(given.shape)}
        made = Study(
            *given.split(samples), space, usual(process, space), title, storage.strip() or _own(title), about, search, trials,
            loss, seed, _ends(title, given, samples, about), role == "lead",
        )  # fmt: skip
        watch = Watch(made, given, minutes, name)
        watch.run()
        table = made.best
        if table is None:
            raise ValueError("Search Solver: there was no time for a single trial; give it more minutes.")
        base, text = made.base_trial(), watch.report()
        show_text(cls, text)
        plan = plan_of(table)
        shown = {"found": plan.times}
        if base is not None:
            shown[base.user_attrs["start"]] = made.table_of(base).sigmas
        return io.NodeOutput(
            sampler(USF(table.text())), as_sigmas(plan.times), table.text(), plot.to_image(picture(made)),
            plot.to_image(schedules(process, shown)), text,
        )  # fmt: skip


def usual(process: ForwardProcess, space: Space) -> dict[str, dict]:
    """Every usual sampler on every usual schedule of as many steps as the space has."""
    found = {}
    for steps in range(space.least, space.most + 1):
        for schedule, plan in starts(process, steps, USF()).items():
            for name, known in KNOWN.items():
                end = f", {steps} steps" if space.least < space.most else ""
                found[f"{name}, {schedule}{end}"] = space.values(plan.times, known)
    return found


def _folder() -> str:
    """Of studies and their teachers: ComfyUI's user folder, which is kept, and whose files are not offered as models."""
    path = os.path.join(folder_paths.get_user_directory(), "quickstep")
    os.makedirs(path, exist_ok=True)
    return path


def _own(title: str) -> str:
    if any(c in title for c in '/\\:*?"<>|'):
        raise ValueError(f"Search Solver: study = {title!r} must be a plain name, without folders.")
    return "sqlite:///" + os.path.join(_folder(), f"{title}.db")


def _ends(title: str, given, samples: int, about: dict) -> str:
    """The folder for the teacher's ends of these samples."""
    digest = hashlib.sha256(
        repr((title, sorted(about.items()), samples, given.seed, len(given.latent["samples"]))).encode()
    )
    for conditioning in (*given.positives, given.negative):
        for cond, _ in conditioning:
            digest.update(cond.detach().float().cpu().numpy().tobytes())
    return os.path.join(_folder(), f"teacher-{digest.hexdigest()[:16]}")


NODES = [SearchSolver]
