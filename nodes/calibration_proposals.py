"""Calibrations that measure a model and compute sigmas from that: one node for each."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from ..solvers.artifact import settings_of
from ..solvers.calibration.library import PROPOSALS
from ..solvers.calibration.losses import LOSSES
from ..solvers.calibration.proposal import Proposal, ProposalSearch
from ..solvers.method import params, summary
from . import calibration
from .bridge import process_of
from .calibration import BUDGET, MODEL, MORE, OUTPUTS, pictures, prepared, pursued, starts
from .calibration_found import CATEGORY
from .calibration_run import SCHEDULE, Pursuit, as_sigmas, path
from .derive import PREFIX, inputs


def node(method: type[Proposal]) -> type[io.ComfyNode]:
    """The node of one method: its parameters after those that all calibrations have."""
    names = [declared.name for declared in params(method)]

    class Derived(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(
                node_id=PREFIX + method.id,
                display_name=f"{method.title} (Quickstep)",
                category=CATEGORY,
                description=f"{summary(method)}\n{method.paper}",
                search_aliases=[method.title, method.id, method.paper, "calibrate", "schedule optimizer"],
                is_output_node=True,
                hidden=[io.Hidden.unique_id],
                inputs=[
                    *MODEL,
                    io.Sampler.Input("sampler", tooltip="The sampler to find sigmas for: one of Quickstep's."),
                    *BUDGET,
                    *inputs(method),
                    MORE,
                ],
                outputs=[io.Sigmas.Output(display_name="sigmas"), *OUTPUTS],
            )

        @classmethod
        def execute(cls, model, positive, negative, latent, sampler, cfg, steps, samples, minutes, seed, name, loss="rms",
                    prompts=None, **settings) -> io.NodeOutput:  # fmt: skip
            proposal = method(**{key: settings[key] for key in names if key in settings})
            solver = calibration.movable(sampler, method.title)
            if steps > proposal.most:
                raise ValueError(
                    f"{method.title}: steps = {steps} is more than the {proposal.most} these settings allow."
                )
            given = prepared(model, positive, negative, latent, cfg, seed, prompts, method.title)
            process = process_of(model)
            search = ProposalSearch(
                process, *given.split(samples), starts(process, steps, solver), loss=LOSSES[loss], solver=solver,
                proposal=proposal, schedules=calibration.STARTS, folder=folder_paths.get_temp_directory(),
                samples=samples, shape=given.shape,
            )  # fmt: skip
            file = path(name, ".json", method.title)
            pursuit = Pursuit(search, given, minutes, SCHEDULE, solver.id, settings_of(solver), file)
            return io.NodeOutput(as_sigmas(pursued(cls, pursuit)), *pictures(cls, pursuit))

    Derived.__name__ = Derived.__qualname__ = method.id
    Derived.__doc__ = method.__doc__
    Derived.__module__ = __name__
    Derived.METHOD = method
    return Derived


NODES = [node(method) for method in PROPOSALS]
