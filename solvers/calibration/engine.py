"""Optuna, an optional package, as the engine of black-box searches: where studies are kept, and who proposes what is tried."""

from __future__ import annotations

import importlib
import re
import time
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

from .predictor import Predicted
from .space import Knob, Space

SAMPLERS = ("predictor", "tpe", "cma-es", "quasi-random", "nsga-ii")
FRONT = "nsga-ii"
"""The one that searches error against calls."""

INSTALL = (
    '{taker} needs the Python package {package}, which is not installed: "pip install optuna cmaes scikit-learn", for '
    'PostgreSQL also "psycopg[binary]", with the Python that runs ComfyUI.'
)
_RETRIES, _POPULATION, _ATTEMPTS = 2, 24, 4


class Searched(Protocol):
    """Anything with named parameters."""

    @property
    def knobs(self) -> Sequence[Knob]: ...


def needed(package: str, taker: str = "This search") -> Any:
    """The module of an optional package; one sentence if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ImportError(INSTALL.format(taker=taker, package=package.split(".")[0])) from None


def storage(url: str, heartbeat: int) -> Any:
    """Of studies: a SQLite file or a PostgreSQL database by its URL; without one, memory.

    Whoever works on a trial gives a sign of life every ``heartbeat`` seconds. A trial without one for three times as long is
    given up, and tried again by the next to ask.
    """
    optuna = needed("optuna")
    if not url:
        return optuna.storages.InMemoryStorage()
    if url.startswith("postgresql://"):
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    if url.startswith("postgresql+psycopg:"):
        needed("psycopg")
    waits = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    options = {"engine_kwargs": waits, "heartbeat_interval": heartbeat, "grace_period": 3 * heartbeat}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # heartbeats are called experimental
        try:
            again = {"heartbeat_stale_trial_callback": optuna.storages.RetryHeartbeatStaleTrialCallback(_RETRIES)}
        except AttributeError:  # Optuna before 4.9
            again = {"failed_trial_callback": optuna.storages.RetryFailedTrialCallback(_RETRIES)}
        made = _opened(lambda: optuna.storages.RDBStorage(url, **options, **again), url)
    if url.startswith("sqlite"):
        needed("sqlalchemy").event.listen(made.engine, "connect", _swift)
        made.engine.dispose()
    return made


def _opened(make: Any, url: str) -> Any:
    """Again after a moment, where two who begin at once both create the tables; one sentence if the database is not there."""
    wrong = needed("sqlalchemy").exc.SQLAlchemyError
    for attempt in range(1, _ATTEMPTS):
        try:
            return make()
        except wrong:
            time.sleep(0.3 * attempt)
    try:
        return make()
    except wrong as error:
        words = str(getattr(error, "orig", None) or error).strip().splitlines()
        raise ValueError(f"The study's database {_plain(url)} cannot be opened: {words[0]}") from None


def _plain(url: str) -> str:
    """Without the password."""
    return re.sub(r"//([^:/@]+):[^@]*@", r"//\1@", url)


def _swift(connection: Any, record: Any) -> None:
    """A commit is then no write to the platter: whole after kill -9, and after a power failure but for the last trials."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")


def distributions(space: Searched) -> dict[str, Any]:
    """The space in Optuna's words."""
    d = needed("optuna").distributions
    found: dict[str, Any] = {}
    for knob in space.knobs:
        if knob.options:
            found[knob.name] = d.CategoricalDistribution(knob.options)
        elif isinstance(knob.low, int):
            found[knob.name] = d.IntDistribution(knob.low, int(knob.high))
        else:
            found[knob.name] = d.FloatDistribution(knob.low, knob.high)
    return found


def suggested(trial: Any, space: Searched) -> dict[str, Any]:
    """The values that a trial is to try."""
    found: dict[str, Any] = {}
    for name, options, low, high in ((k.name, k.options, k.low, k.high) for k in space.knobs):
        if options:
            found[name] = trial.suggest_categorical(name, options)
        elif isinstance(low, int):
            found[name] = trial.suggest_int(name, low, int(high))
        else:
            found[name] = trial.suggest_float(name, low, high)
    return found


def _made(kind: str, space: Searched, seed: int, first: int, listed: dict[int, list]) -> Any:
    """A sampler of Optuna; ``seed`` is the trial's, ``first`` that of the study."""
    samplers = needed("optuna").samplers
    if kind == "cma-es":
        needed("cmaes")
        return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    if kind == "quasi-random":
        quiet = {"warn_asynchronous_seeding": False, "warn_independent_sampling": False}
        return samplers.QMCSampler(scramble=True, seed=first, **quiet)
    if kind == FRONT:
        return samplers.NSGAIISampler(population_size=_POPULATION, seed=seed)
    tpe = samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed)
    if kind == "predictor":
        needed("sklearn")
        assert isinstance(space, Space)  # it reads the features of solver schedules
        return Predicted(space, distributions(space), tpe, first, listed)
    return tpe


class Proposer:
    """An Optuna sampler that draws each trial's proposal from the study's history and the trial's number alone.

    So a search that was interrupted goes on with the proposal it would have made, and two workers do not make the same one.
    """

    def __init__(self, kind: str, space: Searched, seed: int):
        listed: dict[int, list] = {}
        self.make = lambda number: _made(kind, space, seed + 7919 * (number + 1), seed, listed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some samplers' options are called experimental
            self.inner = self.make(-1)

    def __str__(self) -> str:
        return str(self.inner)

    def before_trial(self, study: Any, trial: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.inner = self.make(trial.number)
        self.inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return self.inner.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
        return self.inner.sample_relative(study, trial, search_space)

    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        return self.inner.sample_independent(study, trial, name, distribution)

    def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
        self.inner.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        return  # each trial has a seed of its own
