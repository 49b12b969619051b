"""What calibrations found, used and shown: Found Schedule, Inspect Calibration."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import folder_paths
from comfy_api.latest import io, ui

from ..solvers.artifact import Artifact, load, mismatches
from ..solvers.caching import auto_diffusion
from ..solvers.calibration import decoupled, fitted
from ..solvers.calibration.library import again
from . import artifacts, plot
from .bridge import process_of
from .calibration_run import SCHEDULE, as_sigmas
from .calibration_shown import drawing, in_words
from .derive import PREFIX
from .fingerprint import fingerprint
from .show import show_text

CATEGORY = "Quickstep/calibration"
log = logging.getLogger(__name__)


class FoundSchedule(io.ComfyNode):
    """The sigmas that a calibration found, from its file in ComfyUI's models/quickstep folder.

    Connect the model to have it checked: a file for another kind of network is refused, one for other weights of the same
    kind (a fine-tune) is used, and ``about`` says so. ``about`` also names the sampler, steps and guidance scale it is for.

    Files of GITS, BOSS, Curvature and the other nodes that measure the model hold that measurement: with ``steps`` they give
    sigmas for other numbers of steps too, as far from the same usual schedule as was best for the number they were found for.
    Those are often worse than a usual schedule: measured once (Curvature, demo UNet, found at 8 steps), at 10 steps they were
    worse than ComfyUI's best pair, and at 6 by the geometric mean. Calibrate for your number of steps. Files of searches have no
    others.
    """

    @classmethod
    def define_schema(cls):
        files = [*artifacts.files(SCHEDULE), *artifacts.files(fitted.KIND)[1:]]
        files += [*artifacts.files(auto_diffusion.KIND)[1:], *artifacts.files(decoupled.KIND)[1:]]
        return io.Schema(
            node_id=PREFIX + "FoundSchedule",
            display_name="Found Schedule (Quickstep)",
            category=CATEGORY,
            description="The sigmas that a calibration found, from its file in ComfyUI's models/quickstep folder.",
            inputs=[
                io.Combo.Input("file", options=files, tooltip="A file of Fit Solver, or of a node that finds sigmas."),
                io.Model.Input("model", optional=True, tooltip="The model it is used with, to check that it fits."),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    tooltip="0: the sigmas as found. Others compute sigmas for that many steps from what was measured, often worse "
                    "than a usual schedule; connect the model for that.",
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas"), io.String.Output(display_name="about")],
        )

    @classmethod
    def execute(cls, file, model=None, steps=0) -> io.NodeOutput:
        found = read_any(file, "Found Schedule")
        times = found.table.get("sigmas")
        if not times:
            raise ValueError(f"Found Schedule: {file} holds {found.kind}, which has no sigmas.")
        said = [] if model is None else warned(found, model, file, "Found Schedule")
        if steps not in (0, len(times) - 1):
            times = for_steps(found, model, steps, file)
            said.append(
                f"These are sigmas for {steps} steps, computed from what was measured, and not compared with others."
            )
        return io.NodeOutput(as_sigmas(times), "\n".join([in_words(found), *said]))

    @classmethod
    def fingerprint_inputs(cls, file, model=None, steps=0):
        return artifacts.modified(file)


class InspectCalibration(io.ComfyNode):
    """Shows what is in a calibration file: its numbers as a picture, and in words what it is and which node uses it.

    Any file of ComfyUI's models/quickstep folder; what has no curve to draw is only described.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "InspectCalibration",
            display_name="Inspect Calibration (Quickstep)",
            category=CATEGORY,
            description="Shows what is in a calibration file: its numbers as a picture, and in words what it is and which node "
            "uses it.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[io.Combo.Input("file", options=every_file(), tooltip="Any file in models/quickstep.")],
            outputs=[io.Image.Output(display_name="drawing"), io.String.Output(display_name="about")],
        )

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        found = read_any(file, "Inspect Calibration")
        image, text = plot.to_image(drawing(found)), in_words(found)
        show_text(cls, text)
        return io.NodeOutput(image, text, ui=ui.PreviewImage(image, cls=cls))

    @classmethod
    def fingerprint_inputs(cls, file):
        return artifacts.modified(file)


def fits(found: Artifact, model, file: str, taker: str, sigmas: Sequence[float] = ()) -> list[str]:
    """What to say when it is used with this model; ValueError where it cannot work. sigmas: its own, if not in its table."""
    process, network = process_of(model), type(model.model).__name__
    made_for = found.table.get("network")
    wrong = mismatches(found, process)
    if made_for not in (None, network):
        wrong.append(f"It was found for a {made_for}, and this is a {network}.")
    top = (sigmas or found.table.get("sigmas") or [process.t_max])[0]
    if abs(top - process.t_max) > 1e-3 * process.t_max:
        wrong.append(f"It begins at sigma {top:g}, and this model at {process.t_max:g}.")
    if wrong:
        raise ValueError(f"{taker}: {file} is for another model. {wrong[0]}")
    if mismatches(found, model=fingerprint(model)):
        return [
            "It was found for other weights of this kind of network: compare with and without it, or calibrate again."
        ]
    return []


def warned(found: Artifact, model, file: str, taker: str, sigmas: Sequence[float] = ()) -> list[str]:
    """As ``fits``, and in the log."""
    said = fits(found, model, file, taker, sigmas)
    for sentence in said:
        log.warning("%s: %s %s", taker, file, sentence)
    return said


def for_steps(found: Artifact, model, steps: int, file: str) -> list[float]:
    """Sigmas of another number of steps than the file's."""
    if model is None:
        raise ValueError(
            "Found Schedule: connect the model, to compute sigmas for another number of steps than was found."
        )
    try:
        return again(found.table, process_of(model), steps)
    except ValueError as error:
        raise ValueError(f"Found Schedule: {file} has no sigmas for {steps} steps. {error}") from None
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"Found Schedule: the measurement in {file} is damaged ({error}); calibrate again.") from None


def every_file() -> list[str]:
    if artifacts.FOLDER not in folder_paths.folder_names_and_paths:
        return [artifacts.NONE]
    names = folder_paths.get_filename_list(artifacts.FOLDER)
    return [artifacts.NONE, *(name for name in names if name.endswith((".json", ".safetensors")))]


def read_any(name: str, taker: str) -> Artifact:
    """The artifact of that name, of whatever kind."""
    file = None if name == artifacts.NONE else folder_paths.get_full_path(artifacts.FOLDER, name)
    if file is None:
        raise ValueError(f"{taker}: choose a file; they lie in ComfyUI's models/{artifacts.FOLDER} folder.")
    return load(file)


NODES = [FoundSchedule, InspectCalibration]
