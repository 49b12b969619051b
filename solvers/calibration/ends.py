"""The teacher's ends of a study's samples, kept in files: who goes on with a study, or joins it, need not compute them again."""

from __future__ import annotations

import os
import random
import uuid
from pathlib import Path

import torch

from ..process import ForwardProcess
from .cohort import Cohort, Running
from .teacher import teach

NEAR = 1e-2
"""Of the targets' size: how far an end may be from the one in the file."""


class Ends:
    """Of the samples of the fit and of those that select: a file for each batch, in a folder; "" keeps none."""

    def __init__(self, fit: Cohort, select: Cohort, folder: str = ""):
        self.cohorts, self.folder = {"fit": fit, "select": select}, folder
        self.own: list[int] = []

    def teach(self, process: ForwardProcess, steps: int) -> Running:
        """Gives both their targets.

        One batch is always run, one that has a file, to see that the files are of this network; if not, none of them counts. The
        others in some order, and only if there is no file: workers with the same folder share the work, and one that was killed
        loses a batch.
        """
        for cohort in self.cohorts.values():
            cohort.targets = [torch.empty(0)] * len(cohort.batches)
        places = [(name, i) for name, cohort in self.cohorts.items() for i in range(len(cohort.batches))]
        random.SystemRandom().shuffle(places)
        first = min(places, key=lambda place: (not self._file(*place).exists(), place[0] != "fit"))
        places = [first, *(place for place in places if place != first)]
        trusted = bool(self.folder)
        for n, (name, i) in enumerate(places):
            kept = self._kept(name, i) if trusted else None
            if kept is None or n == 0:
                made = yield from self._made(name, i, process, steps)
                trusted = trusted and (kept is None or _near(made, kept))
                self._keep(name, i, made)
                kept = made
            self.cohorts[name].targets[i] = kept

    def _made(self, name: str, i: int, process: ForwardProcess, steps: int) -> Running:
        cohort = self.cohorts[name]
        one = Cohort(cohort.batches[i : i + 1])
        try:
            yield from teach(one, process, steps)
        finally:
            cohort.calls += one.calls
        if name == "fit":
            self.own.append(i)
        return one.targets[0]

    def signs(self) -> list[list[float]]:
        """A few numbers of the first end of each batch of the fit."""
        some = [targets[0].flatten() for targets in self.cohorts["fit"].targets]
        return [end[:: max(len(end) // 16, 1)][:16].double().tolist() for end in some]

    def agree(self, signs: list[list[float]]) -> bool:
        """Whether what was run here is as in the study."""
        mine = self.signs()
        return all(_near(torch.tensor(mine[i]), torch.tensor(signs[i]), 0.1) for i in self.own if i < len(signs))

    def _file(self, name: str, i: int) -> Path:
        return Path(self.folder) / f"{name}-{i}.safetensors"

    def _kept(self, name: str, i: int) -> torch.Tensor | None:
        from safetensors.torch import load_file

        file = self._file(name, i)
        return load_file(file)["ends"] if file.exists() else None

    def _keep(self, name: str, i: int, made: torch.Tensor) -> None:
        """Whole or not at all."""
        from safetensors.torch import save_file

        if not self.folder:
            return
        file = self._file(name, i)
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
        try:
            save_file({"ends": made.contiguous()}, draft)
            os.replace(draft, file)
        finally:
            draft.unlink(missing_ok=True)


def _near(a: torch.Tensor, b: torch.Tensor, share: float = NEAR) -> bool:
    return a.shape == b.shape and float((a.double() - b.double()).norm()) <= share * float(b.double().norm())
