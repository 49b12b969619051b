"""The page of ``calibrated.py``."""

from __future__ import annotations

from itertools import groupby

from _hardware import hardware

INTRO = """RMS distance to the converged result on captions and noise that no calibration has seen: mean, geometric mean over
samples, and in brackets the share of pictures with the right colour and shape. One sample that ends in another picture than the
reference has an error of about 0.8, so with 48 samples it adds 0.017 to a mean: the geometric mean says how near all others come.
*core*, *Quickstep*: the best of the usual pairs on this very report, for the DiT also after core's node ModelSamplingSD3 at its
default shift of 3, which this DiT does not have by itself; *core's tables*: ComfyUI's AlignYourSteps, GITS and OptimalSteps nodes
with dpmpp_2m, euler or uni_pc_bh2. Shown is the best by the mean. The last two columns divide by the best of core, its tables
included, by the mean and by the geometric mean each for itself, so they favour core. *HB* is the node Momentum, *DPMSolverV3*
DPM-Solver-v3 without statistics; *weights and sigmas alone*: Fit Solver without ``rescale`` and ``decouple``. Every calibration
ran as its node does, ``loss`` = log, on 32 captions with 32 seeds for the fit, 32 to select, 16 to report; those of *weights and
sigmas alone* and *Curvature* are older, on 8 captions, and began from fewer schedules, which also holds for Fit Solver on the
UNet."""

KEYS = ("mean", "geometric")
CORES = ("core", "core's table")


def written(records: list[dict]) -> str:
    parts = ["# Calibrated on the model", hardware(), INTRO, _table(records)]
    if none := [
        f"{r['what']} for {r['network']}, {r['steps']} calls" for r in records if "Nothing better" in r.get("said", "")
    ]:
        parts.append(f"Found nothing better than the start, which is what the table shows: {'; '.join(none)}.")
    parts += ["## Costs", _costs(records)]
    moved = [r for r in records if r["side"] == "found for another"]
    if moved:
        parts += ["## What was found for 8 calls and CFG 4, used elsewhere", MOVED, _moved(records, moved)]
    return "\n\n".join(parts) + "\n"


MOVED = """On 16 pictures. A fitted solver is adapted to other numbers of steps on the usual schedule (``elsewhere`` = adapt); a
measured schedule is computed anew for them."""


def cell(record: dict) -> tuple:
    return record["network"], record["cfg"], record["steps"], record["size"], record["pictures"]


def _rows(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _said(record: dict | None) -> str:
    return "" if record is None else f"{record['mean']:.4f}, {record['geometric']:.4f} ({record['right']:.0%})"


def _best(records: list[dict], side: str, by: str = "mean") -> dict | None:
    return min((r for r in records if r["side"] == side), key=lambda r: r[by], default=None)


def _table(records: list[dict]) -> str:
    found = list(dict.fromkeys(r["what"] for r in records if r["side"] == "calibrated"))
    head = ["network", "CFG", "calls", "core", "core's tables", "Quickstep", *found]
    rows = [[*head, "best calibrated / best of core and its tables: mean", "geometric"]]
    rows.append(["---"] * len(rows[0]))
    for key, group in groupby(sorted(records, key=cell), cell):
        here = list(group)
        if not any(r["side"] == "calibrated" for r in here) or _best(here, "core") is None:
            continue
        named = {r["what"]: r for r in here if r["side"] == "calibrated"}
        usual = [_best(here, side) for side in ("core", "core's table", "Quickstep")]
        cells = [f"{_said(r)} {r['what']}" if r else "" for r in usual]
        best = [[min(r[by] for r in here if r["side"] in sides) for by in KEYS] for sides in (("calibrated",), CORES)]
        ratios = [f"{a / b:.2f}" for a, b in zip(*best, strict=True)]
        rows.append([key[0], f"{key[1]:g}", str(key[2]), *cells, *(_said(named.get(name)) for name in found), *ratios])
    return _rows(rows)


def _costs(records: list[dict]) -> str:
    rows = [["calibration", "network", "CFG", "calls", "network calls spent (samples)", "seconds"], ["---"] * 6]
    for r in sorted((r for r in records if r["side"] == "calibrated"), key=lambda r: (r["what"], cell(r))):
        rows.append(
            [
                r["what"],
                r["network"],
                f"{r['cfg']:g}",
                str(r["steps"]),
                str(r["spent"]),
                str(r["seconds"]).replace("not kept", "not recorded"),
            ]
        )
    return _rows(rows)


def _moved(records: list[dict], moved: list[dict]) -> str:
    rows = [
        ["calibration", "network", "used at", "error", "core's best there by mean", "by geometric mean"],
        ["---"] * 6,
    ]
    for r in sorted(moved, key=lambda r: (r["what"], cell(r))):
        there = [o for o in records if cell(o) == cell(r)]
        cores = [_said(_best(there, "core", by)) or "not measured" for by in KEYS]
        at = f"{r['steps']} calls, CFG {r['cfg']:g}, {r['size']} x {r['size']}"
        rows.append([r["what"].split(",")[0], r["network"], at, _said(r), *cores])
    return _rows(rows)
