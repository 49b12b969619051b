"""Help pages and the README's method table, from docstrings, parameters and schemas: ``make docs``.

A page is ``web/docs/<node id>.md``, where ComfyUI looks for it. A test fails when what is written differs from what
this makes. ``demo/make_docs.py`` is the program.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from comfy_api.latest import io

from ..solvers.caching.composition import FEATURES, REFUSED, SITES, SITUATIONS, conflict, verdicts
from ..solvers.caching.library import ACCELERATORS
from ..solvers.method import params, parts, summary
from ..solvers.solver import Solver
from . import artifacts

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "web" / "docs"
COMPOSITION = ROOT / "docs" / "accelerators.md"
BEGIN, END = "<!-- methods: made by `make docs` -->", "<!-- /methods -->"


def page(node) -> str:
    """The help page of a node class, as Markdown."""
    schema = node.GET_SCHEMA()
    method = getattr(node, "METHOD", None)
    parts = [f"# {schema.display_name}", inspect.cleandoc(node.__doc__ or schema.description)]
    if schema.inputs:
        rows = [row for item in schema.inputs for row in input_rows(item)]
        parts.append("## Inputs\n\n" + table(("name", "type", "default", "allowed", "what it does"), rows))
    if schema.outputs:
        rows = [(f"`{o.display_name or o.io_type}`", o.io_type, o.tooltip or "") for o in schema.outputs]
        titles = ("name", "type", "what it is") if any(row[2] for row in rows) else ("name", "type")
        parts.append("## Outputs\n\n" + table(titles, [row[: len(titles)] for row in rows]))
    if method is not None and method.paper:
        parts.append(f"## Paper\n\n{linked(method.paper)}")
    parts.append(f"Node `{schema.node_id}`, category {schema.category}, source `{source(method or node)}`.")
    return "\n\n".join(parts) + "\n"


def input_rows(item) -> list[tuple[str, ...]]:
    """The table rows of one input."""
    declared = item.as_dict()
    tooltip, name = item.tooltip, f"`{item.id}`"
    template = getattr(item, "template", None)
    if isinstance(item, io.DynamicCombo.Input):
        choices = ", ".join(f"`{option.key}`" for option in item.options)
        return [(name, "choice", f"`{item.options[0].key}`", choices, f"{tooltip} Its options appear below it.")]
    if template is not None:  # Autogrow
        declared, tooltip = template.input.as_dict(), item.tooltip or template.input.tooltip
        name, kind = f"{name} ...", f"{template.input.get_io_type()}, {template.min} or more"
    else:
        kind = "choice" if "options" in declared else item.get_io_type().lower()
        kind = kind if kind in ("choice", "int", "float", "boolean", "string") else item.get_io_type()
    if item.optional:
        kind += ", optional"
    allowed = ""
    if "options" in declared:
        # What lies in the reader's models folder is no part of the page.
        fixed = [option for option in declared["options"] if not str(option).endswith(artifacts.SUFFIXES)]
        allowed = ", ".join(f"`{option}`" for option in fixed)
    elif "min" in declared or "max" in declared:
        allowed = f"{number(declared.get('min', ''))} to {number(declared.get('max', ''))}"
    default = declared.get("default", "")
    if "options" in declared and default == "":
        default = declared["options"][0]
    return [(name, kind, f"`{number(default)}`" if default != "" else "", allowed, tooltip or "")]


def number(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def linked(paper: str) -> str:
    """arXiv ids become links."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5}|[a-z-]+/\d{7})", r"[\g<0>](https://arxiv.org/abs/\1)", paper)


def source(thing: type) -> str:
    file = Path(inspect.getfile(inspect.unwrap(thing)))
    return file.resolve().relative_to(ROOT).as_posix()


def table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(
        "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in row) + " |" for row in lines
    )


def methods(nodes: list) -> str:
    """The README's table of methods: one row per node derived from one, and per calibration."""
    rows = []
    for node in nodes:
        method, schema = getattr(node, "METHOD", None), node.GET_SCHEMA()
        kind = schema.category.split("/")[1]
        title = method.title if method else schema.display_name.removesuffix(" (Quickstep)")
        help = f"[{title}](web/docs/{schema.node_id}.md)"
        if method is not None:
            rows.append((kind, help, summary(method), costs(method), linked(method.paper)))
        elif kind == "calibration":
            text = " ".join((node.__doc__ or "").split()).partition("Source: ")[2]
            papers = re.findall(r"[A-Z][\w, -]*?(?: et al\.)? \(\d{4}\), arXiv:\d{4}\.\d{5}", text)
            first = " ".join(schema.description.split("\n")[0].split())
            rows.append((kind, help, first, "", linked("; ".join(papers)) or "This pack"))
    return table(("kind", "node", "what it is", "calls per step, order", "paper"), rows)


def accelerators() -> str:
    """``docs/accelerators.md``: which accelerators work together, with which samplers and features."""
    made = list(ACCELERATORS)
    levels = [(f"`{site}`", what, ", ".join(a.title for a in made if a.site == site)) for site, what in SITES.items()]
    pairs = [(f"**{a.title}**", *("" if a is b else "no" if conflict(a, b) else "yes" for b in made)) for a in made]
    runs = [(f"**{a.title}**", *verdicts(a).values()) for a in made]
    why = [
        (" and ".join(f"`{site}`" for site in sorted(sites, key=list(SITES).index)), reason)
        for sites, reason in REFUSED.items()
    ]
    features = [(feature, *(answers.get(site, answers[""]) for site in SITES)) for feature, answers in FEATURES.items()]
    parts = [
        "# What works together",
        "Made by `make docs` from what the code refuses and says. Accelerators work at one of these levels; an outer one decides "
        "first, and what it answers, an inner one never sees. The order of the nodes does not matter.",
        table(("level", "it acts on", "accelerators"), levels),
        "## Accelerator and accelerator",
        "*no*: the second node refuses with one sentence. Every pair that says *yes* is run by a test.",
        table(("", *(a.title for a in made)), pairs),
        "Why not:",
        table(("levels", "reason"), why),
        "## Accelerator and sampler",
        "With default settings. *off*: the run goes on without it, and the report says why. *note*: it works, and the report "
        "says something about it.",
        table(("", *SITUATIONS), runs),
        "## Accelerator and feature",
        table(("", *(f"`{site}`" for site in SITES)), features),
        "*T-Stitch* and the other nodes that stitch models are guiders: an accelerator on one of the models works while that "
        "model does, and starts anew with it.",
    ]
    return "\n\n".join(parts) + "\n"


def costs(method: type) -> str:
    """Network calls per step and convergence order over all choices of ``order`` or ``points``; empty for what is no solver."""
    if not issubclass(method, Solver) or any(p.kind == "solver" for p in parts(method)):
        return ""
    choices = [
        (p.name, range(int(p.min or 1), int(p.max or 1) + 1)) for p in params(method) if p.name in ("order", "points")
    ]
    made = [method(**{name: value}) for name, values in choices[:1] for value in values] or [method()]
    calls = sorted({solver.calls for solver in made if solver.nfe(1) is not None})
    orders = sorted({solver.convergence_order for solver in made})
    return f"{span(calls) or 'adaptive'}, order {span(orders)}"


def span(numbers: list) -> str:
    return " to ".join(str(n) for n in dict.fromkeys([*numbers[:1], *numbers[-1:]]))


def with_methods(readme: str, nodes: list) -> str:
    """The README with its table brought up to date; unchanged without the two comments that enclose it."""
    if BEGIN not in readme or END not in readme:
        return readme
    before, rest = readme.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{methods(nodes)}\n{END}{rest.split(END, 1)[1]}"


def main(nodes: list) -> None:
    PAGES.mkdir(parents=True, exist_ok=True)
    wanted = {f"{node.GET_SCHEMA().node_id}.md": page(node) for node in nodes}
    for stale in {path.name for path in PAGES.glob("Quickstep_*.md")} - wanted.keys():
        (PAGES / stale).unlink()
    for name, text in wanted.items():
        (PAGES / name).write_text(text, encoding="utf-8")
    COMPOSITION.write_text(accelerators(), encoding="utf-8")
    readme = ROOT / "README.md"
    if readme.is_file():
        readme.write_text(with_methods(readme.read_text(encoding="utf-8"), nodes), encoding="utf-8")
    print(f"{len(wanted)} help pages in {PAGES.relative_to(ROOT)}")
