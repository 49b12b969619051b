"""The report of ``accelerators.py``: ``results/accelerators.md``, ``accelerators_rows.md``, ``accelerators_cost.md``, two plots."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from statistics import mean, median

from _accelerators_curves import AS_FAST, SPEEDUPS, at, at_each, best, front, verdict
from _hardware import hardware
from quickstep.nodes.plot import line_plot

RESULTS = Path(__file__).resolve().parent / "results"
NAMES = {"unet": "Demo UNet (v-prediction)", "dit": "Demo DiT (flow matching)"}
PLAIN, EASY, LAZY = "plain", "core EasyCache", "core LazyCache"
BASELINES = {PLAIN: "fewer steps", EASY: "EasyCache", LAZY: "LazyCache"}
KINDS = ("uncached", "converged")
NOTHING = 0.98  # a share of work above this is doing nothing
SHOWN = 5  # lines of ours in a plot: with the three baselines as many as there are colours
Record = dict
Cell = tuple[str, ...]
"""Network, sampler, schedule, steps, pictures."""


def write(quality: dict[str, list[Record]], cost: dict[str, list[Record]]) -> None:
    """The pages and plots, from whatever has been measured."""
    RESULTS.mkdir(exist_ok=True)
    cells: dict[Cell, list[Record]] = defaultdict(list)
    for key, records in quality.items():
        cells[tuple(key.split("|")[:5])] += records
    if cells:
        (RESULTS / "accelerators.md").write_text("\n".join(summary(cells)) + "\n", encoding="utf-8")
        (RESULTS / "accelerators_rows.md").write_text("\n".join(rows(cells)) + "\n", encoding="utf-8")
    if cost:
        (RESULTS / "accelerators_cost.md").write_text("\n".join(costs(cost)) + "\n", encoding="utf-8")
    print(f"{RESULTS}/accelerators*.md, from {sum(map(len, [*quality.values(), *cost.values()]))} records")


# ---- one candidate in one cell -----------------------------------------------------------------------------------------


def baselines(records: list[Record], kind: str) -> dict[str, list[tuple[float, list[float]]]]:
    """For each baseline its curve of (share of work, errors per picture); core's thresholds as their front.

    Every curve ends in the plain run itself, whose work is 1.
    """
    plain = [(r["work"], r[kind]) for r in records if r["method"] == PLAIN and r["work"] < 1 + 1e-9]
    found = {PLAIN: plain}
    for name in (EASY, LAZY):
        tried = [(r["work"], r[kind]) for r in records if r["method"] == name and "failed" not in r]
        chosen = set(front((work, mean(errors)) for work, errors in tried))
        found[name] = [(w, e) for w, e in tried if w < NOTHING and (w, mean(e)) in chosen]
        found[name] += [p for p in plain if p[0] == 1.0] if found[name] else []
    return found


def ratio(errors: list[float], base: list[float] | None) -> float | None:
    """Geometric mean over the pictures of our error over the baseline's: one picture that went astray decides nothing."""
    if base is None:
        return None
    return math.exp(mean(math.log(max(e, 1e-6) / max(b, 1e-6)) for e, b in zip(errors, base, strict=True)))


def judge(r: Record, curves: dict[str, dict[str, list]]) -> dict:
    """Our error over each baseline's at the same work: ``{(baseline, kind): ratio}``."""
    return {(name, k): ratio(r[k], at_each(curves[k][name], r["work"])) for k in KINDS for name in BASELINES}


def idle(r: Record) -> bool:
    return r["work"] is None or r["work"] > NOTHING


def said(r: Record, ratios: dict) -> str:
    """Against fewer steps, and against the better of core's caches."""
    if r["work"] is None:
        return "work unknown"
    if idle(r):
        return "; ".join(["did nothing", *r["notes"]])
    words = {"better": "better than", "worse": "worse than", "equal": "equal to", "mixed": "mixed against"}
    steps = verdict(*(ratios[PLAIN, k] for k in KINDS))
    caches = [[x for x in (ratios[EASY, k], ratios[LAZY, k]) if x is not None] for k in KINDS]
    core = verdict(*(max(xs, default=None) for xs in caches))
    return ", ".join(f"{words[w]} {name}" for w, name in ((steps, "fewer steps"), (core, "core")) if w in words)


# ---- pages -------------------------------------------------------------------------------------------------------------


def summary(cells: dict[Cell, list[Record]]) -> list[str]:
    pictures = ", ".join(sorted({cell[4] for cell in cells}))
    lines = [
        "# Accelerators: quality against cost",
        "",
        f"Written by `make bench-accelerators` on {hardware()}; {pictures} per cell, CFG 4, from "
        f"{sum(map(len, cells.values()))} runs. Every run is in [accelerators_rows.md](accelerators_rows.md).",
        "",
        "*Error*: RMS difference of a picture relative to the reference's RMS; *uncached*: to the plain run of the same "
        "sampler and steps from the same noise, *converged*: to the solution of the ODE (200 calls). *Work*: share of the "
        "plain run's network work, counted, not timed. *Fewer steps, EasyCache, LazyCache*: our error over that of a "
        "baseline at the same work, geometric mean over pictures (uncached / converged); below 1 we are closer. The "
        "baselines: the plain model with fewer steps (interpolated between whole numbers), and the best thresholds of core's "
        "EasyCache (0.05 to 0.8) and LazyCache (0.02 to 0.4, otherwise at their defaults); - where they were never that fast.",
        "",
        "Small networks and 8 pictures: a few per cent mean nothing, and a ranking here is a hint for large models.",
    ]
    for network, title in NAMES.items():
        here = {cell: records for cell, records in cells.items() if cell[0] == network}
        if not here:
            continue
        lines += ["", f"## {title}", ""]
        lines += plots(network, here)
        lines += table_of_best(here)
        lines += overall(here)
    return lines


def plots(network: str, cells: dict[Cell, list[Record]]) -> list[str]:
    """The first sampler at 25 steps, or what there is: error to the converged solution and to the uncached run."""
    cell = min(cells, key=lambda c: (c[1] != "dpmpp_2m", abs(int(c[3]) - 25)))
    records, lines = cells[cell], []
    ours = defaultdict(list)
    for r in records:
        if "failed" not in r and not r["method"].startswith("core") and r["method"] != PLAIN and not idle(r):
            ours[r["method"]].append(r)
    kind = "uncached"
    curves = baselines(records, kind)
    series = [
        (
            f"{'core ' * (name != PLAIN)}{label}",
            *zip(*[(w, mean(e)) for w, e in sorted(curves[name]) if w < 1], strict=True),
        )
        for name, label in BASELINES.items()
        if len(curves[name]) > 1
    ]

    def strength(method: str) -> float:
        """How far below fewer steps the method's best point is."""
        points = [(r["work"], mean(r[kind])) for r in ours[method]]
        base = [(w, mean(e)) for w, e in curves[PLAIN]]
        return min(e / (at(base, w) or math.inf) for w, e in points)

    for method in sorted(ours, key=strength)[:SHOWN]:
        series.append((method, *zip(*front((r["work"], mean(r[kind])) for r in ours[method]), strict=True)))
    if len(series) > 1:
        title = f"{NAMES[network]}, {cell[1]} {cell[2]}, {cell[3]} steps"
        picture = line_plot(
            series, title, "share of the network's work", "relative error to the uncached run", log_y=True
        )
        name = f"accelerators_{network}.png"
        picture.save(RESULTS / name, optimize=True)
        lines += [f"![error against work]({name})", ""]
    return lines


def table_of_best(cells: dict[Cell, list[Record]]) -> list[str]:
    """Per cell and speed-up, for either kind of error."""
    lines = []
    for kind in KINDS:
        lines += [
            f"Closest to the {'uncached picture' if kind == KINDS[0] else 'converged solution'}, at least this fast:",
            "",
        ]
        lines += [
            "| sampler, steps | " + " | ".join(f"{s:g}x" for s in SPEEDUPS) + " |",
            "|---|" + "---|" * len(SPEEDUPS),
        ]
        for cell, records in cells.items():
            ours = {r["label"]: r for r in records if "failed" not in r and r["method"] != PLAIN and not idle(r)}
            curve = [(w, mean(e)) for w, e in baselines(records, kind)[PLAIN]]
            row = []
            for s in SPEEDUPS:
                label = best({k: (r["work"], mean(r[kind])) for k, r in ours.items()}, s)
                steps = at(curve, AS_FAST / s)
                fewer = f"fewer steps {steps:.3f}" if steps is not None else "fewer steps -"
                won = label is not None and (steps is None or mean(ours[label][kind]) < steps)
                shown = f"{label} {mean(ours[label][kind]):.3f}" if label is not None else "-"
                row.append(f"**{shown}** ({fewer})" if won else f"{fewer} ({shown})")
            lines.append(f"| {cell[1]} {cell[2]}, {cell[3]} | " + " | ".join(row) + " |")
        lines.append("")
    return lines


def overall(cells: dict[Cell, list[Record]]) -> list[str]:
    """One row per candidate, over all cells of the network, the best against fewer steps first."""
    ratios, records, failed = defaultdict(lambda: defaultdict(list)), defaultdict(list), defaultdict(set)
    for rows_here in cells.values():
        curves = {kind: baselines(rows_here, kind) for kind in KINDS}
        for r in rows_here:
            if "failed" in r:
                failed[r["failed"]].add(r["method"])
            elif r["method"] != PLAIN and not r["method"].startswith("core"):
                records[r["label"]].append(r)
                for key, value in {} if idle(r) else judge(r, curves).items():
                    if value is not None:
                        ratios[r["label"]][key].append(value)

    def middle(label: str, key) -> float | None:
        values = ratios[label][key]
        return math.exp(mean(map(math.log, values))) if values else None

    def both(label: str, name: str) -> str:
        return " / ".join("-" if (v := middle(label, (name, k))) is None else f"{v:.2f}" for k in KINDS)

    lines = [
        f"All candidates, over {len(cells)} cells (one per sampler and number of steps), the best against fewer steps first:",
        "",
        "| candidate | speed-up: work | network seconds | wall | uncached: mean, median | converged | fewer steps | EasyCache "
        "| LazyCache | verdict |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for label in sorted(records, key=lambda label: middle(label, (PLAIN, KINDS[0])) or math.inf):
        here = records[label]
        known = [r["work"] for r in here if r["work"] is not None]
        work = f"{1 / mean(known):.2f}" if known else "?"
        seconds = (f"{1 / median([v for r in here for v in r[unit]]):.2f}" for unit in ("network", "wall"))
        errors = f"{mean(mean(r['uncached']) for r in here):.4f}, {mean(median(r['uncached']) for r in here):.4f}"
        pooled = {(name, k): middle(label, (name, k)) for name in BASELINES for k in KINDS}
        typical = {**here[0], "work": mean(known) if known else None}
        lines.append(
            f"| {label} | {work} | {' | '.join(seconds)} | {errors} | {mean(mean(r[KINDS[1]]) for r in here):.4f} | "
            + " | ".join(both(label, name) for name in BASELINES)
            + f" | {said(typical, pooled)} |"
        )
    lines += ["", "Not run:", ""] if failed else []
    for why, methods in failed.items():
        reason = why.removeprefix("ValueError: ").partition(";")[0]
        lines.append(f"- {', '.join(sorted(methods))}: {reason}")
    return lines


def rows(cells: dict[Cell, list[Record]]) -> list[str]:
    lines = [
        "# Accelerators: every run",
        "",
        "What the columns mean is in [accelerators.md](accelerators.md). *At this work* and *at these seconds*: mean error of the "
        "baseline at the same cost, uncached / converged; *pictures*: in how many we are closer than fewer steps at the same work.",
    ]
    for cell, records in cells.items():
        curves = {kind: baselines(records, kind) for kind in KINDS}
        plain = next((mean(e) for w, e in curves["converged"][PLAIN] if w == 1.0), math.nan)
        lines += ["", f"## {NAMES[cell[0]]}, {cell[1]} {cell[2]}, {cell[3]} steps, {cell[4]}", ""]
        lines += [f"The plain run's own error to the converged solution: {plain:.4f}.", ""]
        lines += [
            "| candidate | full + partial + skipped | speed-up: work | network seconds | wall | cache MB "
            "| uncached: mean, median | converged: mean, median | fewer steps at this work | at these seconds | pictures "
            "| EasyCache | LazyCache | verdict |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
        ]
        for r in records:
            if r["method"] != PLAIN and "failed" not in r:
                lines.append(row(r, curves))
    return lines


def row(r: Record, curves: dict[str, dict[str, list]]) -> str:
    def means(name: str, cost: float | None) -> str:
        values = [at([(w, mean(e)) for w, e in curves[k][name]], cost or 1.0) for k in KINDS]
        return " / ".join("-" if v is None else f"{v:.4f}" for v in values)

    work, seconds, wall = r["work"], median(r["network"]), median(r["wall"])
    each = at_each(curves[KINDS[0]][PLAIN], work or 1.0)
    closer = "-" if each is None else f"{sum(a < b for a, b in zip(r[KINDS[0]], each, strict=True))} of {len(each)}"
    core = r["method"].startswith("core")
    cells = [
        r["label"],
        f"{r['full']} + {r['partial']} + {r['skipped']}",
        "?" if work is None else f"{1 / work:.2f}",
        f"{1 / seconds:.2f}" if seconds else "-",
        f"{1 / wall:.2f}",
        f"{r['cache'] / 2**20:.1f}",
        *(f"{mean(r[k]):.4f}, {median(r[k]):.4f}" for k in KINDS),
        means(PLAIN, work),
        means(PLAIN, seconds),
        closer,
        *(("", "") if core else (means(EASY, work), means(LAZY, work))),
        "" if core else said(r, judge(r, curves)),
    ]
    return "| " + " | ".join(cells) + " |"


# ---- cost --------------------------------------------------------------------------------------------------------------


def costs(cost: dict[str, list[Record]]) -> list[str]:
    lines = [
        "# Accelerators: cost on networks of real size",
        "",
        f"Written by `make bench-accelerators` on {hardware()}. Random weights: what adaptive methods skip here says nothing about "
        "pictures. *Counted*: share of the plain run's arithmetic, by torch's counter over a whole run; *reported*: by the "
        "accelerator itself. *Expected*: the speed-up that follows from what was counted. *Pass*: seconds of one network "
        "pass by the share of it that was computed (median).",
    ]
    loads: dict[str, list[Record]] = defaultdict(list)
    for key, records in cost.items():
        loads[key.rpartition("|")[0]] += records
    for load, records in loads.items():
        name, size, steps, cfg, dtype, device = load.split("|")
        plain = next((r for r in records if r["label"] == PLAIN), None)
        if plain is None:
            continue
        whole = [r["plain"] for r in records if "plain" in r]
        lines += ["", f"## {name}, latent {size} x {size}, {cfg}, {dtype}, {device}", ""]
        lines += [
            f"{plain['network']}; Euler, {steps}, {plain['flops'] / plain['calls'] / 1e9:.0f} GFLOP per plain call"
            + (f", {median(whole) / plain['calls']:.2f} s." if whole else "."),
            "",
            "| candidate | full + partial + skipped | work: counted | reported | speed-up: expected | network seconds | wall "
            "| cache MB | pass |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---|",
        ]
        for r in records:
            if r is plain:
                continue
            if "failed" in r:
                lines.append(f"| {r['label']} | {r['failed']} | | | | | | | |")
                continue
            reported = "?" if r["work"] is None else f"{100 * r['work']:.1f} %"
            seconds = [f"{1 / median(r[unit]):.2f}" for unit in ("network", "wall")]
            passes = ", ".join(
                f"{'?' if share is None else f'{100 * share:.0f} %'}: {s:.3f} s"
                for share, s, _ in sorted(r["pass"], key=lambda p: -(p[0] or 0))
            )
            lines.append(
                f"| {r['label']} | {r['full']} + {r['partial']} + {r['skipped']} | {100 * r['counted']:.1f} % "
                f"| {reported} | {1 / r['counted']:.2f} | {' | '.join(seconds)} | {r['cache'] / 2**20:.1f} | {passes} |"
            )
    return lines
