"""From declared methods to nodes: a node is derived, not written.

``inputs(Method)`` turns ``param(...)`` fields into node inputs with their tooltips; ``node(...)`` makes the whole node class.
Widget order is a file format (workflows store values by position): parameters are only ever appended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from comfy_api.latest import io

from ..solvers import ems
from ..solvers.ems import ModelStatistics
from ..solvers.method import Method, Param, Part, params, parts, summary
from . import artifacts
from .bridge import solver_in

PREFIX = "Quickstep_"


def widget(declared: Param) -> io.WidgetInput:
    """The node input of one declared parameter."""
    common: dict[str, Any] = dict(tooltip=declared.help, default=declared.default)
    if declared.advanced:
        common["advanced"] = True
    if declared.kind is bool:
        return io.Boolean.Input(declared.name, **common)
    if declared.options is not None:
        return io.Combo.Input(declared.name, options=list(declared.options), **common)
    if declared.kind is str:
        return io.String.Input(declared.name, multiline=declared.multiline, **common)
    limits = {key: getattr(declared, key) for key in ("min", "max", "step") if getattr(declared, key) is not None}
    if declared.kind is int:
        return io.Int.Input(declared.name, **common, **limits)
    return io.Float.Input(declared.name, **common, **limits)


def inputs(method: type[Method]) -> list[io.WidgetInput]:
    """The node inputs of all parameters, in their declared order."""
    return [widget(declared) for declared in params(method)]


def socket(declared: Part) -> io.Input:
    """The node input of one declared part: a link to a sampler, or a dropdown of calibration files."""
    if declared.kind == "solver":
        return io.Sampler.Input(socket_id(declared), tooltip=declared.help)
    return io.Combo.Input(declared.name, options=artifacts.files(declared.kind), tooltip=declared.help)


def socket_id(declared: Part) -> str:
    return declared.name.replace("solver", "sampler")


def plugged(declared: Part, value: Any, taker: str) -> Any:
    """What the method gets for the value of its socket."""
    if declared.kind == "solver":
        return solver_in(value, taker)
    found = artifacts.read(value, declared.kind, taker)
    return ModelStatistics.of(found) if found is not None and declared.kind == ems.KIND else found


def node(
    method: type[Method],
    category: str,
    run: Callable[..., tuple],
    outputs: list[io.Output],
    before: Sequence[io.Input] = (),
) -> type[io.ComfyNode]:
    """A node class for ``method``.

    run: called as ``run(method(**settings), **other_inputs)``, returns the outputs as a tuple.
    before: inputs that are not the method's own; they come first.
    """
    names = [declared.name for declared in params(method)]
    sockets = {socket_id(declared): declared for declared in parts(method)}

    class Derived(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(
                node_id=PREFIX + method.id,
                display_name=f"{method.title} (Quickstep)",
                category=f"Quickstep/{category}",
                description=f"{summary(method)}\n{method.paper}",
                search_aliases=[method.title, method.id, method.paper],
                inputs=[*before, *map(socket, parts(method)), *inputs(method)],
                outputs=outputs,
            )

        @classmethod
        def execute(cls, **given):
            settings = {name: given.pop(name) for name in names if name in given}
            plugs = {p.name: plugged(p, given.pop(key), method.title) for key, p in sockets.items() if key in given}
            settings |= {name: value for name, value in plugs.items() if value is not None}
            return io.NodeOutput(*run(method(**settings), **given))

        @classmethod
        def fingerprint_inputs(cls, **given):
            files = (given.get(key) for key, p in sockets.items() if p.kind != "solver")
            return [artifacts.modified(name) for name in files if isinstance(name, str)]

    Derived.__name__ = Derived.__qualname__ = method.id
    Derived.__doc__ = method.__doc__
    Derived.__module__ = __name__
    Derived.METHOD = method
    return Derived
