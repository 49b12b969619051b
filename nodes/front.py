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
    """The pack's solvers in one node: choose one, its options appear. "auto" is a good start for any model.

    - a safe start, any model, 5 to 10 calls: auto, with the Karras schedule, on flow models (SD3, Flux, Wan) with Beta
    - Stable Diffusion 1, 2, XL at 5 to 10 calls: GHVB 1.8; flow models: UniPC, order 2, variant exact
    - without guidance (CFG 1), 10 calls and more: DEIS in lambda, UniPC of order 3 or 4 from 20 calls on
    - what everyone else uses, to compare pictures: DPM-Solver++ of order 2 is ComfyUI's dpmpp_2m, UniPC its uni_pc
    - noise added on the way: SDE-DPM-Solver++, ER-SDE or SA-Solver, from 15 calls on
    - models distilled for 1 to 8 steps (LCM, TCD, DMD2, Lightning): Consistency sampler, Uniform schedule
    - the converged picture, calls do not matter: rhoRK-DEIS or Adaptive Runge-Kutta
    - artifacts at high guidance and few steps: put Momentum around the sampler

    Measured on exact problems and small networks, not on large checkpoints: Compare tells you about yours.
    DPM-Solver-v3 and USF have nodes of their own, as they take files.
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
