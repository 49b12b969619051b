"""``Quickstep Sampler``: one node in front of all solvers."""

from __future__ import annotations

from comfy_api.latest import io

from ..solvers.auto import Auto
from ..solvers.library import SOLVERS
from ..solvers.method import params, parts
from ..solvers.solver import Solver
from .bridge import sampler
from .derive import PREFIX, inputs

CHOICES: dict[str, type[Solver]] = {s.title: s for s in (Auto, *SOLVERS) if not parts(s)}
"""By what stands in the dropdown. Saved workflows hold these names: added, never renamed."""


class QuickstepSampler(io.ComfyNode):
    """Every solver of the pack in one node: choose one, its options appear. "auto" is a good start for any model.

    Which one, by what you want:
    """

    @classmethod
    def define_schema(cls):
        options = [io.DynamicCombo.Option(title, inputs(solver)) for title, solver in CHOICES.items()]
        return io.Schema(
            node_id=PREFIX + "Sampler",
            display_name="Quickstep Sampler (Quickstep)",
            category="Quickstep/samplers",
            description='Every solver of the pack in one node: choose one, its options appear. "auto" is a good start.',
            search_aliases=[alias for s in CHOICES.values() for alias in (s.title, s.id)],
            inputs=[
                io.DynamicCombo.Input(
                    "solver",
                    options=options,
                    tooltip="How the sigmas are stepped through. auto chooses by model, guidance scale and steps.",
                )
            ],
            outputs=[io.Sampler.Output(display_name="sampler")],
        )

    @classmethod
    def execute(cls, solver=None) -> io.NodeOutput:
        given = dict(solver or {})
        title = given.pop("solver", None)
        if title not in CHOICES:
            raise ValueError(f"Quickstep Sampler: solver = {title!r} is not one of {', '.join(CHOICES)}.")
        chosen = CHOICES[title]
        names = {declared.name for declared in params(chosen)}
        return io.NodeOutput(sampler(chosen(**{name: value for name, value in given.items() if name in names})))


NODES = [QuickstepSampler]
