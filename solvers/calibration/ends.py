"""The teacher's ends of a study's samples, kept in files: who goes on with a study, or joins it, need not compute them again."""

from __future__ import annotations

from functools import partial

import torch

from ..process import ForwardProcess
from .cohort import Cohort, Running
from .shared import Shared, near
from .teacher import lesson, named


class Ends:
    """Of the samples of the fit and of those that select, batch by batch."""

    def __init__(self, fit: Cohort, select: Cohort, shared: Shared):
        self.fit, self.select, self.shared = fit, select, shared

    def teach(self, process: ForwardProcess, steps: int) -> Running:
        """Gives both their targets."""
        plan, cohorts = lesson(process, steps), {"select": self.select, "teacher": self.fit}
        places = {
            named(kind, steps, i): (cohort, i) for kind, cohort in cohorts.items() for i in range(len(cohort.batches))
        }
        found = yield from self.shared.do({name: partial(cohort.end, i, plan) for name, (cohort, i) in places.items()})
        for cohort in cohorts.values():
            cohort.targets = [found[name] for name, (of, _) in places.items() if of is cohort]

    def signs(self) -> list[list[float]]:
        """A few numbers of the first end of each batch of the fit."""
        some = [targets[0].flatten() for targets in self.fit.targets]
        return [end[:: max(len(end) // 16, 1)][:16].double().tolist() for end in some]

    def agree(self, signs: list[list[float]]) -> bool:
        """Whether those here are those of the study."""
        return all(near(torch.tensor(a), torch.tensor(b), 0.1) for a, b in zip(self.signs(), signs, strict=False))
