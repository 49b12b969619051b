"""One SAMPLER node per solver, and the nodes that make a sampler of another one."""

from __future__ import annotations

from comfy_api.latest import io

from ..solvers.library import FAMILIES, TRANSFORMS, WRAPPERS
from ..solvers.mean_reverting import MeanReverting
from . import bridge
from .bridge import latent_in, sampler, solver_in, transformed
from .derive import PREFIX, node

MENU = {f"samplers/{family}": members for family, members in FAMILIES.items()} | {"samplers/around a sampler": WRAPPERS}
OUTPUT = io.Sampler.Output(display_name="sampler")


class MeanRevertingSampler(io.ComfyNode):
    __doc__ = MeanReverting.__doc__
    METHOD = MeanReverting

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + MeanReverting.id,
            display_name=f"{MeanReverting.title} (Quickstep)",
            category="Quickstep/samplers/around a sampler",
            description="For flow models trained to restore a degraded picture by a mean-reverting process (mu + noise to the "
            "picture): any sampler, around that picture. On other models it changes nothing.",
            inputs=[
                io.Sampler.Input("sampler", tooltip="The sampler to build on: one of Quickstep's."),
                io.Model.Input("model", tooltip="Its latent format tells how the picture's latent is scaled."),
                io.Latent.Input("mu", tooltip="The degraded picture, VAE-encoded: what the process reverts to."),
            ],
            outputs=[OUTPUT],
        )

    @classmethod
    def execute(cls, sampler, model, mu) -> io.NodeOutput:
        solver = solver_in(sampler, MeanReverting.title)
        return io.NodeOutput(bridge.sampler(MeanReverting(solver, latent_in(model, mu), plain_start=True)))


NODES = [
    *(
        node(solver, category, lambda s: (sampler(s),), [OUTPUT])
        for category, members in MENU.items()
        for solver in members
    ),
    *(
        node(
            transform,
            "samplers/around any sampler",
            lambda t, sampler: (transformed(sampler, t),),
            [OUTPUT],
            before=[io.Sampler.Input("sampler", tooltip="Any sampler, ComfyUI's own included.")],
        )
        for transform in TRANSFORMS
    ),
    MeanRevertingSampler,
]
