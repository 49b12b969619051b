"""Solver schedules as tables: written from a sampler, drawn, saved, loaded, and their sigmas."""

from __future__ import annotations

import os

import torch
from comfy_api.latest import io

from ..solvers.artifact import Artifact, FoundFor, now, process_name, save
from ..solvers.multistep import Multistep
from ..solvers.usf import to_table
from ..solvers.usf_table import KIND, Table, parse
from . import artifacts, plot
from .bridge import distinct, process_of, solver_in
from .calibration_found import warned
from .calibration_shown import in_words as described
from .derive import PREFIX

CATEGORY = "Quickstep/solver tables"
TABLE_TIP = "A solver schedule as JSON text: from Solver to Table, Load Solver Table, or written by hand."


class SolverToTable(io.ComfyNode):
    """Writes what a multistep sampler does over these sigmas as a solver schedule, one row per step.

    The table run by the USF node is that sampler, to rounding. Change rows by hand from there: order, prediction,
    corrector. Deterministic multistep samplers only.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "SolverToTable",
            display_name="Solver to Table (Quickstep)",
            category=CATEGORY,
            description="Writes what a multistep sampler does over these sigmas as a solver schedule, one row per step.",
            search_aliases=["USF", "export solver schedule"],
            inputs=[
                io.Model.Input("model", tooltip="Tells flow models from others."),
                io.Sampler.Input(
                    "sampler", tooltip="A deterministic Quickstep multistep sampler: DPM-Solver++, UniPC ..."
                ),
                io.Sigmas.Input("sigmas", tooltip="The sigmas the table is for."),
            ],
            outputs=[io.String.Output(display_name="table")],
        )

    @classmethod
    def execute(cls, model, sampler, sigmas) -> io.NodeOutput:
        solver = solver_in(sampler, "Solver to Table")
        if not isinstance(solver, Multistep):
            raise ValueError(f"Solver to Table: {solver.title} is not a multistep sampler and has no table.")
        return io.NodeOutput(to_table(solver, distinct(sigmas.tolist()), process_of(model)).text())


class TableSigmas(io.ComfyNode):
    """The sigmas a solver schedule was made for, for SamplerCustom next to the USF node."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "TableSigmas",
            display_name="Table Sigmas (Quickstep)",
            category=CATEGORY,
            description="The sigmas a solver schedule was made for, for SamplerCustom next to the USF node.",
            inputs=[io.String.Input("table", force_input=True, tooltip=TABLE_TIP)],
            outputs=[io.Sigmas.Output(display_name="sigmas")],
        )

    @classmethod
    def execute(cls, table) -> io.NodeOutput:
        sigmas = parse(table).sigmas
        if not sigmas:
            raise ValueError(
                "Table Sigmas: this table names no sigmas; connect a schedule node to the sampler instead."
            )
        return io.NodeOutput(torch.tensor(sigmas, dtype=torch.float32))


class DrawTable(io.ComfyNode):
    """Draws a solver schedule: its sigmas, and for each step what is integrated, in which order, and how it is corrected."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "DrawTable",
            display_name="Draw Solver Table (Quickstep)",
            category=CATEGORY,
            description="Draws a solver schedule: its sigmas, and for each step kind, order and corrector.",
            inputs=[io.String.Input("table", force_input=True, tooltip=TABLE_TIP)],
            outputs=[io.Image.Output(display_name="drawing"), io.String.Output(display_name="steps")],
        )

    @classmethod
    def execute(cls, table) -> io.NodeOutput:
        made = parse(table)
        return io.NodeOutput(plot.to_image(drawing(made)), in_words(made))


def drawing(table: Table):
    """Order of every step, one line per kind of prediction, and the sigmas."""
    steps = list(range(1, len(table.steps) + 1))
    kinds = dict.fromkeys(row.prediction for row in table.steps)
    series: list[plot.Series] = []
    for kind in kinds:
        of_kind = [(i, row.order) for i, row in zip(steps, table.steps, strict=True) if row.prediction == kind]
        series.append((f"order, {kind} prediction", [i for i, _ in of_kind], [order for _, order in of_kind]))
    if table.sigmas:
        shown = [sigma / table.sigmas[0] * 4.0 for sigma in table.sigmas]
        series.append((f"sigma, 4 is {table.sigmas[0]:g}", range(len(shown)), shown))
    return plot.line_plot(series, "Solver schedule", "step", "order")


def in_words(table: Table) -> str:
    """One line per step."""
    lines = []
    for i, row in enumerate(table.steps, 1):
        target = "" if row.sigma is None else f" to sigma {row.sigma:.4g}"
        corrected = "" if row.corrector is None else f", {row.corrector.kind} corrector of order {row.corrector.order}"
        lines.append(f"{i}.{target} order {row.order}, {row.prediction} prediction{corrected}")
    return "\n".join(lines)


class SaveTable(io.ComfyNode):
    """Saves a solver schedule to ComfyUI's models/quickstep folder, as a small JSON file to share.

    An existing file is never overwritten: the name gets a number.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "SaveTable",
            display_name="Save Solver Table (Quickstep)",
            category=CATEGORY,
            description="Saves a solver schedule to ComfyUI's models/quickstep folder, as a small JSON file to share.",
            is_output_node=True,
            inputs=[
                io.String.Input("table", force_input=True, tooltip=TABLE_TIP),
                io.String.Input("name", default="my_solver", tooltip="Name of the file, without folders or ending."),
                io.Model.Input("model", optional=True, tooltip="Written into the file: for which kind of model it is."),
            ],
            outputs=[io.String.Output(display_name="file")],
        )

    @classmethod
    def execute(cls, table, name, model=None) -> io.NodeOutput:
        made = parse(table)
        process = None if model is None else process_name(process_of(model))
        found_for = FoundFor(process=process, steps=None if made.repeat else len(made.steps), created=now())
        path = artifacts.free_path(name, ".json", "Save Solver Table")
        save(path, Artifact(KIND, made.raw(), found_for=found_for))
        return io.NodeOutput(os.path.basename(path))


class LoadTable(io.ComfyNode):
    """A solver schedule from ComfyUI's models/quickstep folder, as text for the USF node.

    Connect the model to have it checked: a file for the other kind (flow, or not), or with a search's sigmas that begin elsewhere,
    is refused; one that was found for other weights is used, and ``about`` says so. ``about`` also says for which guidance scale
    and number of steps a search has found it.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "LoadTable",
            display_name="Load Solver Table (Quickstep)",
            category=CATEGORY,
            description="A solver schedule from ComfyUI's models/quickstep folder, as text for the USF node.",
            inputs=[
                io.Combo.Input(
                    "file", options=artifacts.files(KIND), tooltip="A file that Save Solver Table wrote, or a shared one."
                ),
                io.Model.Input("model", optional=True, tooltip="The model it is used with, to check that it fits."),
            ],
            outputs=[io.String.Output(display_name="table"), io.String.Output(display_name="about")],
        )  # fmt: skip

    @classmethod
    def execute(cls, file, model=None) -> io.NodeOutput:
        found = artifacts.read(file, KIND, "Load Solver Table")
        if found is None:
            raise ValueError(
                f"Load Solver Table: choose a file; they lie in ComfyUI's models/{artifacts.FOLDER} folder."
            )
        made = Table.of(found.table)
        searched = made.sigmas if found.found_for.model else ()  # those that are written by hand may begin anywhere
        said = [] if model is None else warned(found, model, file, "Load Solver Table", searched)
        return io.NodeOutput(made.text(), "\n".join([described(found), *said]))

    @classmethod
    def fingerprint_inputs(cls, file, model=None):
        return artifacts.modified(file)


NODES = [SolverToTable, TableSigmas, DrawTable, SaveTable, LoadTable]
