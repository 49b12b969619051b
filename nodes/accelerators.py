"""Accelerators as MODEL -> MODEL nodes, and what a run really cost."""

from __future__ import annotations

from comfy_api.latest import io

from ..solvers.caching.library import ACCELERATORS
from .attach import attach, ledger_of, measure
from .derive import PREFIX, node
from .show import show_text

MODEL_TIP = "The model to accelerate. It is not changed: the output is a copy that shares its weights."


class Measure(io.ComfyNode):
    """Counts what sampling with this model costs, without changing anything.

    For Report, where no accelerator of this pack is used; the accelerators measure by themselves.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "Measure",
            display_name="Measure (Quickstep)",
            category="Quickstep/tools",
            description="Counts what sampling with this model costs, for Report. Accelerators do so by themselves.",
            inputs=[io.Model.Input("model", tooltip="The model to measure.")],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        return io.NodeOutput(measure(model))


class Report(io.ComfyNode):
    """Says what the last sampling run cost: network calls made, network work skipped, seconds.

    Give it the MODEL that was sampled with and the LATENT that came out; the latent is passed on, it only makes sure
    that sampling comes first. Several passes with the same model in one workflow have a line each.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "Report",
            display_name="Report (Quickstep)",
            category="Quickstep/tools",
            description="Says what the last sampling run cost: network calls made, network work skipped, seconds.",
            search_aliases=["calls", "NFE", "timing", "benchmark"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Latent.Input("latent", tooltip="The sampler's output. Passed on unchanged."),
                io.Model.Input(
                    "model", tooltip="The model as it went into the sampler: from an accelerator or Measure."
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent"), io.String.Output(display_name="report")],
        )

    @classmethod
    def execute(cls, latent, model) -> io.NodeOutput:
        ledger = ledger_of(model)
        if ledger is None:
            raise ValueError(
                "Report: this model was not measured; take the one from a Quickstep accelerator or from Measure, as it "
                "went into the sampler."
            )
        text = "\n".join(run.line() for run in ledger.last()) or "No run yet with this model."
        show_text(cls, text)
        return io.NodeOutput(latent, text)


NODES = [
    *(
        node(
            accelerator,
            "accelerators",
            lambda settings, model: (attach(model, settings),),
            [io.Model.Output(display_name="model")],
            before=[io.Model.Input("model", tooltip=MODEL_TIP)],
        )
        for accelerator in ACCELERATORS
    ),
    Measure,
    Report,
]
