"""The report of ``solvers.py``: ``results/solvers.md``, ``results/solvers_ranking.md`` and a plot per problem."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from pathlib import Path

import comfy.samplers
from _candidates import CORE, QUICKSTEP
from _problems import SEED, problem
from quickstep.nodes.plot import line_plot

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # demo/ is before it, and has a run.py as well
from _hardware import hardware  # noqa: E402

RESULTS = HERE / "results"
AS_GOOD = 1.02  # a ratio of errors this close to 1 is a draw
NAMES = {
    "ve": "Exact mixture, VE",
    "flow": "Exact mixture, flow",
    "unet": "Demo UNet (v-prediction)",
    "unet_small": "Demo small UNet (v-prediction)",
    "dit": "Demo DiT (flow)",
    "ve samples": "Samples of the exact mixture, VE",
    "flow samples": "Samples of the exact mixture, flow",
}
Record = dict
Cell = tuple[str, float, int]


def write(records: dict[str, Record], pictures: int) -> None:
    """The pages and plots, from whatever has been measured."""
    cells: dict[Cell, list[Record]] = defaultdict(list)
    for r in records.values():
        counts = r["key"].rpartition("|")[2]
        if "failed" not in r and r["calls"] <= r["nfe"] and counts in ("", f"{pictures} pictures"):
            cells[r["problem"], r["cfg"], r["nfe"]].append(r)
    cells = {cell: rows for cell, rows in sorted(cells.items()) if cell[0] in NAMES}
    RESULTS.mkdir(exist_ok=True)
    lines = [*head(records, pictures), *verdicts(cells)]
    for name in NAMES:
        here = {cell: rows for cell, rows in cells.items() if cell[0] == name}
        if here:
            lines += samples_table(name, here) if name.endswith("samples") else error_table(name, here)
    (RESULTS / "solvers.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (RESULTS / "solvers_ranking.md").write_text("\n".join(ranking(cells)) + "\n", encoding="utf-8")
    for name in NAMES:
        plot(name, {cell: rows for cell, rows in cells.items() if cell[0] == name})
    print(f"{RESULTS / 'solvers.md'}, from {len(records)} records")


def head(records: dict[str, Record], pictures: int) -> list[str]:
    sides = {side: len({r["candidate"] for r in records.values() if r["side"] == side}) for side in (CORE, QUICKSTEP)}
    failed = sum("failed" in r for r in records.values())
    return [
        "# Error against network calls, every sampler with every schedule",
        "",
        f"Written by `benchmarks/solvers.py` on {hardware()}. {len(records)} runs ({failed} could not be run: too few steps for a "
        f"schedule, numbers that are not finite), {sides[CORE]} samplers of core, settings included, {sides[QUICKSTEP]} of "
        f"Quickstep; seed {SEED}.",
        "",
        "*Error*: mean over samples of the RMS distance to the converged solution of the same guided ODE from the same "
        "noise, so only deterministic samplers have one. A sampler takes the most steps whose calls fit the budget. The "
        "best pair is chosen by the first half of the samples and its error read off the other half, or the luck of the "
        "best of thousands would be reported. *Stock*: core's samplers with core's schedulers. On the networks "
        f"({pictures} pictures) the share with the right colour and shape stands behind the error. cfg is ComfyUI's: "
        "`negative + cfg (positive - negative)`, 1 is the positive alone. CFG++ samplers have another target and are left out.",
    ]


def best(rows: list[Record], wanted) -> Record | None:
    """By the half that is not reported; stochastic runs have no error."""
    return min((r for r in rows if wanted(r)), key=lambda r: r["tune"], default=None)


def exact(r: Record) -> bool:
    return not r["stochastic"] and not r["another_target"]


def contest(rows: list[Record]) -> tuple[Record | None, Record | None, Record | None]:
    """Best stock pair, best sampler of core's, best of Quickstep's."""
    stock = best(rows, lambda r: exact(r) and r["side"] == CORE and r["schedule"] in comfy.samplers.SCHEDULER_NAMES)
    return stock, *(best(rows, lambda r, side=side: exact(r) and r["side"] == side) for side in (CORE, QUICKSTEP))


def verdict(core: Record | None, ours: Record | None) -> str:
    if core is None or ours is None:
        return "-"
    ratio = ours["held"] / core["held"]
    return f"yes, {ratio:.2f}" if ratio <= AS_GOOD else f"**no**, {ratio:.2f}: {core['candidate']}, {core['schedule']}"


def shown(r: Record | None) -> str:
    if r is None:
        return "-"
    right = f" ({r['right']:.0%})" if "right" in r else ""
    return f"{r['held']:.4f}{right} {r['candidate']}, {r['schedule']}"


def verdicts(cells: dict[Cell, list[Record]]) -> list[str]:
    """How often Quickstep's best is at least as good as core's best."""
    lines = ["", "| problem | cfg | Quickstep at least as good | median ratio of the errors |", "|---|---:|---:|---:|"]
    groups = defaultdict(list)
    for (name, cfg, _), rows in cells.items():
        _, core, ours = contest(rows)
        if not name.endswith("samples") and core and ours:
            groups[name, cfg].append(ours["held"] / core["held"])
    for (name, cfg), ratios in groups.items():
        won = sum(ratio <= AS_GOOD for ratio in ratios)
        middle = sorted(ratios)[len(ratios) // 2]
        lines.append(f"| {NAMES[name]} | {cfg:g} | {won} of {len(ratios)} | {middle:.2f} |")
    return lines


def error_table(name: str, cells: dict[Cell, list[Record]]) -> list[str]:
    lines = ["", f"## {NAMES[name]}", "", f"![error against calls]({file_of(name)})", ""]
    lines += ["| cfg | calls | best stock | best core sampler, any schedule | best Quickstep | Quickstep as good |"]
    lines += ["|---:|---:|---|---|---|---|"]
    for (_, cfg, nfe), rows in cells.items():
        stock, core, ours = contest(rows)
        row = (f"{cfg:g}", str(nfe), shown(stock), shown(core), shown(ours), verdict(core, ours))
        lines.append("| " + " | ".join(row) + " |")
    noisy = [r for rows in cells.values() for r in rows if r["stochastic"] and "right" in r]
    if noisy:
        lines += [
            "",
            "Stochastic samplers, colour and shape right:",
            "",
            "| cfg | calls | best core | best Quickstep |",
        ]
        lines += ["|---:|---:|---|---|"]
        for (_, cfg, nfe), rows in cells.items():
            sides = (max((r for r in rows if r["stochastic"] and r["side"] == s), key=lambda r: r["right"], default=None)
                     for s in (CORE, QUICKSTEP))  # fmt: skip
            named = ("-" if r is None else f"{r['right']:.0%} {r['candidate']}, {r['schedule']}" for r in sides)
            lines.append(f"| {cfg:g} | {nfe} | " + " | ".join(named) + " |")
    return lines


def samples_table(name: str, cells: dict[Cell, list[Record]]) -> list[str]:
    lines = ["", f"## {NAMES[name]}", ""]
    lines += [
        "Energy distance of 1000 samples to the distribution asked for, times 1000 (500 samples choose, the others are "
        f"reported; 500 perfect ones have 0 \u00b1 {1000 * problem(name).floor:.0f}), and the error of the variance; cfg 1.",
        "",
    ]
    lines += ["| calls | core, stochastic | Quickstep, stochastic | core, deterministic | Quickstep, deterministic |"]
    lines += ["|---:|---|---|---|---|"]
    for (_, _, nfe), rows in cells.items():
        found = (
            best(rows, lambda r, noisy=noisy, side=side: (r["stochastic"], r["side"]) == (noisy, side))
            for noisy in (True, False) for side in (CORE, QUICKSTEP)
        )  # fmt: skip
        named = (
            "-" if r is None else f"{1000 * r['held']:.1f}, {r['variance']:+.0%} {r['candidate']}, {r['schedule']}"
            for r in found
        )
        lines.append(f"| {nfe} | " + " | ".join(named) + " |")
    return lines


KINDS = {
    "Demo UNets": (("unet", "unet_small"), lambda cfg: True),
    "Exact mixture VE and demo UNets, CFG above 1": (("ve", "unet", "unet_small"), lambda cfg: cfg > 1.0),
    "Exact mixture flow and demo DiT, CFG above 1": (("flow", "dit"), lambda cfg: cfg > 1.0),
}


def together(cells: dict[Cell, list[Record]], names: tuple[str, ...], wanted) -> list[str]:
    """Good everywhere: the pairs measured in all cells of a kind, by the geometric mean of error / the cell's best."""
    ratios, count = defaultdict(list), 0
    for (name, cfg, nfe), rows in cells.items():
        found = {(r["side"], r["candidate"], r["schedule"]): r["mean"] for r in rows if exact(r)}
        if name in names and wanted(cfg) and nfe <= 10 and found:
            lowest, count = min(found.values()), count + 1
            for pair, error in found.items():
                ratios[pair].append(error / lowest)
    rows = [(math.exp(sum(map(math.log, r)) / count), max(r), pair) for pair, r in ratios.items() if len(r) == count]
    lines = [f"{count} cells, {len(rows)} pairs.", "", "| | sampler | schedule | error / best | at worst |"]
    lines += ["|---:|---|---|---:|---:|"]
    for i, (mean, worst, (side, candidate, schedule)) in enumerate(sorted(rows)[:12], 1):
        lines.append(f"| {i} | {side} {candidate} | {schedule} | {mean:.2f} | {worst:.2f} |")
    return lines


def ranking(cells: dict[Cell, list[Record]]) -> list[str]:
    lines = [
        "# The best pairs",
        "",
        "By the mean error over all samples; what the columns mean is in `solvers.md`.",
        "",
        "## Over all cells of a kind, up to 10 calls",
        "",
        "Error as a multiple of the best in each cell: geometric mean, and the worst. What the README's table and *auto* advise "
        "is chosen from these. Networks were measured with the pairs that a screening left, so those lists are short.",
    ]
    for title, (names, wanted) in KINDS.items():
        lines += ["", f"### {title}", "", *together(cells, names, wanted)]
    lines += ["", "## In every cell"]
    for (name, cfg, nfe), rows in cells.items():
        score = "energy" if name.endswith("samples") else "mean"
        ranked = sorted((r for r in rows if score == "energy" or exact(r)), key=lambda r: r[score])[:10]
        lines += [
            "",
            f"### {NAMES[name]}, cfg {cfg:g}, {nfe} calls",
            "",
            f"| | sampler | schedule | calls | {score} | median |",
        ]
        lines += ["|---:|---|---|---:|---:|---:|"]
        for i, r in enumerate(ranked, 1):
            median = f"{r['median']:.4f}" if "median" in r else "-"
            lines.append(
                f"| {i} | {r['side']} {r['candidate']} | {r['schedule']} | {r['calls']} | {r[score]:.4f} | {median} |"
            )
    return lines


def file_of(name: str) -> str:
    return f"solvers_{name}.png"


def plot(name: str, cells: dict[Cell, list[Record]]) -> None:
    """Error of the best pairs against calls: core's and Quickstep's for every cfg."""
    series = []
    for cfg in sorted({cfg for _, cfg, _ in cells}):
        for i, side in ((1, CORE), (2, QUICKSTEP)):
            points = [(nfe, contest(rows)[i]) for (_, c, nfe), rows in cells.items() if c == cfg]
            points = [(nfe, r["held"]) for nfe, r in points if r is not None]
            if points and not name.endswith("samples"):
                series.append((f"{side}, cfg {cfg:g}", *zip(*points, strict=True)))
    if series:
        picture = line_plot(series, NAMES[name], "network calls", "error of the best pair", log_x=True, log_y=True)
        picture.save(RESULTS / file_of(name))
