"""Declared and measured order of every solver, as a table: ``make bench-orders``. Needs no ComfyUI; about a minute."""

from __future__ import annotations

from _pack import import_pack

import_pack()
from quickstep.solvers.exponential import DDIM, DPMSolverPP, SDEDPMSolverPP  # noqa: E402
from quickstep.solvers.verify import FLOW, VE, measured_order, measured_weak_order  # noqa: E402

NEVER = {"lower_order_final": "never"}
SETTINGS = [
    DDIM(),
    DDIM(eta=0.5),
    DDIM(eta=1.0),
    DPMSolverPP(order=1, **NEVER),
    DPMSolverPP(order=2, correction="midpoint", **NEVER),
    DPMSolverPP(order=2, correction="taylor", **NEVER),
    DPMSolverPP(order=3, third_order="exact", **NEVER),
    DPMSolverPP(order=3, third_order="reference", **NEVER),
    SDEDPMSolverPP(order=1, **NEVER),
    SDEDPMSolverPP(order=2, correction="midpoint", **NEVER),
    SDEDPMSolverPP(order=2, correction="taylor", **NEVER),
    SDEDPMSolverPP(order=3, third_order="exact", **NEVER),
    SDEDPMSolverPP(order=3, third_order="reference", **NEVER),
]


def main() -> None:
    print("| solver | settings | kind | declared | measured, VE | measured, flow |\n|---|---|---|---:|---:|---:|")
    for solver in SETTINGS:
        measure = measured_weak_order if solver.stochastic else measured_order
        shown = {k: v for k, v in vars(solver).items() if k not in ("lower_order_final", "noise", "s_noise")}
        settings = ", ".join(f"{k} {v}" for k, v in shown.items())
        kind = "weak (variance)" if solver.stochastic else "global"
        orders = " | ".join(f"{measure(solver, process):.2f}" for process in (VE, FLOW))
        print(f"| {solver.title} | {settings} | {kind} | {solver.convergence_order} | {orders} |", flush=True)


if __name__ == "__main__":
    main()
