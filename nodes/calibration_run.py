"""A calibration while it runs: time, preview, saving, and what it says in the end."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from ..solvers.artifact import Artifact, save
from ..solvers.calibration import decoupled, fitted
from ..solvers.calibration.fitted import FittedSolver
from ..solvers.calibration.search import Search
from ..solvers.process import ForwardProcess
from . import artifacts, plot
from .calibration_samples import Samples
from .live import Live

SCHEDULE = "schedule"
"""Kind of artifacts whose table has ``sigmas``."""


@dataclass
class Pursuit:
    """Runs a search until it ends or the minutes are over, with a live picture, and keeps the best so far in a file.

    kind, solver, settings: of the artifact. The file is written every half minute, at the end, and when the user stops.
    """

    search: Search
    samples: Samples
    minutes: float
    kind: str
    solver: str
    settings: dict[str, Any]
    path: str
    live: Live = field(default_factory=Live)
    late: bool = False
    """Whether the time was over before anything was searched."""

    def __post_init__(self):
        self.search.left = self.left

    def left(self) -> float:
        """Share of the time that is left, when that for the report is put aside."""
        used, search = self.live.seconds, self.search
        report = search.report.size * (search.teacher_steps + 2 * len(next(iter(search.starts.values())).times))
        reserved = used * report / max(search.calls, 1) if search.stage in ("starts", "search") else 0.0
        return 1.0 - (used + reserved) / (60.0 * self.minutes)

    def run(self) -> None:
        """The whole search. What was found is saved also when it is interrupted."""
        try:
            for _ in self._visits():
                self._show()
        finally:
            try:
                self.save()
            finally:
                self.search.release()
        self.live.end()

    def _visits(self):
        run, begun = self.search.run(), False
        for _ in run:
            yield
            if self.search.base is not None and self.search.stage != "report" and self.left() <= 0.0:
                self.late = not begun
                break
            begun = self.search.stage == "search"
        else:
            return
        yield from self.search.close()

    def _show(self) -> None:
        value = min(999, int(1000 * (1.0 - self.left())))
        self.live.tick(value, (lambda: curve(self.search)) if self.search.trials else None, self.save)

    def save(self) -> None:
        """The best so far, whole or not at all; nothing before there is one."""
        if self.search.best is None:
            return
        save(self.path, self.artifact(), overwrite=True)

    def artifact(self) -> Artifact:
        search, plan = self.search, self.search.best
        assert plan is not None
        table: dict[str, Any] = {"sigmas": [float(t) for t in plan.times]}
        if self.kind == fitted.KIND and isinstance(plan.solver, FittedSolver) and plan.solver.calibration is not None:
            table |= {name: values for name, values in plan.solver.calibration.table.items() if name != "sigmas"}
        if self.kind == decoupled.KIND:
            table["offsets"] = decoupled.offsets_of(plan)
        table |= {
            "network": type(self.samples.model.model).__name__,
            "calls": search.calls,
            "teacher_steps": search.teacher_steps,
            # The start itself comes first: what is found from it has the same label.
            "select_before": next((_known(t.select) for t in search.trials if t.label == search.base_label), None),
            "select_after": _known(min(trial.select for trial in search.trials)),
        } | search.extra()
        found_for = self.samples.found_for(
            solver=self.solver,
            settings=self.settings,
            steps=len(plan.times) - 1,
            loss_before=None if search.before is None else _known(float(search.before.mean())),
            loss_after=None if search.after is None else _known(float(search.after.mean())),
        )
        return Artifact(self.kind, table, {}, found_for)

    def report(self) -> str:
        """What was found, in words."""
        search = self.search
        lines = [f"Saved as {os.path.basename(self.path)}."]
        if self.late:
            lines.append("The time was over before the search began: give it more minutes, or fewer samples.")
        if search.before is not None and search.after is not None:
            before, after = search.before, search.after
            share = float(after.mean()) / max(float(before.mean()), 1e-12)
            better = int((after < before).sum())
            lines.append(
                f"Error on {len(before)} samples kept aside: {before.mean():.4f} before ({search.base_label}), "
                f"{after.mean():.4f} after, {share:.2f} of it; {better} of {len(before)} samples are nearer."
            )
            label = min(search.trials, key=lambda trial: trial.select).label
            if label not in search.starts:
                lines.append(f"Kept: {label}.")
            if search.best is search.base:
                lines.append("Nothing better than the best start was found, so that is what is returned.")
            if search.teacher_error > 0.5 * float(after.mean()):
                lines.append(
                    "The teacher itself is not much better than that: give it more minutes, or use a lower CFG."
                )
        lines.append(
            f"Teacher: {search.teacher_steps} steps, error {search.teacher_error:.4f}. Network calls, counted for each "
            f"sample: {search.calls}. {self.live.seconds:.0f} s."
        )
        lines.append(
            f"For {self.samples.cfg:g} CFG and latents of shape {self.samples.shape}; for others compare first, or calibrate again."
        )
        return "\n".join(lines)


def _known(loss: float) -> float | None:
    """None, which a file can hold, for a loss that is not finite."""
    return loss if math.isfinite(loss) else None


def curve(search: Search):
    """The errors against network calls: of all candidates that were better in the fit, and of the best so far."""
    calls, error = [trial.calls for trial in search.trials], search.loss.error
    lowest = accumulate((trial.select for trial in search.trials), min)
    series = [
        ("fit", calls, [error(trial.fit) for trial in search.trials]),
        ("best so far, on samples that select", calls, list(map(error, lowest))),
    ]
    if not any(math.isfinite(value) for _, _, ys in series for value in ys):
        series = [("no finite error", [0, 1], [0, 0])]
    positive = all(value > 0.0 for _, _, ys in series for value in ys)
    return plot.line_plot(series, f"Calibration: {search.stage}", "network calls (samples)", "error", log_y=positive)


def schedules(process: ForwardProcess, curves: dict[str, list[float]]):
    """Schedules in log signal-to-noise, where models of all kinds can be compared."""
    series = []
    for name, times in curves.items():
        finite = [t if process.alpha(t) > 0.0 else 0.999 * t for t in times if t > 0.0]  # pure noise is at -infinity
        shown = [(i, process.lam(t)) for i, t in enumerate(finite)]
        series.append((name, [i for i, _ in shown], [lam for _, lam in shown]))
    return plot.line_plot(series, "Schedule", "step", "lambda = log(alpha / sigma)")


def as_sigmas(times: list[float]) -> torch.Tensor:
    return torch.tensor(times, dtype=torch.float32)


def path(name: str, suffix: str, taker: str) -> str:
    return artifacts.free_path(name, suffix, taker)
