"""What is wrong with published solvers: every defect measured, and ``docs/defects.md`` written from the numbers.

    python benchmarks/defects.py                measures everything (about a minute) and writes the page
    python benchmarks/defects.py --json NAMES   prints the numbers of these checks (of all without names), writes nothing

A check runs ComfyUI's own function where the defect is in ComfyUI, and else the published formula, on data whose exact
answer is known. It returns numbers; ``wrong`` says whether they still show the defect. What they do not show is listed as
not reproduced.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from _defect import CORE, DEFECTS, PUBLISHED, SCHEDULES
from _pack import import_comfy, import_pack

PARTS = ("order", "run", "published", "schedules")

PAGE = Path(__file__).resolve().parent.parent / "docs" / "defects.md"


def page(measured: dict[str, dict], version: str) -> str:
    lines = [
        "# What is wrong with published solvers",
        "",
        f"Written by `benchmarks/defects.py` from a run against ComfyUI {version}; every number is the result of the check "
        "of the same name in `benchmarks/`. `tests/comfy/test_core_defects.py` fails when one of them is no longer true.",
        "",
        "*Order* p: twice the steps, an error 2^p times smaller; measured in float64 on a Gaussian mixture, on grids that "
        "hide the low-order start and end of a multistep method. *Mean* and *variance* are exact moments of the result on "
        "Gaussian data (no Monte Carlo), with many steps, so that a correct method has none of these errors. *VE* are "
        "models with alpha = 1 (SD, SDXL), *flow* models have alpha = 1 - sigma (SD3, Flux, Wan).",
    ]
    for where in (CORE, PUBLISHED, SCHEDULES):
        lines += [
            "",
            f"## {where}",
            "",
            "| name | what is wrong | measured | should be | Quickstep |",
            "|---|---|---|---|---|",
        ]
        for key, d in DEFECTS.items():
            if d.where == where and d.wrong(measured[key]):
                lines.append(f"| {d.name} | {d.text} | {d.shown.format(**measured[key])} | {d.should} | {d.instead} |")
    missing = [(d, measured[key]) for key, d in DEFECTS.items() if not d.wrong(measured[key])]
    if missing:
        lines += ["", "## Not reproduced", "", "Claims that were checked and did not hold.", ""]
        lines += [f"- **{d.name}.** {d.text} Measured: {d.shown.format(**numbers)}." for d, numbers in missing]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="checks to run; all without")
    parser.add_argument("--json", action="store_true", help="print the numbers, leave the page alone")
    options = parser.parse_args()

    import_comfy()
    import_pack()
    for part in PARTS:
        importlib.import_module(f"defects_{part}")
    from comfyui_version import __version__ as version

    names = options.names or list(DEFECTS)
    measured = {}
    for name in names:
        measured[name] = {key: float(value) for key, value in DEFECTS[name].check().items()}
        if not options.json:
            state = "" if DEFECTS[name].wrong(measured[name]) else "NOT REPRODUCED "
            print(f"{name}: {state}{DEFECTS[name].shown.format(**measured[name])}", flush=True)
    if options.json:
        print(
            json.dumps({name: {**numbers, "wrong": DEFECTS[name].wrong(numbers)} for name, numbers in measured.items()})
        )
    elif not options.names:
        PAGE.write_text(page(measured, version), encoding="utf-8")
        print(f"{len(names)} checks, written to {PAGE}")


if __name__ == "__main__":
    main()
