"""The teacher's ends of a study's samples, kept in a file: who goes on with a study, or joins it, need not wait for them."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import torch

from ..process import ForwardProcess
from .cohort import Cohort, Running
from .teacher import teach

NEAR = 1e-2
"""Of the targets' size: how far an end may be from the one in the file."""


class Ends:
    """Of the samples of the fit and of those that select."""

    def __init__(self, fit: Cohort, select: Cohort):
        self.cohorts = {"fit": fit, "select": select}

    def teach(self, process: ForwardProcess, steps: int) -> Running:
        for cohort in self.cohorts.values():
            yield from teach(cohort, process, steps)

    def load(self, file: str, process: ForwardProcess, steps: int) -> Running:
        """Whether they were there, and are those of this network: the first batch is run again to see."""
        from safetensors.torch import load_file

        if not os.path.exists(file):
            return False
        kept, cohort = load_file(file), self.cohorts["fit"]
        first = Cohort(cohort.batches[:1])
        yield from teach(first, process, steps)
        cohort.calls += first.calls
        made, known = first.targets[0].double(), kept["fit.0"].double()
        if made.shape != known.shape or (made - known).norm() > NEAR * known.norm():
            return False
        for name, taught in self.cohorts.items():
            taught.targets = [kept[f"{name}.{i}"] for i in range(len(taught.batches))]
        return True

    def store(self, file: str) -> None:
        """Whole or not at all."""
        from safetensors.torch import save_file

        kept = {f"{name}.{i}": t.contiguous() for name, c in self.cohorts.items() for i, t in enumerate(c.targets)}
        draft = Path(f"{file}.{uuid.uuid4().hex}.tmp")
        draft.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(kept, draft)
            os.replace(draft, file)
        finally:
            draft.unlink(missing_ok=True)

    def sign(self) -> list[float]:
        """A few numbers of some ends, by which others know whether theirs are the same."""
        some = [targets[0].flatten() for targets in self.cohorts["fit"].targets[:8]]
        return torch.cat([end[:: max(len(end) // 16, 1)] for end in some]).double().tolist()
