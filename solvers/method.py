"""Declared methods: a frozen dataclass whose fields are ``param(...)``, from which nodes, help pages and tables derive.

Default, bounds, choices and help text of a parameter stand here once. ``nodes.derive`` turns them into node inputs and
tooltips, ``nodes/docs.py`` into help pages and the README's table; a value out of bounds is refused at construction.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass
from typing import Any, ClassVar

_KEY = "quickstep.param"
_PART = "quickstep.part"


@dataclass(frozen=True)
class Param:
    """What is declared about one parameter. ``kind`` is ``bool``, ``int``, ``float`` or ``str``."""

    name: str
    kind: type
    default: Any
    help: str
    min: float | None = None
    max: float | None = None
    step: float | None = None
    options: tuple[str, ...] | None = None
    advanced: bool = False
    multiline: bool = False

    def check(self, value: Any, owner: str) -> None:
        """Raise ``ValueError`` with one sentence if ``value`` is not allowed."""
        where = f"{owner}: {self.name} = {value!r}"
        if self.kind is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{where} must be true or false.")
        elif self.kind is str:
            if not isinstance(value, str):
                raise ValueError(f"{where} must be a text.")
            if self.options is not None and value not in self.options:
                raise ValueError(f"{where} is not one of {', '.join(self.options)}.")
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or (self.kind is int and not isinstance(value, int)):
                raise ValueError(f"{where} must be {'a whole' if self.kind is int else 'a finite'} number.")
            if (self.min is not None and value < self.min) or (self.max is not None and value > self.max):
                raise ValueError(f"{where} must lie between {self.min} and {self.max}.")


def param(default, help: str, *, min=None, max=None, step=None, options=None, advanced=False, multiline=False) -> Any:
    """Declare a dataclass field as a user-visible parameter; its type is the type of ``default``."""
    kind = type(default)
    if kind not in (bool, int, float, str):
        raise TypeError(f"a parameter's default must be bool, int, float or str, not {kind.__name__}")
    if kind is float and step is None:
        raise TypeError("a float parameter needs a step: without one ComfyUI's widget rounds to 0.1")
    declared = dict(
        kind=kind, default=default, help=help, min=min, max=max, step=step, advanced=advanced, multiline=multiline
    )
    declared["options"] = tuple(options) if options is not None else None
    return dataclasses.field(default=default, metadata={_KEY: declared})


@dataclass(frozen=True)
class Part:
    """A thing a method is made with that is no widget value: another solver, a latent, a calibration."""

    name: str
    kind: str
    help: str


def part(kind: str, help: str, default: Any = dataclasses.MISSING) -> Any:
    """Declare a dataclass field that is no widget value: ``kind`` is "solver", or the kind of a calibration file."""
    return dataclasses.field(default=default, metadata={_PART: dict(kind=kind, help=help)})


@dataclass(frozen=True)
class Method:
    """Base of everything a node is derived from: solvers, schedules, accelerators.

    Subclasses are frozen dataclasses that set

    - ``id``: the public identifier; the node is ``Quickstep_<id>``. Added, never renamed.
    - ``title``: the name people use.
    - ``paper``: where it comes from, as ``"Authors (year), arXiv:<id>"``.

    The first paragraph of the class docstring is the node's description, the whole docstring its help page.
    """

    id: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]

    def __post_init__(self):
        for declared in params(type(self)):
            declared.check(getattr(self, declared.name), self.title)


def params(method: type[Method]) -> list[Param]:
    """The declared parameters of a method, in order."""
    fields = dataclasses.fields(method)
    return [Param(name=f.name, **f.metadata[_KEY]) for f in fields if _KEY in f.metadata]


def parts(method: type[Method]) -> list[Part]:
    """The declared parts of a method, in order."""
    return [Part(name=f.name, **f.metadata[_PART]) for f in dataclasses.fields(method) if _PART in f.metadata]


def summary(method: type) -> str:
    """The first paragraph of the docstring, on one line."""
    return " ".join((inspect.getdoc(method) or "").split("\n\n")[0].split())
