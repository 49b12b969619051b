"""A predictor of the loss, fitted to what was tried, that proposes what to try next: the search of S^3 (USF)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.optimize import differential_evolution
from scipy.stats import kendalltau

from .space import Knob, Space

FIRST, ROUND, TRUST = 40, 10, 0.4
"""Trials before the first prediction; how many are proposed before the next; the least rank correlation on others."""

_MEMBERS, _PARENTS, _POPULATION, _GENERATIONS = 3, 15, 40, 25


class Predictor:
    """Gradient-boosted trees on ``Space.features``, several of them; ``tau``: Kendall's, on a fifth that they have not seen."""

    def __init__(self, space: Space, tried: list[dict[str, Any]], losses: list[float], seed: int):
        self.space, self.tau = space, 0.0
        X, y = np.array([space.features(values) for values in tried]), np.log(np.maximum(losses, 1e-12))
        y = np.minimum(y, np.median(y) + 2.0)  # how bad bad ones are does not matter
        order = np.random.default_rng(seed).permutation(len(y))
        held, rest = order[: len(y) // 5], order[len(y) // 5 :]
        if len(held) > 1:
            self.members = [self._member(X[rest], y[rest], seed)]
            tau = float(np.asarray(kendalltau(self._predicted(X[held])[0], y[held]))[0])
            self.tau = tau if math.isfinite(tau) else 0.0
        self.members = [self._member(X, y, seed + i) for i in range(_MEMBERS)]

    @staticmethod
    def _member(X: np.ndarray, y: np.ndarray, seed: int) -> Any:
        from sklearn.ensemble import GradientBoostingRegressor

        return GradientBoostingRegressor(
            n_estimators=120, learning_rate=0.1, max_depth=3, subsample=0.6, max_features=0.5, random_state=seed
        ).fit(X, y)

    def _predicted(self, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        made = np.array([member.predict(X) for member in self.members])
        return made.mean(0), made.std(0)

    def __call__(self, tried: list[dict[str, Any]]) -> np.ndarray:
        """Of each, the predicted logarithm of the loss, half a deviation of the members below their mean: what is not known
        well may be better."""
        mean, deviation = self._predicted(np.array([self.space.features(values) for values in tried]))
        return mean - 0.5 * deviation


def proposals(predictor: Predictor, parents: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """What the predictor finds best, best first: scipy's differential evolution on it, from the best that were tried."""
    knobs, rng = predictor.space.knobs, np.random.default_rng(seed)
    low, high = (np.array(ends, dtype=float) for ends in zip(*map(_range, knobs), strict=True))
    whole = np.array([bool(knob.options) or isinstance(knob.low, int) for knob in knobs])
    begun = np.array([[_number(knob, values[knob.name]) for knob in knobs] for values in parents])
    pool = begun[np.arange(_POPULATION) % len(begun)]
    drawn = low + (high - low) * rng.random(pool.shape)
    moved = np.where(whole, drawn, pool + 0.08 * (high - low) * rng.standard_normal(pool.shape))
    change = (rng.random(pool.shape) < 0.15) & (np.arange(_POPULATION) >= len(begun))[:, None]
    pool = np.clip(np.where(change, moved, pool), low, high)

    def values_of(row: np.ndarray) -> dict[str, Any]:
        return {knob.name: _value(knob, v) for knob, v in zip(knobs, row, strict=True)}

    options: dict[str, Any] = {
        "integrality": whole, "init": pool, "maxiter": _GENERATIONS, "mutation": (0.3, 0.9), "recombination": 0.5, "tol": 0.0,
        "vectorized": True, "updating": "deferred", "polish": False, "seed": np.random.default_rng(seed),
    }  # fmt: skip
    bounds = list(zip(low, high, strict=True))
    found = differential_evolution(lambda rows: predictor([values_of(row) for row in rows.T]), bounds, **options)
    rows = np.asarray(found.population)[np.argsort(found.population_energies)]
    return [values_of(row) for row in rows]


class Predicted:
    """An Optuna sampler: every ``ROUND`` trials a predictor is fitted to all that are finished, and proposes the next ones.

    Before the first ``FIRST`` trials, while the predictor cannot rank trials it has not seen (tau below ``TRUST``), and for
    every fourth trial, ``other`` proposes. Pruned trials count as their share of the best trial's loss on the same samples.
    """

    def __init__(self, space: Space, distributions: dict[str, Any], other: Any, seed: int, listed: dict[int, list]):
        self.space, self.distributions, self.other, self.seed = space, distributions, other, seed
        self.listed = listed  # proposals by how many trials they are made from

    def before_trial(self, study: Any, trial: Any) -> None:
        self.other.before_trial(study, trial)

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return self.distributions

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
        trials = study.get_trials(deepcopy=False)
        finished = sorted((t for t in trials if t.state.name in ("COMPLETE", "PRUNED")), key=_completed)
        seen = len(finished) // ROUND * ROUND
        if seen >= FIRST and trial.number % 4 and search_space:
            if seen not in self.listed:
                self.listed[seen] = self._listed(finished[:seen])
            known = [t.params for t in trials]
            fresh = [values for values in self.listed[seen] if values not in known]
            if fresh:
                return fresh[trial.number % min(ROUND, len(fresh))]
        space = self.other.infer_relative_search_space(study, trial)
        return self.other.sample_relative(study, trial, space)

    def _listed(self, trials: list[Any]) -> list[dict[str, Any]]:
        """Proposals after these trials; none if they cannot be trusted."""
        losses, tried = estimates(trials), [trial.params for trial in trials]
        predictor = Predictor(self.space, tried, losses, self.seed + len(trials))
        if predictor.tau < TRUST:
            return []
        best = sorted(range(len(losses)), key=losses.__getitem__)[:_PARENTS]
        return proposals(predictor, [tried[i] for i in best], self.seed + len(trials))

    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        return self.other.sample_independent(study, trial, name, distribution)

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        self.other.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        self.other.reseed_rng()


def estimates(trials: list[Any]) -> list[float]:
    """The loss of each trial, for pruned ones scaled from the samples they were run on."""
    complete = [t for t in trials if t.state.name == "COMPLETE"]
    best = min(complete, key=lambda t: t.value)
    known = best.user_attrs["errors"]
    found = []
    for trial in trials:
        errors = trial.user_attrs["errors"]
        share = sum(errors) / max(sum(known[: len(errors)]), 1e-12)
        found.append(trial.value if trial.state.name == "COMPLETE" else share * sum(known) / len(known))
    return found


def _completed(trial: Any) -> tuple:
    return trial.datetime_complete, trial.number


def _range(knob: Knob) -> tuple[float, float]:
    return (0.0, len(knob.options) - 1.0) if knob.options else (knob.low, knob.high)


def _number(knob: Knob, value: Any) -> float:
    return float(knob.options.index(value)) if knob.options else float(value)


def _value(knob: Knob, number: float) -> Any:
    if knob.options:
        return knob.options[round(number)]
    return round(number) if isinstance(knob.low, int) else float(number)
