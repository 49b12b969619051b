"""LD3: sigmas, and the noise levels at which the network is asked."""

from __future__ import annotations

from comfy_api.latest import io

from ..solvers.artifact import load, settings_of
from ..solvers.calibration.decoupled import KIND, DecoupledTimes, decoupled
from ..solvers.calibration.losses import LOSSES
from ..solvers.calibration.search import ScheduleSearch
from . import artifacts, calibration
from .bridge import process_of, transformed
from .calibration import BUDGET, MODEL, MORE, OUTPUTS, pictures, prepared, pursued, resume, sigmas_of, starts
from .calibration_found import CATEGORY
from .calibration_run import Pursuit, as_sigmas, path
from .derive import PREFIX

TITLE = "LD3"


class LD3(io.ComfyNode):
    """Finds the sigmas for your model, sampler and number of steps, and for each call the noise level that the network is told,
    which may be a little off the sample's own: in few steps a sample is not quite what the network expects at its sigma.

    Both together, by Levenberg-Marquardt on the finished samples, from up to three of the usual schedules; see *Optimize
    Schedule*, which moves the sigmas alone, and *Decoupled times*, which uses the file with the sigmas of Found Schedule. Some
    seeds are for the fit, as many others choose what is kept, and others still are for ``report``: read it before you use the
    file. Levels move by less than a factor of 1.65, the first one not at all.

    The paper learns both by gradients through all steps, with a start noise that may move a little; here neither gradients nor a
    moving start are needed: the loss is one that samples which end elsewhere than the teacher's do not rule. The published
    program holds the levels where they are in one of its modes (the radius they may move in is computed from equal numbers).

    The result is for this sampler, number of steps and about this guidance scale. *Fit Solver* has more to fit, and finds less
    error where nothing but calls count; this one keeps the sampler that you know.

    Source: Tong et al. (2024), arXiv:2405.15506.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + TITLE,
            display_name=f"{TITLE} (Quickstep)",
            category=CATEGORY,
            description="Finds the sigmas for your model, sampler and number of steps, and for each call the noise level that the "
            "network is told, which may be a little off the sample's own.\nTong et al. (2024), arXiv:2405.15506",
            search_aliases=["learning to discretize", "decoupled times", "calibrate", "schedule search"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                *MODEL,
                io.Sampler.Input(
                    "sampler", tooltip="The sampler to find them for: a deterministic one of Quickstep's."
                ),
                *BUDGET,
                resume(KIND),
                MORE,
            ],
            outputs=[
                io.Sampler.Output(display_name="sampler"),
                io.Sigmas.Output(display_name="sigmas"),
                *OUTPUTS,
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent, sampler, cfg, steps, samples, minutes, seed, name, loss="rms",
        resume=artifacts.NONE, prompts=None,
    ) -> io.NodeOutput:  # fmt: skip
        solver = calibration.movable(sampler, TITLE)
        given = prepared(model, positive, negative, latent, cfg, seed, prompts, TITLE)
        found, resumed = calibration.resumable(resume, KIND, model, TITLE), None
        if found is not None:
            DecoupledTimes(found)  # refuses damaged ones
            resumed = decoupled(solver, sigmas_of(found, steps, TITLE), found.table["offsets"])
        process = process_of(model)
        search = ScheduleSearch(
            process, *given.split(samples), starts(process, steps, solver), resumed, LOSSES[loss], solver=solver, decouple=True
        )  # fmt: skip
        file = path(name, ".json", TITLE)
        pursuit = Pursuit(search, given, minutes, KIND, solver.id, settings_of(solver), file)
        times = pursued(cls, pursuit)
        made = transformed(sampler, DecoupledTimes(load(pursuit.path, KIND)))
        return io.NodeOutput(made, as_sigmas(times), *pictures(cls, pursuit))


NODES = [LD3]
