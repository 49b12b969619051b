"""A study while it runs: time, preview, saving, and what it says in the end."""

from __future__ import annotations

import os

from ..solvers.artifact import Artifact, save
from ..solvers.calibration.engine import FRONT
from ..solvers.calibration.study import Point, Study
from ..solvers.usf import USF
from ..solvers.usf_table import KIND
from . import artifacts, plot
from .calibration_samples import Samples
from .live import Live


class Watch:
    """Runs a study until it ends or the minutes are over, with a live picture, and keeps the best so far in files.

    They are written every half minute, at the end, and when the user stops; a worker writes none.
    """

    def __init__(self, study: Study, samples: Samples, minutes: float, name: str):
        self.study, self.samples, self.minutes, self.name = study, samples, minutes, name
        self.paths: dict[int, str] = {}
        self.path("")  # refuses bad names
        self.live = Live()
        study.tick, study.left = self.tick, self.left

    def path(self, end: str) -> str:
        return artifacts.free_path(f"{self.name.strip().removesuffix('.json')}{end}", ".json", "Search Solver")

    def left(self) -> float:
        """Share of the time that is left, when that for the report is put aside."""
        used, study = self.live.seconds, self.study
        report = study.report.size * (study.teacher.get("steps", 0) + 2 * study.space.most)
        reserved = used * report / max(study.calls, 1) if study.lead and study.stage in ("search", "times") else 0.0
        return 1.0 - (used + reserved) / (60.0 * self.minutes)

    def run(self) -> None:
        """All of it. What was found is saved also when it is interrupted."""
        try:
            self.study.run()
        finally:
            self.save()
        self.live.end()

    def tick(self) -> None:
        """After each visit of the network; raises when the user stops."""
        value = min(999, max(0, int(1000 * (1.0 - self.left()))))
        self.live.tick(value, self._drawn, self.save)

    def _drawn(self):
        return picture(self.study) if self.study.lead and self.study.finished() else None

    def save(self) -> None:
        """The best so far, whole or not at all; nothing before there is one, or before it is known to be of this search."""
        if not self.study.lead or self.study.stage == "teacher":
            return
        for point in self.found():
            if point.calls not in self.paths:
                self.paths[point.calls] = self.path(f"_{point.calls}" if self.study.sampler == FRONT else "")
            save(self.paths[point.calls], self.artifact(point), overwrite=True)

    def found(self) -> list[Point]:
        """What is worth a file: the best one, or the best of each number of calls."""
        front = self.study.front()
        return front if self.study.sampler == FRONT else front[-1:]

    def artifact(self, point: Point) -> Artifact:
        study, measured = self.study, point.table == self.study.best
        found_for = self.samples.found_for(
            solver=USF.id,
            steps=len(point.table.steps),
            loss_before=float(study.before.mean()) if measured and study.before is not None else None,
            loss_after=float(study.after.mean()) if measured and study.after is not None else None,
        )
        return Artifact(KIND, point.table.raw(), {}, found_for)

    def report(self) -> str:
        """What was found, in words."""
        study = self.study
        trials = study.study.get_trials(deepcopy=False)
        pruned = sum(trial.state.name == "PRUNED" for trial in trials)
        where = "a PostgreSQL database" if study.url.startswith("postgres") else study.url.removeprefix("sqlite:///")
        lines = [f"Saved as {', '.join(map(os.path.basename, self.paths.values()))}."] if self.paths else []
        lines.append(
            f"Study {study.name!r} in {where}: {len(study.finished())} trials finished, {pruned} stopped early; {study.ran} ran "
            f"here, in {self.live.seconds:.0f} s, with {study.calls} network calls, counted for each sample."
        )
        base = study.base_trial()
        if study.before is not None and study.after is not None and base is not None:
            before, after = study.before, study.after
            better = int((after < before).sum())
            lines.append(
                f"Error on {len(before)} samples kept aside: {before.mean():.4f} before ({base.user_attrs['start']}), "
                f"{after.mean():.4f} after; {better} of {len(before)} samples are nearer."
            )
            if study.best_trial() is base:
                lines.append("Nothing better than the best usual sampler was found, so that is what is returned.")
        if study.sampler == FRONT:
            lines += [f"{point.calls} calls: {point.select:.4f} {point.label}".rstrip() for point in study.front()]
        return "\n".join(lines)


def picture(study: Study):
    """Losses by trial, and the best so far; for error against calls all of them, and the front."""
    trials = study.finished()
    if study.sampler == FRONT:
        front = study.front()
        series: list[plot.Series] = [
            ("front, on samples that select", [p.calls for p in front], [p.select for p in front]),
            ("usual samplers, on samples of the fit", *_lowest([t for t in trials if "start" in t.user_attrs])),
        ]
        return plot.line_plot(series, "Error against calls", "network calls", "error", log_y=True)
    best, lowest = [], float("inf")
    for trial in trials:
        lowest = min(lowest, trial.user_attrs.get("select", float("inf")))
        best.append(lowest)
    numbers = [trial.number for trial in trials]
    series = [
        ("fit", numbers, [trial.values[0] for trial in trials]),
        ("best so far, on samples that select", numbers, best),
    ]
    positive = all(trial.values[0] > 0.0 for trial in trials)
    return plot.line_plot(series, f"Search: {study.stage}", "trial", "error", log_y=positive)


def _lowest(trials: list) -> tuple[list[int], list[float]]:
    """The least loss for each number of calls."""
    found: dict[int, float] = {}
    for trial in trials:
        calls = trial.user_attrs["calls"]
        found[calls] = min(found.get(calls, float("inf")), trial.values[0])
    return sorted(found), [found[calls] for calls in sorted(found)]
