"""Declared and measured order of every solver, as a table: ``make bench-orders``. Needs no ComfyUI; some minutes.

The solvers and settings are those of ``tests/library``, which the tests hold to these numbers.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
package = sys.modules["quickstep_under_test"] = types.ModuleType("quickstep_under_test")
package.__path__ = [str(ROOT)]
sys.path.insert(0, str(ROOT / "tests"))
from library import variants  # noqa: E402
from quickstep_under_test.solvers.verify import FLOW, VE, measured_order, measured_weak_order  # noqa: E402


def main() -> None:
    print("| solver | settings | kind | declared | measured, VE | measured, flow |\n|---|---|---|---:|---:|---:|")
    for variant in variants():
        solver = variant.solver
        measure = measured_weak_order if solver.stochastic else measured_order
        kind = "weak (variance)" if solver.stochastic else "global"
        if variant.holds("order"):
            orders = " | ".join(f"{measure(solver, process):.2f}" for process in (VE, FLOW))
        else:
            orders = f"{dict(variant.exempt)['order']} | "
        settings = str(variant).partition("-")[2].replace("|", "/")
        print(f"| {solver.title} | {settings} | {kind} | {solver.convergence_order} | {orders} |", flush=True)


if __name__ == "__main__":
    main()
