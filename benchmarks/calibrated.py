"""What calibrations on the model bring, on prompts and seeds that no fit has seen: ``make bench-calibrated``.

    python benchmarks/calibrated.py                    what is missing of the whole grid, then the report (many hours)
    python benchmarks/calibrated.py --quick            UNet and DiT at 5, 6, 8 and 10 calls, CFG 4 (two hours or three)
    python benchmarks/calibrated.py --report           the report alone

Every calibration runs as its node does, on 32 captions and its own seeds; the report is on 48 other captions and noise. Beside it
stand, on the same report: the best pairs of sampler and schedule of ComfyUI's core and of Quickstep (the ``--keep`` best of
``solvers.py``'s screening, and of those the best *on the report*, so both have luck on their side and the calibration has not), and
core's frozen tables. What was found for 8 calls is then used elsewhere: at other CFGs, numbers of steps and sizes, on 16 pictures,
beside core's best pairs there. Results are JSON lines in ``output/calibrated.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

from _pack import import_comfy, import_pack, prompts

import_comfy()
import_pack()
import comfy.samplers  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from _calibrated_report import written  # noqa: E402
from _candidates import CORE, QUICKSTEP, samplers, schedules, within  # noqa: E402
from _problems import OUTPUT, SEED, Network  # noqa: E402
from quickstep.demo import world  # noqa: E402
from quickstep.nodes import artifacts, calibration, demo  # noqa: E402
from quickstep.nodes.bridge import sampler  # noqa: E402
from quickstep.nodes.calibration_ld3 import LD3  # noqa: E402
from quickstep.nodes.calibration_proposals import NODES as PROPOSED  # noqa: E402
from quickstep.solvers.artifact import load  # noqa: E402
from quickstep.solvers.calibration import fitted as fitting  # noqa: E402
from quickstep.solvers.calibration.library import again  # noqa: E402
from quickstep.solvers.exponential import DPMSolverPP  # noqa: E402
from quickstep.solvers.momentum import GHVB  # noqa: E402

RESULTS = OUTPUT / "calibrated.jsonl"
FILES = OUTPUT / "calibrated"
NETWORKS, STEPS, SCALES = ("unet", "dit", "unet_small"), (8, 5, 10, 6, 4, 20), (4.0, 1.0, 7.5)
PICTURES, PROMPTS, BATCH, SIZE, SAMPLES = 48, 32, 8, 32, 32
USUAL = {"dit": "Beta"}
"""The schedule on which a fitted solver is adapted to other numbers of steps; Karras elsewhere."""


@dataclass(frozen=True)
class Cell:
    """One network, number of network calls and guidance scale; and what it is reported on."""

    network: str
    steps: int
    cfg: float
    size: int = SIZE
    pictures: int = PICTURES

    def key(self, what: str) -> str:
        size = "" if self.size == SIZE else f"|{self.size}px"
        return f"{self.network}|{self.steps}|{self.cfg:g}{size}|{self.pictures}|{what}"

    @property
    def problem(self) -> Network:
        return network(self.network, self.pictures, self.size)


@lru_cache(maxsize=8)
def network(name: str, pictures: int, size: int) -> Network:
    return Network(name, pictures, size=size)


@dataclass(frozen=True)
class Found:
    """What a calibration returned, and its file."""

    how: object
    sigmas: torch.Tensor
    text: str
    file: Path

    def at(self, steps: int, cell: Cell) -> tuple[object, torch.Tensor]:
        """For another number of steps."""
        process, artifact = calibration.process_of(cell.problem.model), load(self.file)
        if artifact.kind == fitting.KIND:
            schedule = calibration.STARTS[USUAL.get(cell.network, "Karras")]
            times = schedule(process, process.t_max, process.t_min, steps)
            return sampler(fitting.FittedSolver(artifact, elsewhere="adapt")), torch.from_numpy(times).float()
        return self.how, torch.tensor(again(artifact.table, process, steps), dtype=torch.float32)


def given(cell: Cell, minutes: float) -> dict:
    """The inputs that every calibration node has."""
    model, clip = demo.load_model(cell.network), demo.load_clip()
    _, _, captions = world.sample(PROMPTS, torch.Generator().manual_seed(SEED + 500))
    first, *others = [prompts(clip, [caption]) for caption in captions]
    return {
        "model": model, "positive": first, "negative": prompts(clip, [""]), "latent": {"samples": torch.zeros(BATCH, 3, 32, 32)},
        "cfg": cell.cfg, "steps": cell.steps, "samples": SAMPLES, "minutes": minutes, "seed": SEED + 600,
        "prompts": {f"prompt{i}": p for i, p in enumerate(others)}, "loss": "log",
    }  # fmt: skip


def made_by(node, **options) -> Callable[[Cell, float, str], Found]:
    """A calibration node, run on a cell; those that return no sampler are for DPM-Solver++ 2M."""

    def run(cell: Cell, minutes: float, name: str) -> Found:
        file = FILES / f"{name}.json"
        file.unlink(missing_ok=True)
        made = node.execute(**given(cell, minutes), name=name, **options).args
        how = sampler(DPMSolverPP()) if isinstance(made[0], torch.Tensor) else made[0]
        sigmas = next(out for out in made if isinstance(out, torch.Tensor) and out.ndim == 1)
        return Found(how, sigmas, made[-1], file)

    return run


def proposed(name: str):
    return next(node for node in PROPOSED if node.METHOD.id == name)


PLAIN = {"sampler": sampler(DPMSolverPP())}
CALIBRATIONS: dict[str, Callable[[Cell, float, str], Found]] = {
    "Fit Solver": made_by(calibration.FitSolver),
    "Weights and sigmas alone": made_by(calibration.FitSolver, decouple=False, rescale=False),
    "Curvature, 2M": made_by(proposed("Curvature"), **PLAIN),
    "LD3, 2M": made_by(LD3, **PLAIN),
    "Optimize Schedule, 2M": made_by(calibration.OptimizeSchedule, **PLAIN),
    "GITS, 2M": made_by(proposed("GITS"), **PLAIN),
    "BOSS, 2M": made_by(proposed("BOSS"), **PLAIN),
}


def usual(cell: Cell, keep: int) -> Iterator[tuple[str, str, object, torch.Tensor]]:
    """(side, label, sampler, sigmas) of the best usual pairs, and of core's frozen tables."""
    made = schedules(cell.problem.sampling)
    records = [json.loads(line) for line in (OUTPUT / "solvers.jsonl").read_text(encoding="utf-8").splitlines()]
    screened = [
        r
        for r in records
        if r["problem"] == f"{cell.network} screening" and "mean" in r and r["candidate"] in samplers()
    ]
    if not screened:
        raise SystemExit(
            f"output/solvers.jsonl has no screening of {cell.network}: run benchmarks/solvers.py --only {cell.network}."
        )
    nearest = min((r["nfe"] for r in screened), key=lambda nfe: abs(nfe - cell.steps))
    within_it = (r for r in screened if r["nfe"] == nearest and r["calls"] <= nearest)
    ranked = sorted(within_it, key=lambda r: r["mean"])
    for side in (CORE, QUICKSTEP):
        for r in [r for r in ranked if r["side"] == side][: keep if side == CORE else 2]:
            candidate = samplers()[r["candidate"]]
            sigmas = within(candidate, r["schedule"], made[r["schedule"]], cell.steps)
            if sigmas is not None:
                yield side, f"{r['candidate']}, {r['schedule']}", candidate.make(), sigmas
    for label, sigmas in tables(cell):
        for name in ("dpmpp_2m", "euler", "uni_pc_bh2"):
            yield "core's table", f"{label}, {name}", samplers()[name].make(), sigmas
    if cell.network == "dit":
        first = dict.fromkeys(r["candidate"] for r in ranked if r["side"] == CORE)
        for schedule, make in shifted(cell).items():
            for name in dict.fromkeys([*list(first)[:keep], "euler", "dpmpp_2m"]):
                sigmas = within(samplers()[name], schedule, make, cell.steps)
                if sigmas is not None:
                    yield CORE, f"{name}, {schedule}, shift 3", samplers()[name].make(), sigmas
            for solver in (DPMSolverPP(), GHVB()):
                yield QUICKSTEP, f"{solver.title}, {schedule}, shift 3", sampler(solver), make(cell.steps)


def shifted(cell: Cell) -> dict[str, Callable[[int], torch.Tensor]]:
    """Core's schedules after its node ModelSamplingSD3, at its default shift: the screening is without."""
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    (model,) = ModelSamplingSD3().patch(cell.problem.model, shift=3.0)
    sampling = model.get_model_object("model_sampling")
    return {name: partial(comfy.samplers.calculate_sigmas, sampling, name) for name in ("simple", "beta")}


def tables(cell: Cell) -> Iterator[tuple[str, torch.Tensor]]:
    """Core's frozen schedules, for the kind of model that comes nearest."""
    from comfy_extras import nodes_align_your_steps, nodes_gits, nodes_optimalsteps

    if cell.network == "dit":
        wanted = {"OptimalSteps FLUX": (nodes_optimalsteps.OptimalStepsScheduler, ("FLUX", cell.steps, 1.0))}
    else:
        wanted = {
            "AYS SD1": (nodes_align_your_steps.AlignYourStepsScheduler, ("SD1", cell.steps, 1.0)),
            "GITS": (nodes_gits.GITSScheduler, (1.2, cell.steps, 1.0)),
        }
    for label, (node, inputs) in wanted.items():
        yield label, node.execute(*inputs).args[0]


def measured(cell: Cell, what: str, side: str, how, sigmas: torch.Tensor, **more) -> dict:
    made, calls = cell.problem.run(how, sigmas, cell.cfg, seed=7)
    scores = {key: float(f"{value:.5g}") for key, value in cell.problem.score(made, cell.cfg).items()}
    record = {"key": cell.key(what), **vars(cell), "what": what, "side": side}
    return record | {"calls": calls, **scores, **more}


def measurements(cell: Cell, options, known: dict[str, dict]) -> Iterator[dict]:
    """The records of a cell that are not known yet."""
    for side, label, how, sigmas in usual(cell, options.keep):
        if cell.key(label) not in known:
            yield measured(cell, label, side, how, sigmas)
    for label, calibrate in CALIBRATIONS.items():
        if cell.key(label) in known or (options.only and not any(word in label for word in options.only)):
            continue
        began = time.perf_counter()
        found = calibrate(cell, options.minutes, cell.key(label).replace("|", "_").replace(", ", "_").replace(" ", "_"))
        seconds = round(time.perf_counter() - began)
        spent = int(found.text.split("sample: ")[1].split(".")[0])
        yield measured(
            cell, label, "calibrated", found.how, found.sigmas, seconds=seconds, spent=spent, said=found.text
        )
        if cell.steps == 8 and cell.cfg == 4.0 and label in ("Fit Solver", "Curvature, 2M"):
            yield from moved(cell, label, found)


def moved(cell: Cell, label: str, found: Found) -> Iterator[dict]:
    """What was found for a cell, used in others, beside core's best pairs there."""
    near = replace(cell, pictures=16)
    others = [{"cfg": 1.0}, {"cfg": 7.5}, {"size": 40}, {"steps": 6}, {"steps": 10}]
    for other in (replace(near, **change) for change in others):
        how, sigmas = (found.how, found.sigmas) if other.steps == cell.steps else found.at(other.steps, other)
        yield measured(other, f"{label}, found for another", "found for another", how, sigmas)
        if label == "Fit Solver":
            for side, name, how, sigmas in usual(other, 3):
                if side == CORE:
                    yield measured(other, name, side, how, sigmas)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="UNet and DiT, 5, 6, 8 and 10 calls, CFG 4")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--steps", type=int, nargs="*", default=list(STEPS))
    parser.add_argument("--cfg", type=float, nargs="*", default=list(SCALES))
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="WORD", help="calibrations whose name has one of these words"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for each calibration")
    parser.add_argument("--keep", type=int, default=5, help="usual pairs of core, and 2 of Quickstep")
    options = parser.parse_args()
    if options.quick:
        options.networks, options.steps, options.cfg = ["unet", "dit"], [8, 5, 10, 6], [4.0]
    known = {}
    if RESULTS.exists():
        known = {r["key"]: r for r in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())}
    if not options.report:
        folder_paths.folder_names_and_paths[artifacts.FOLDER] = ([str(FILES)], set())
        FILES.mkdir(parents=True, exist_ok=True)
        cells = [Cell(n, s, c) for s in options.steps for c in options.cfg for n in options.networks]
        with RESULTS.open("a", encoding="utf-8") as file:
            for cell in cells:
                for record in measurements(cell, options, known):
                    known[record["key"]] = record
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    print(f"{record['key']}: {record['mean']:.4f}", flush=True)
    Path(__file__).with_name("results").joinpath("calibrated.md").write_text(
        written(list(known.values())), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
