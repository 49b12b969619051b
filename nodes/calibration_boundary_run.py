"""Find Start Noise while it runs: time, preview, saving, and what it says in the end."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..solvers.artifact import Artifact, save, settings_of
from ..solvers.calibration.boundary import KIND, RANDOM, Race, Reference
from . import plot
from .calibration_samples import Samples
from .live import Live


@dataclass
class Hunt:
    """Runs a race until it ends or the minutes are over, then compares the winner on references kept aside.

    The best so far is in the file, every half minute, at the end, and when the user stops. compared: the errors, of the winner
    and of random noises, on each of the references kept aside.
    """

    race: Race
    aside: Sequence[Reference]
    samples: Samples
    minutes: float
    path: str
    compared: torch.Tensor | None = None
    visits: int = 0
    live: Live = field(default_factory=Live)

    def run(self) -> None:
        """All of it. What was found is saved also when it is interrupted."""
        after = len(self.aside) * math.ceil((1 + RANDOM) / self.race.together)
        total = self.race.visits + after
        try:
            for _ in self.race.run():
                self.visits += 1
                spent = self.live.seconds / (60.0 * self.minutes)
                self._show(max(self.visits / total, spent))
                if spent * (1.0 + after / self.visits) >= 1.0:  # the comparison is to be in time too
                    break
            if self.aside:
                comparing = self.race.compared(self.aside)
                while self.compared is None:
                    try:
                        next(comparing)
                    except StopIteration as end:
                        self.compared = end.value
                    self._show(1.0)
        finally:
            self.save()
        self.live.end()

    def _show(self, share: float) -> None:
        picture = (lambda: curve(self.race)) if self.race.trail else None
        self.live.tick(min(999, int(1000 * share)), picture, self.save)

    def save(self) -> None:
        """The best so far, whole or not at all; nothing before there is one."""
        if self.race.best is not None:
            save(self.path, self.artifact(self.race.best), overwrite=True)

    def artifact(self, best: int) -> Artifact:
        race, after, tried = self.race, self.compared, self.race.tried
        table = {
            "seed": self.samples.seed + best,
            "candidates": len(tried),
            "references": len(race.errors[best]),
            "error": [error for error in tried if math.isfinite(error)],
            "network": type(self.samples.model.model).__name__,
        }
        solver, times = race.plan
        found_for = self.samples.found_for(
            solver=solver.id,
            settings=settings_of(solver),
            steps=len(times) - 1,
            loss_before=None if after is None else float(after[1:].mean()),
            loss_after=None if after is None else float(after[0].mean()),
        )
        return Artifact(KIND, table, {"noise": race.draw(best)[0]}, found_for)

    def report(self) -> str:
        """What was found, in words."""
        race, best, tried = self.race, self.race.best, len(self.race.tried)
        assert best is not None
        seed = self.samples.seed + best
        lines = [
            f"Saved as {os.path.basename(self.path)}: the noise that RandomNoise makes with seed {seed}, the best "
            f"of {tried}; mean error {race.loss(best):.4f} on {len(race.errors[best])} of {len(race.references)} "
            "references."
        ]
        if tried < race.candidates:
            lines.append(f"The time was over before the other {race.candidates - tried} candidates ran.")
        if self.compared is None:
            lines.append(
                "No references were kept aside, as there are fewer than three: whether it is better on others is not known."
            )
        else:
            found, others = float(self.compared[0].mean()), self.compared[1:].mean(1)
            lines.append(
                f"On {len(self.aside)} references kept aside: error {found:.4f}, and {float(others.mean()):.4f} in the mean over "
                f"{RANDOM} random noises, of which {int((others > found).sum())} are worse."
            )
            if not found < float(others.mean()):
                lines.append("It is no better than a random noise there: do not use it, or give more references.")
        lines.append(
            f"{race.runs.calls} network calls, counted for each noise, in {self.live.seconds:.0f} s. For "
            f"{self.samples.cfg:g} CFG and latents of shape {self.samples.shape} only."
        )
        return "\n".join(lines)


def curve(race: Race):
    """The best so far against network calls, for each number of references that candidates have run on."""
    series = []
    for known in dict.fromkeys(seen.references for seen in race.trail):
        shown = [seen for seen in race.trail if seen.references == known]
        series.append((f"best so far on {known} references", [s.calls for s in shown], [s.loss for s in shown]))
    if not series:
        series.append(("best so far", [race.runs.calls], [race.loss(race.best) if race.best is not None else 0.0]))
    return plot.line_plot(series, "Find Start Noise", "network calls (noises)", "mean error")
