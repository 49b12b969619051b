"""DC-Solver's ratios for the user's own model: Search DC Ratios, Fit DC Cascade."""

from __future__ import annotations

import os

from comfy_api.latest import io

from ..solvers.artifact import load, save, settings_of
from ..solvers.calibration.dc_search import RatioSearch, fitted_cascade
from ..solvers.calibration.families import Plan
from ..solvers.calibration.losses import LOSSES
from ..solvers.dc_solver import KIND, DCSolver
from ..solvers.multistep import Multistep
from . import artifacts, bridge, plot
from .bridge import distinct, process_of
from .calibration import BUDGET, MODEL, MORE, deterministic, prepared, resumable, resume, whole
from .calibration_found import CATEGORY
from .calibration_run import Pursuit, curve, path
from .derive import PREFIX
from .show import show_text

SEARCH, CASCADE = "Search DC Ratios", "Fit DC Cascade"


class SearchDCRatios(io.ComfyNode):
    """Finds the ratios of DC-Solver for your model, sampler and sigmas: one number per step that repairs part of what few steps
    lose.

    All ratios together, by Levenberg-Marquardt on the finished samples, within 1 +- 0.5; needs no gradients. The search of the
    paper goes from step to step and compares with the teacher on the way, which can make the end worse. Ratios that are no
    better than the sampler as it is, on samples that neither the fit nor the choice has seen, are not kept.

    *Fit Solver* has more numbers to fit; ratios are for those who want to keep UniPC, or to cover a range of guidance scales
    and steps: search several, and put them together with *Fit DC Cascade*. Measured on a mixture in 16 dimensions, error after
    the search by that before, at 5, 8 and 10 steps of two schedules: UniPC 0.46 to 0.79, DPM-Solver++ 2M 0.52 to 0.90, and once
    nothing better was found.

    Use the output ``sampler``, or *DC-Solver* with the file around the same sampler, with the same sigmas and guidance scale.

    Source: Zhao et al. (2024), arXiv:2409.03755; the joint search is this pack's own.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "SearchDCRatios",
            display_name=f"{SEARCH} (Quickstep)",
            category=CATEGORY,
            description="Finds the ratios of DC-Solver for your model, sampler and sigmas: one number per step that repairs part "
            "of what few steps lose.",
            search_aliases=["DC-Solver", "dynamic compensation", "calibrate"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                *MODEL,
                io.Sampler.Input(
                    "sampler", tooltip="UniPC, or another multistep sampler of Quickstep's in data prediction."
                ),
                io.Sigmas.Input(
                    "sigmas", tooltip="The sigmas to sample with, from the model's highest to 0; 5 to 10 steps."
                ),
                *(given for given in BUDGET if given.id != "steps"),
                io.Int.Input(
                    "dc_order",
                    default=2,
                    min=1,
                    max=3,
                    tooltip="Degree of the polynomial through past predictions; 2 as in the paper.",
                    advanced=True,
                ),
                resume(KIND),
                MORE,
            ],
            outputs=[
                io.Sampler.Output(display_name="sampler"),
                io.Image.Output(display_name="curve"),
                io.Image.Output(display_name="ratios"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent, sampler, sigmas, cfg, samples, minutes, seed, name, loss="rms", dc_order=2,
        resume=artifacts.NONE, prompts=None,
    ) -> io.NodeOutput:  # fmt: skip
        inner = deterministic(sampler, SEARCH)
        if not isinstance(inner, Multistep):
            raise ValueError(f"{SEARCH}: {inner.title} is no multistep sampler; connect UniPC or DPM-Solver++.")
        plain = DCSolver(inner, dc_order=dc_order)  # refuses samplers it does not work on
        given = prepared(model, positive, negative, latent, cfg, seed, prompts, SEARCH)
        process = process_of(model)
        times = whole(process, distinct(sigmas.tolist()), SEARCH)
        found = resumable(resume, KIND, model, SEARCH)
        resumed = None if found is None else _resumed(plain, found, times)
        search = RatioSearch(
            process, *given.split(samples), {"as it is": Plan(plain, times)}, resumed, LOSSES[loss]
        )  # fmt: skip
        pursuit = Pursuit(search, given, minutes, KIND, inner.id, settings_of(inner), path(name, ".json", SEARCH))
        pursuit.run()
        text, made = pursuit.report(), plain
        if search.unworthy:
            os.remove(pursuit.path)
            rest = text.split("\n", 1)[1]
            text = f"No ratios are better than the sampler as it is, so there is no file.\n{rest}"
        else:
            made = DCSolver(inner, load(pursuit.path, KIND), dc_order=dc_order)
        show_text(cls, text)
        ratios = made.ratios_at(cfg, len(times) - 1)
        drawn = plot.line_plot([("ratios", range(1, len(ratios) + 1), ratios)], "DC-Solver", "step", "ratio")
        return io.NodeOutput(bridge.sampler(made), plot.to_image(curve(search)), plot.to_image(drawn), text)


class FitDCCascade(io.ComfyNode):
    """Puts the ratios of several searches together: polynomials that give DC-Solver's ratios for all guidance scales and steps
    between them.

    Search with the same model, sampler and kind of schedule at, say, 5, 7 and 10 steps and CFG 2, 4 and 7, into files whose
    names begin alike. At least two of each. Where they do not tell all 36 numbers, those nearest to no compensation are taken.
    No network calls. ``report`` says how far the polynomials are from the ratios that were searched: compare with and without
    before you trust what lies between.

    Source: Zhao et al. (2024), arXiv:2409.03755, cascade polynomial regression.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=PREFIX + "FitDCCascade",
            display_name=f"{CASCADE} (Quickstep)",
            category=CATEGORY,
            description="Puts the ratios of several searches together: polynomials that give DC-Solver's ratios for all guidance "
            "scales and steps between them.",
            search_aliases=["DC-Solver", "CPR"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.String.Input(
                    "files", default="my_ratios", tooltip="What the names of the files begin with; all of them are used."
                ),
                io.String.Input("name", default="my_cascade", tooltip="Name of the new file, without ending."),
            ],
            outputs=[io.String.Output(display_name="file"), io.String.Output(display_name="report")],
        )  # fmt: skip

    @classmethod
    def execute(cls, files, name) -> io.NodeOutput:
        where = path(name, ".json", CASCADE)
        found = [artifacts.read(file, KIND, CASCADE) for file in _named(files)]
        made = fitted_cascade([artifact for artifact in found if artifact is not None])
        save(where, made)
        (low, high), (weak, strong) = made.table["range"]["steps"], made.table["range"]["cfg"]
        text = (
            f"Made of {made.table['searches']} searches, for {low} to {high} steps and CFG {weak:g} to {strong:g}; beyond, it is a "
            f"guess. No ratio is further than {made.table['off']:.3f} from its polynomial."
        )
        show_text(cls, text)
        return io.NodeOutput(os.path.basename(where), text)

    @classmethod
    def fingerprint_inputs(cls, files, name):
        return [(file, artifacts.modified(file)) for file in _named(files)]


def _named(begin: str) -> list[str]:
    """The files of ratios whose names begin so."""
    return [file for file in artifacts.files(KIND)[1:] if file.startswith(begin.strip())]


def _resumed(plain: DCSolver, found, times: list[float]) -> Plan:
    ratios = found.table.get("ratios")
    if not isinstance(ratios, list) or len(ratios) != len(times) - 1:
        raise ValueError(f"{SEARCH}: the file to resume has no ratios for {len(times) - 1} steps.")
    given = ", ".join(repr(float(rho)) for rho in ratios)
    return Plan(DCSolver(plain.solver, ratios=given, dc_order=plain.dc_order), times)


NODES = [SearchDCRatios, FitDCCascade]
