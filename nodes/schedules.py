"""One SIGMAS node per closed-form schedule, and a node that draws schedules."""

from __future__ import annotations

import PIL.Image
import torch
from comfy_api.latest import io, ui

from ..solvers.process import ForwardProcess
from ..solvers.schedules import CLOSED_FORMS, Schedule, times
from . import plot
from .bridge import process_of
from .derive import PREFIX, node

BEFORE = [
    io.Model.Input(
        "model", tooltip="Its range of sigmas is used, and its training times where the schedule needs them."
    ),
    io.Int.Input("steps", default=10, min=1, max=10000, tooltip="Network calls: as many sigmas, and then 0."),
    io.Float.Input(
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="Below 1 only the end of a longer schedule is returned, to redo an image partly.",
    ),
]


def sigmas(schedule: Schedule, model, steps: int, denoise: float) -> tuple[torch.Tensor]:
    return (torch.from_numpy(times(schedule, process_of(model), steps, denoise)).float(),)


class DrawSchedule(io.ComfyNode):
    """Draws up to three schedules against the step number, and lists their numbers.

    ``sigma`` is drawn on a logarithmic axis if it exceeds 1, where a final 0 has no place; ``lambda`` is half the log
    signal-to-noise ratio, log(alpha / sigma), and needs the model to know alpha.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "DrawSchedule",
            display_name="Draw Schedule (Quickstep)",
            category="Quickstep/schedules",
            description="Draws up to three schedules against the step number, and lists their numbers.",
            search_aliases=["plot sigmas", "sigma graph", "show schedule"],
            is_output_node=True,
            inputs=[
                io.Sigmas.Input("sigmas", tooltip="The schedule to draw."),
                io.Combo.Input(
                    "show",
                    options=["sigma", "lambda"],
                    tooltip="What is drawn: sigma, or half the log signal-to-noise ratio, which needs a model.",
                ),
                io.Sigmas.Input("sigmas_2", optional=True, tooltip="A second schedule to compare."),
                io.Sigmas.Input("sigmas_3", optional=True, tooltip="A third schedule to compare."),
                io.Model.Input("model", optional=True, tooltip="Tells flow models from others; needed for lambda."),
            ],
            outputs=[io.Image.Output(display_name="plot"), io.String.Output(display_name="table")],
        )

    @classmethod
    def execute(cls, sigmas, show="sigma", sigmas_2=None, sigmas_3=None, model=None):
        given = {"sigmas": sigmas, "sigmas_2": sigmas_2, "sigmas_3": sigmas_3}
        curves = {name: values.tolist() for name, values in given.items() if values is not None}
        image = plot.to_image(schedule_plot(curves, show, None if model is None else process_of(model)))
        return io.NodeOutput(image, schedule_table(curves), ui=ui.PreviewImage(image, cls=cls))


def schedule_plot(curves: dict[str, list[float]], show: str, process: ForwardProcess | None) -> PIL.Image.Image:
    """Schedules against the step number: ``show`` is ``sigma``, or ``lambda``, which needs the process.

    Raises ValueError for an empty schedule, and for lambda without a process.
    """
    for name, values in curves.items():
        if not values:
            raise ValueError(f"'{name}' holds no sigmas; a denoise of 0 gives none.")
    if show == "lambda":
        if process is None:
            raise ValueError("To draw lambda, connect the model: it depends on whether that is a flow model.")
        shown = {name: process.lams(values).tolist() for name, values in curves.items()}
    else:
        shown = curves
    label = "sigma" if show == "sigma" else "lambda = log(alpha / sigma)"
    log = show == "sigma" and max(map(max, curves.values())) > 1.0
    series = [(f"{name}, {len(v) - 1} steps", range(len(v)), v) for name, v in shown.items()]
    return plot.line_plot(series, "Noise schedule", "step", label, log_y=log)


def schedule_table(curves: dict[str, list[float]]) -> str:
    """The sigmas as text, one line per step, one column per schedule."""
    cells = [["step", *curves]]
    for i in range(max(map(len, curves.values()))):
        cells.append([str(i), *(f"{v[i]:.6g}" if i < len(v) else "" for v in curves.values())])
    return "\n".join("  ".join(cell.rjust(10) for cell in row).rstrip() for row in cells)


NODES = [node(schedule, "schedules", sigmas, [io.Sigmas.Output()], before=BEFORE) for schedule in CLOSED_FORMS]
NODES.append(DrawSchedule)
