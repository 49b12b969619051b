"""What nodes that gather statistics of the user's own model share: samples, progress, files, the comparison."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from comfy_api.latest import io
from PIL import Image

from ..solvers.artifact import Artifact, save
from ..solvers.calibration.cohort import Batch, Cohort
from ..solvers.calibration.families import Plan
from ..solvers.calibration.statistics import TEACHER, Part, compared, drawn
from ..solvers.process import ForwardProcess
from ..solvers.schedules import ExponentialSchedule, KarrasSchedule, UniformSchedule
from ..solvers.solver import Solver
from . import artifacts
from .bridge import latent_in, process_of
from .calibration_samples import Samples
from .live import Live

STEPS = 20
"""Of the runs that make clean samples where no pictures are given."""

CFG = io.Float.Input(
    "cfg", default=4.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance scale: what is measured is for this one."
)
NAME = io.String.Input("name", default="my_statistics", tooltip="Name of the file in models/quickstep, without ending.")
PICTURES = io.Latent.Input(
    "pictures",
    optional=True,
    tooltip="Pictures of the prompts, VAE-encoded, of the size of the latent. Without them the model makes its own.",
)


def samples_input(default: int, tooltip: str) -> io.Int.Input:
    return io.Int.Input("samples", default=default, min=1, max=65536, tooltip=tooltip)


@dataclass
class Course:
    """Runs what yields after every visit of the network, with a progress bar of so many network calls and a picture of what is
    measured so far, until the user stops it."""

    total: int
    done: int = 0
    live: Live = field(init=False)

    def __post_init__(self):
        self.live = Live(self.total)
        self.live.tick(0)

    def run(
        self,
        running: Generator[Any, None, Any],
        each: int,
        drawn: Callable[[Any], Image.Image] | None = None,
    ) -> Any:
        """What it returns; a visit is ``each`` calls. drawn: a picture of what it yields, if that is not None."""
        while True:
            try:
                so_far = next(running)
            except StopIteration as end:
                return end.value
            self.done += each
            shown = None if drawn is None or so_far is None else partial(drawn, so_far)
            self.live.tick(min(self.done, self.total), shown)


def own_samples(count: int, pictures: dict | None) -> int:
    """How many samples there are to be, pictures or made ones."""
    return count if pictures is None else min(count, len(pictures["samples"]))


def gathered(
    given: Samples, numbered: list[tuple[list[int], Batch]], pictures: dict | None, course: Course, taker: str
) -> list[Part]:
    """Clean samples beside the batches ``given.numbered`` that know their prompts: pictures if there are some, else made in
    ``STEPS`` steps."""
    if pictures is None:
        return course.run(drawn([batch for _, batch in numbered], process_of(given.model), STEPS), STEPS)
    x0 = latent_in(given.model, pictures).cpu().float()
    if tuple(x0.shape[1:]) != given.shape:
        raise ValueError(
            f"{taker}: the pictures are of shape {tuple(x0.shape[1:])}, but the latent is of shape {given.shape}; make them the "
            "same size."
        )
    return [Part(batch, x0[rows]) for rows, batch in numbered]


def kept(name: str, taker: str, artifact: Artifact, before: str | None = None) -> tuple[str, Artifact]:
    """Writes the file; its name, and what is in it. before: the file that this has more than, and takes the place of."""
    if before is None:
        path = artifacts.free_path(name, ".safetensors" if artifact.tensors else ".json", taker)
    else:
        path = os.path.join(artifacts.folder(), before)
    save(path, artifact, overwrite=before is not None)
    return os.path.basename(path), artifact


def schedules(process: ForwardProcess, steps: int) -> list[list[float]]:
    """Those on which samplers are compared, each at its best."""
    made = (UniformSchedule(), KarrasSchedule(), ExponentialSchedule())
    return [schedule(process, process.t_max, process.t_min, steps).tolist() for schedule in made]


def contest(aside: Cohort, process: ForwardProcess, steps: int, solvers: Sequence[Solver], course: Course) -> list:
    """The errors of each solver, on that of the usual schedules where their mean is least."""
    plans = [Plan(solver, times) for solver in solvers for times in schedules(process, steps)]
    errors = course.run(compared(aside, process, plans), contest_calls(steps, len(solvers)) // (1 + len(plans)))
    each = len(plans) // len(solvers)
    return [min(errors[i : i + each], key=lambda e: float(e.mean())) for i in range(0, len(errors), each)]


def contest_calls(steps: int, solvers: int) -> int:
    """Network calls of ``contest`` for one batch."""
    return TEACHER + 3 * solvers * steps


def verdict(before: torch.Tensor, after: torch.Tensor, what: str) -> str:
    """One sentence about errors of the same samples without and with what was measured."""
    better = int((after < before).sum())
    return (
        f"{what}: error {before.mean():.4f} before, {after.mean():.4f} with it, on {len(before)} samples kept aside, of which "
        f"{better} are nearer to the teacher."
    )
