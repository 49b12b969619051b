"""The page of ``calibrated.py``."""

from __future__ import annotations

from itertools import groupby

from _hardware import hardware

INTRO = """Mean RMS distance to the converged result on 16 captions and noise that no calibration has seen; in brackets the share of
pictures with the right colour and shape. *core*, *Quickstep*: the best of the usual pairs on this very report. Every calibration
ran as its node does, on 8 captions with 24 seeds for the fit, 24 to select, 12 to report."""


def written(records: list[dict]) -> str:
    parts = ["# Calibrated on the model", hardware(), INTRO, _table(records), "## Costs", _costs(records)]
    moved = [r for r in records if r["side"] == "found at another CFG"]
    if moved:
        parts += ["## Used at another CFG", _moved(records, moved)]
    return "\n\n".join(parts) + "\n"


def cell(record: dict) -> tuple:
    return record["network"], record["cfg"], record["steps"]


def _rows(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _said(record: dict | None) -> str:
    return "" if record is None else f"{record['mean']:.4f} ({record['right']:.0%})"


def _best(records: list[dict], side: str) -> dict | None:
    return min((r for r in records if r["side"] == side), key=lambda r: r["mean"], default=None)


def _table(records: list[dict]) -> str:
    found = list(dict.fromkeys(r["what"] for r in records if r["side"] == "calibrated"))
    rows = [["network", "CFG", "calls", "core", "core's tables", "Quickstep", *found, "best calibrated / core"]]
    rows.append(["---"] * len(rows[0]))
    for key, group in groupby(sorted(records, key=cell), cell):
        here = list(group)
        core, best = _best(here, "core"), _best(here, "calibrated")
        if core is None or best is None:
            continue
        named = {r["what"]: r for r in here if r["side"] == "calibrated"}
        usual = [_best(here, side) for side in ("core", "core's table", "Quickstep")]
        cells = [f"{_said(r)} {r['what']}" if r else "" for r in usual]
        ratio = f"{best['mean'] / core['mean']:.2f}"
        rows.append([key[0], f"{key[1]:g}", str(key[2]), *cells, *(_said(named.get(name)) for name in found), ratio])
    return _rows(rows)


def _costs(records: list[dict]) -> str:
    rows = [["calibration", "network", "CFG", "calls", "network calls spent (samples)", "seconds"], ["---"] * 6]
    for r in sorted((r for r in records if r["side"] == "calibrated"), key=lambda r: (r["what"], cell(r))):
        rows.append([r["what"], r["network"], f"{r['cfg']:g}", str(r["steps"]), str(r["spent"]), str(r["seconds"])])
    return _rows(rows)


def _moved(records: list[dict], moved: list[dict]) -> str:
    rows = [["calibration", "network", "calls", "used at CFG", "error", "best usual pair of core there"], ["---"] * 6]
    for r in sorted(moved, key=lambda r: (r["what"], cell(r))):
        core = _best([o for o in records if cell(o) == cell(r)], "core")
        rows.append(
            [r["what"], r["network"], str(r["steps"]), f"{r['cfg']:g}", _said(r), _said(core) or "not measured"]
        )
    return _rows(rows)
