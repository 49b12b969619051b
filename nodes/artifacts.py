"""Calibrations on disk: the ``quickstep`` models folder, its files in dropdowns, and what is said when one does not fit."""

from __future__ import annotations

import logging
import os
from functools import lru_cache

import folder_paths

from ..solvers.artifact import Artifact, load, mismatches
from ..solvers.ems import ModelStatistics
from ..solvers.method import Method
from ..solvers.process import ForwardProcess
from ..solvers.solver import Solver
from ..solvers.transform import Transform

FOLDER = "quickstep"
NONE = "none"
SUFFIXES = (".json", ".safetensors")
log = logging.getLogger(__name__)


def register() -> None:
    """Make ``models/quickstep`` known to ComfyUI, next to what ``extra_model_paths.yaml`` says."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER), is_default=True)


def folder() -> str:
    """Where new files go: the first of the models/quickstep folders."""
    return folder_paths.get_folder_paths(FOLDER)[0]


def files(kind: str) -> list[str]:
    """Names of the artifacts of this kind, ``NONE`` first."""
    if FOLDER not in folder_paths.folder_names_and_paths:
        return [NONE]
    names = (n for n in folder_paths.get_filename_list(FOLDER) if n.endswith(SUFFIXES))
    return [NONE, *(name for name in names if _kind_of(*_where(name)) == kind)]


def read(name: str, kind: str, taker: str) -> Artifact | None:
    """The artifact of that name; None for ``NONE``."""
    if name == NONE:
        return None
    path = _path(name)
    if path is None:
        raise ValueError(f"{taker}: there is no file {name!r} in ComfyUI's models/{FOLDER} folder.")
    return load(path, kind)


def free_path(name: str, suffix: str, taker: str) -> str:
    """Where a new file of that name goes: in the first models/quickstep folder, with a number if there is one already."""
    name = name.strip().removesuffix(suffix)
    if not name or any(c in name for c in '/\\:*?"<>|') or name.startswith("."):
        raise ValueError(f"{taker}: name = {name!r} must be a plain file name, without folders.")
    root = folder()
    for number in range(1, 10_000):
        path = os.path.join(root, f"{name}{'' if number == 1 else f'_{number}'}{suffix}")
        if not os.path.exists(path):
            return path
    raise ValueError(f"{taker}: there are too many files called {name!r}.")


def modified(name: str) -> float:
    """When the file of that name was written last; 0 for ``NONE`` and what is not there."""
    path = _path(name)
    return os.path.getmtime(path) if path else 0.0


def warn(
    method: Method,
    process: ForwardProcess,
    steps: int,
    cfg: float | None,
    shape: tuple[int, ...],
    solver: Method | None = None,
) -> None:
    """Say once per run what a calibration inside ``method``, in whatever depth, was not made for.

    solver: what a transform is around, None if that is not one of this pack's; a solver is its own, or the one it wraps.
    """
    made_of = list(vars(method).values())
    inner = next((v for v in made_of if isinstance(v, Solver)), solver if isinstance(method, Transform) else method)
    for value in made_of:
        if isinstance(value, Method):
            warn(value, process, steps, cfg, shape, inner)
        found = value.source if isinstance(value, ModelStatistics) else value
        if isinstance(found, Artifact):
            for sentence in mismatches(found, process, None, inner, steps, cfg, shape):
                log.warning("%s: the calibration may not fit. %s", method.title, sentence)


def _path(name: str) -> str | None:
    """Where the file of that name lies; None for ``NONE`` and what is not there."""
    known = name != NONE and FOLDER in folder_paths.folder_names_and_paths
    return folder_paths.get_full_path(FOLDER, name) if known else None


def _where(name: str) -> tuple[str, float]:
    path = folder_paths.get_full_path_or_raise(FOLDER, name)
    return path, os.path.getmtime(path)


@lru_cache(maxsize=256)
def _kind_of(path: str, modified: float) -> str | None:
    """Its kind; None for what is no artifact. Read once for each change of the file."""
    try:
        return load(path).kind
    except ValueError as error:
        log.info("not listed: %s", error)
        return None
