"""A defect of a published solver: a runnable check and the words around its numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

CORE, PUBLISHED, SCHEDULES = "ComfyUI's samplers and nodes", "Published formulas", "ComfyUI's schedulers"


@dataclass(frozen=True)
class Defect:
    """A check and the words around its numbers.

    shown: the numbers as text, a format string. should: what they should be. wrong: whether the numbers show the defect.
    instead: what Quickstep does.
    """

    name: str
    where: str
    shown: str
    should: str
    instead: str
    wrong: Callable[[dict], bool]
    check: Callable[[], dict[str, float]]

    @property
    def text(self) -> str:
        return " ".join((self.check.__doc__ or "").split())


DEFECTS: dict[str, Defect] = {}


def defect(name: str, where: str, shown: str, should: str, instead: str, wrong: Callable[[dict], bool]):
    """Register a check; its docstring is the sentence that says what is wrong."""

    def register(check):
        DEFECTS[check.__name__] = Defect(name, where, shown, should, instead, wrong, check)
        return check

    return register
