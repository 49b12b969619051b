"""AutoDiffusion: sigmas, and the parts of the network that each step leaves out, searched on the end of runs."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..caching.auto_diffusion import table_of
from ..caching.block_skip import choose
from ..solver import Solver
from .cohort import Running
from .engine import Proposer, needed, storage, suggested
from .families import Plan, Schedules
from .fitted import FittedSolver
from .levenberg import refine
from .search import Ascent, Search, curve_of
from .skip_space import Allowance, Left, Sets, Skipping, SkipSpace, skips_of

TURNS, PARENTS = (0.75, 0.5, 0.4, 0.15, 0.0), 8
"""The shares of the time that are left when a turn ends: sigmas, sets, sigmas, sets, sigmas. How many of the best sets the second
turn begins with."""

LIMIT = 1e6
"""The loss of a run that is not finite."""


@dataclass
class SkipSearch(Search):
    """First the sigmas alone, as published; then the sets of units that each step leaves out, and the sigmas again, in turns.

    ``allowance`` bounds the work; every start and every trial is within it (the published code does not check again after a
    mutation). First each step leaves out what its scores say. Sigmas go by Levenberg-Marquardt, since they have slopes; sets are
    proposed by Optuna, its queue being the best so far, the same units in all steps, and all units in as many of the first or of
    the last steps as it takes. What is better than all before on ``fit`` is run on ``select``, and the best there is the result.
    Both at once, as published, missed the best sets of the toy in its test, with as many trials: with other sigmas in each, what a
    set does is lost in what they do.

    whole: fewer steps of the whole network at no more work, to be compared with, on ``select``: ``whole_label``,
    ``whole_select``. tried: trials, of which several may come to the same sets; seen: all different ones.
    """

    solver: Solver = field(default_factory=FittedSolver)
    allowance: Allowance = field(default_factory=lambda: Allowance((), 1, 1.0))
    network: Left = field(default_factory=Left)
    whole: Mapping[str, Plan] = field(default_factory=dict)
    sampler: str = "tpe"
    tries: int = 200
    seed: int = 0
    tried: int = 0
    seen: set[Sets] = field(default_factory=set)
    whole_label: str = ""
    whole_select: float = float("inf")

    @property
    def select_loss(self) -> float:
        """Of the best one."""
        return min(trial.select for trial in self.trials)

    def ascents(self, plans: dict[str, Plan]) -> Generator[Ascent | None, None, None]:
        for name, plan in self.whole.items():
            loss = self.loss((yield from self.select.errors(plan)))
            if loss < self.whole_select:
                self.whole_label, self.whole_select = name, loss
        needed("optuna", "Search AutoDiffusion")  # said before the long part
        yield from self._sigmas(next(iter(plans.values())), "sigmas alone", TURNS[0])
        known: list[Sets] = []
        for turn in (1, 2):
            if any(SkipSpace(self.allowance).knobs):
                known = yield from self._sets(known, turn * self.tries // 2, TURNS[2 * turn - 1])
                assert self.best is not None
                yield from self._sigmas(self.best, "sigmas for the sets", TURNS[2 * turn])

    def _sigmas(self, plan: Plan, label: str, least: float) -> Generator[None, None, None]:
        """Better ones with the plan's sets, as long as more than ``least`` of the time is left."""
        family = Schedules(plan.solver, curve_of(self.process, plan))
        for found in refine(self.fit, family, family.theta(plan.times), self.loss.follow):
            if found is not None:
                yield from self._consider(found.plan, self.loss(found.rms), label)
            yield
            if self.left() < least:
                return

    def _sets(self, known: list[Sets], most: int, least: float) -> Running:
        """Better ones with the best sigmas, in ``most`` trials; returns the best of them."""
        assert self.best is not None and isinstance(self.best.solver, Skipping)
        optuna, space, times = needed("optuna", "Search AutoDiffusion"), SkipSpace(self.allowance), self.best.times
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(storage=storage("", 10), sampler=Proposer(self.sampler, space, self.seed + most))
        for sets in (self.best.solver.left_out, *(known or self._usual())):
            study.enqueue_trial(space.values(sets), skip_if_exists=True)
        losses: dict[Sets, float] = {}
        while self.tried < most and self.left() > least:
            trial = study.ask()
            sets = space.sets(suggested(trial, space))
            self.tried += 1
            if sets not in losses:  # others may come to the same
                plan = Plan(Skipping(self.solver, sets, self.network), times)
                loss = self.loss((yield from self.fit.errors(plan)))
                if loss < min(losses.values(), default=LIMIT):
                    yield from self._consider(plan, loss, f"sets, trial {self.tried}")
                losses[sets] = min(loss, LIMIT)
                self.seen.add(sets)
            else:
                yield  # the user may stop here too
            study.tell(trial, losses[sets])
        return sorted(losses, key=losses.__getitem__)[:PARENTS]

    def _usual(self) -> list[Sets]:
        steps, units = self.allowance.steps, self.allowance.units
        names, nothing = frozenset(unit.name for unit in units), frozenset()
        same = frozenset(unit.name for unit in choose(units, 1.0 - self.allowance.budget))
        full = math.ceil(self.allowance.needed / sum(unit.work for unit in units) - 1e-9)
        return [
            (same,) * steps,
            (names,) * full + (nothing,) * (steps - full),
            (nothing,) * (steps - full) + (names,) * full,
        ]

    def extra(self) -> dict[str, Any]:
        if self.best is None:
            return {}
        compared = {"whole": self.whole_label, "whole_select": self.whole_select} if self.whole_label else {}
        return {**table_of(skips_of(self.best, self.allowance.units)), "budget": self.allowance.budget, **compared}
