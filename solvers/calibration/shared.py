"""Work that several processes divide among themselves through a folder: each result in a file of its own."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from .cohort import Running

NEAR = 1e-2
"""Of the size of a result in a file: how far the same one, made here, may be from it."""

Job = Callable[[], Running]
"""Makes one result, a tensor."""

Do = Callable[[Mapping[str, Job], Callable[[str], bool]], Running]
"""Does jobs, each if it is wanted when its turn comes; returns the results by name."""


def always(name: str) -> bool:
    return True


def in_turn(jobs: Mapping[str, Job], wanted: Callable[[str], bool] = always) -> Running:
    """One after the other."""
    found = {}
    for name, job in jobs.items():
        if wanted(name):
            found[name] = yield from job()
    return found


class Shared:
    """Results in files of a folder, for all who have the same jobs there; without a folder everybody makes them all.

    Who takes up a job says so in a file, and others then take another one first: so two workers do half of the jobs each, in the
    order of the list. One that was taken up by somebody is done nevertheless when nothing else is left, as he may be gone.

    The first result that somebody else has left is made here too, to see that it is of this network. If not, none of the files
    is read or written any more.
    """

    def __init__(self, folder: str = ""):
        self.folder = folder
        self.known: bool | None = None if folder else False
        """Whether the files are of this network; None before one was compared."""
        self.own: set[str] = set()
        """Names of what was made here."""

    def do(self, jobs: Mapping[str, Job], wanted: Callable[[str], bool] = always) -> Running:
        """See ``Do``."""
        found, left = {}, list(jobs)
        while left := [name for name in left if wanted(name)]:
            name = self._next(left)
            left.remove(name)
            found[name] = yield from self._result(name, jobs[name])
        return found

    def _next(self, left: list[str]) -> str:
        """One to be compared, then what has a file, since it costs nothing, then what nobody has taken up."""
        if self.known is False:
            return left[0]
        try:
            there = set(os.listdir(self.folder))
        except FileNotFoundError:
            return left[0]
        kept = [name for name in left if self._file(name).name in there]
        if self.known is None and kept:
            return kept[-1]  # whoever makes the list puts what takes long first
        return (kept or [name for name in left if self._claim(name).name not in there] or left)[0]

    def _result(self, name: str, job: Job) -> Running:
        kept = self._kept(name)
        if kept is not None and (self.known or name in self.own):
            return kept
        with self._taken(name):
            made = yield from job()
            self.own.add(name)
            if kept is not None and self.known is None:
                self.known = near(made, kept)
            if kept is None:
                self._keep(name, made)
        return made

    def _file(self, name: str) -> Path:
        return Path(self.folder) / f"{name}.safetensors"

    def _claim(self, name: str) -> Path:
        return Path(self.folder) / f"{name}.taken"

    @contextlib.contextmanager
    def _taken(self, name: str):
        if self.known is False:
            yield
            return
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        self._claim(name).touch()
        try:
            yield
        finally:
            self._claim(name).unlink(missing_ok=True)

    def _kept(self, name: str) -> torch.Tensor | None:
        """None too where the file is damaged, or gone meanwhile."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if self.known is False:
            return None
        try:
            return load_file(self._file(name))["ends"].clone()  # the file is not held open
        except (OSError, SafetensorError, KeyError):
            return None

    def _keep(self, name: str, made: torch.Tensor) -> None:
        """Whole or not at all."""
        from safetensors.torch import save_file

        if self.known is False:
            return
        draft = self._file(name).with_name(f".{name}.{uuid.uuid4().hex}.tmp")
        draft.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({"ends": made.contiguous()}, draft)
            with contextlib.suppress(PermissionError):  # Windows, where somebody reads the same result just now
                os.replace(draft, self._file(name))
        finally:
            draft.unlink(missing_ok=True)


def near(a: torch.Tensor, b: torch.Tensor, share: float = NEAR) -> bool:
    """Where both are no numbers they agree."""
    if a.shape != b.shape:
        return False
    a, b = (torch.nan_to_num(x.double(), 0.0, 0.0, 0.0) for x in (a, b))
    return float((a - b).norm()) <= share * float(b.norm())
