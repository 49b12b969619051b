"""Error against network calls of every sampler with every schedule, core's and Quickstep's: ``make bench-solvers``.

    python benchmarks/solvers.py                 what is missing of everything, then the report (hours)
    python benchmarks/solvers.py --quick         exact problems only, three budgets, cfg 4, no stochastic samplers (minutes)
    python benchmarks/solvers.py --only dit      problems whose name contains the word; several are possible
    python benchmarks/solvers.py --report        the report alone, from what was measured

Results are JSON lines in ``output/solvers.jsonl``, written as they come; what is there is not measured again (delete the
file, or its lines, after a solver was changed: ``--redo WORD`` forgets the candidates whose label contains the word).

A cell is (problem, cfg, budget of network calls). A candidate takes the most steps whose calls fit the budget. On the
exact problems every sampler meets every schedule. A network is expensive, so there all pairs are first tried on 4 other
pictures with budgets of 8 and 16 calls at cfg 4; the ``--keep`` best pairs, and every method in its best pair, go on.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

from _pack import import_comfy, import_pack

import_comfy()
import_pack()
import torch  # noqa: E402
from _candidates import samplers, schedules, stochastic, within  # noqa: E402
from _problems import OUTPUT, problem  # noqa: E402

RESULTS = OUTPUT / "solvers.jsonl"
ORACLES, NETWORKS = ("ve", "flow"), ("unet", "unet_small", "dit")
BUDGETS, SCALES = (8, 5, 10, 6, 15, 20, 4, 12, 30), (4.0, 1.0, 7.5)  # in this order: a run may be stopped at any time
SAMPLE_BUDGETS, SCREENING_BUDGETS, SCREENING_SCALE = (8, 15, 30), (8, 16), 4.0


@dataclass(frozen=True)
class Cell:
    """One thing to measure, and where its result goes."""

    problem: str
    cfg: float
    nfe: int
    candidate: str
    schedule: str
    pictures: int

    @property
    def key(self) -> str:
        pictures = f"{self.pictures} pictures" if self.problem in NETWORKS else ""
        return "|".join((self.problem, f"{self.cfg:g}", str(self.nfe), self.candidate, self.schedule, pictures))


def measure(cell: Cell) -> dict:
    """The record of a cell. What cannot be run says why under ``failed``."""
    here, candidate = problem(cell.problem, cell.pictures), samplers()[cell.candidate]
    record = {"key": cell.key, "problem": cell.problem, "cfg": cell.cfg, "nfe": cell.nfe}
    record |= {"candidate": cell.candidate, "side": candidate.side, "schedule": cell.schedule}
    record |= {"stochastic": stochastic(cell.candidate), "another_target": candidate.another_target}
    began = time.perf_counter()
    try:
        sigmas = within(candidate, cell.schedule, schedules_of(cell.problem)[cell.schedule], cell.nfe)
        if sigmas is None:
            return record | {"failed": "no number of steps fits"}
        made, calls = here.run(candidate.make(), sigmas, cell.cfg, seed=7)
        record |= {"steps": len(sigmas) - 1, "calls": calls, "seconds": round(time.perf_counter() - began, 3)}
        if not made.isfinite().all():
            return record | {"failed": "not finite"}
        return record | {key: float(f"{value:.5g}") for key, value in here.score(made, cell.cfg).items()}
    except (ValueError, RuntimeError, IndexError, ZeroDivisionError, UnboundLocalError) as error:
        return record | {"failed": f"{type(error).__name__}: {error}"[:200]}


def schedules_of(name: str, cache: dict = {}) -> dict:  # noqa: B006 - the schedules of a problem do not change
    if name not in cache:
        cache[name] = schedules(problem(name).sampling)
    return cache[name]


def pairs(name: str) -> list[tuple[str, str]]:
    """Every sampler with every schedule; those that choose their own steps with one."""
    return [(c, s) for c in samplers() for s in schedules_of(name) if not samplers()[c].adaptive or s == "karras"]


def oracle_cells(options) -> Iterator[Cell]:
    budgets, scales = ((5, 10, 20), (4.0,)) if options.quick else (options.nfe, options.cfg)
    for nfe in budgets:
        for cfg in scales:
            for name in ORACLES:
                for c, s in pairs(name):
                    if not stochastic(c) and not samplers()[c].another_target:
                        yield Cell(name, cfg, nfe, c, s, 0)
    for nfe in () if options.quick or options.no_samples else SAMPLE_BUDGETS:
        for name in ORACLES:
            for c, s in pairs(name):
                yield Cell(f"{name} samples", 1.0, nfe, c, s, 0)


def likely(name: str, share: float, records: dict[str, dict]) -> set[tuple[str, str]]:
    """The pairs that were best, in this share, on the exact problem of the same kind at the screening's scale."""
    kind, budget = "flow" if name == "dit" else "ve", SCREENING_BUDGETS[0]
    rows = [r for r in records.values() if r["problem"] == kind and r["nfe"] == budget and r["cfg"] == SCREENING_SCALE]
    best = sorted((r for r in rows if "mean" in r), key=lambda r: r["mean"])
    return {(r["candidate"], r["schedule"]) for r in best[: math.ceil(share * len(best))]}


def screening_cells(options, records: dict[str, dict]) -> Iterator[Cell]:
    for nfe in sorted({SCREENING_BUDGETS[nfe > 10] for nfe in options.nfe}):
        for name in NETWORKS:
            chosen = pairs(name) if options.share >= 1.0 else likely(name, options.share, records)
            for c, s in (pair for pair in pairs(name) if pair in chosen):
                if not stochastic(c) and not samplers()[c].another_target:
                    yield Cell(f"{name} screening", SCREENING_SCALE, nfe, c, s, 4)


def network_cells(options, records: dict[str, dict]) -> Iterator[Cell]:
    """What the screening left, and the stochastic methods, which it cannot judge, in their best pair on a mixture."""
    for nfe in options.nfe:
        for cfg in options.cfg:
            for name in NETWORKS:
                for c, s in finalists(name, nfe, records, options.keep):
                    yield Cell(name, cfg, nfe, c, s, options.pictures)


def finalists(name: str, nfe: int, records: dict[str, dict], keep: int) -> list[tuple[str, str]]:
    screened = SCREENING_BUDGETS[nfe > 10]
    kind = "flow" if name == "dit" else "ve"
    sampled = min(SAMPLE_BUDGETS, key=lambda n: abs(n - nfe))

    def ranked(where: str, budget: int, score: str) -> list[tuple[str, str]]:
        rows = [r for r in records.values() if r["problem"] == where and r["nfe"] == budget and score in r]
        rows = [r for r in rows if r["calls"] <= budget]
        return [(r["candidate"], r["schedule"]) for r in sorted(rows, key=lambda r: r[score])]

    best = ranked(f"{name} screening", screened, "mean")
    noisy = [pair for pair in ranked(f"{kind} samples", sampled, "energy") if stochastic(pair[0])]
    first = {(samplers()[c].method, stochastic(c)): (c, s) for c, s in reversed([*best, *noisy])}
    chosen = [*best[:keep], *(pair for pair in first.values() if pair[1] in schedules_of(name))]
    return list(dict.fromkeys(chosen)) if best else []


def load() -> dict[str, dict]:
    if not RESULTS.exists():
        return {}
    lines = RESULTS.read_text(encoding="utf-8").splitlines()
    return {record["key"]: record for record in map(json.loads, lines)}


def quiet() -> None:
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.ERROR)
    import warnings

    warnings.simplefilter("ignore")  # torchsde's and core's, thousands of them


def several(cells: list[Cell]) -> list[dict]:
    return [measure(cell) for cell in cells]


def run(cells: Iterable[Cell], options, records: dict[str, dict]) -> None:
    """Measure what is missing, in several processes; every result is written at once."""
    wanted = [cell for cell in cells if not options.only or any(word in cell.problem for word in options.only)]
    missing = [cell for cell in wanted if cell.key not in records]
    if not missing:
        return
    print(f"{len(missing)} of {len(wanted)} cells to measure", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    # Small problems in lumps, or handing them over would cost more than they do.
    size = 40 if missing[0].pictures == 0 else 1
    lumps = [missing[i : i + size] for i in range(0, len(missing), size)]
    began, done = time.time(), 0
    pool = ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn"), initializer=quiet)
    with pool, RESULTS.open("a", encoding="utf-8") as file:
        for future in as_completed([pool.submit(several, lump) for lump in lumps]):
            for record in future.result():
                records[record["key"]] = record
                file.write(json.dumps(record) + "\n")
                done += 1
            file.flush()
            left = (time.time() - began) / done * (len(missing) - done)
            print(f"\r{done}/{len(missing)}, about {left / 60:.0f} minutes left  ", end="", flush=True)
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="exact problems only, few budgets")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="problems whose name contains it")
    parser.add_argument(
        "--redo", nargs="*", default=[], metavar="WORD", help="forget candidates whose label contains it"
    )
    parser.add_argument("--nfe", type=int, nargs="*", default=list(BUDGETS), help="budgets of network calls")
    parser.add_argument("--cfg", type=float, nargs="*", default=list(SCALES))
    parser.add_argument("--pictures", type=int, default=16, help="per network and cell")
    parser.add_argument("--no-samples", action="store_true", help="leave the distributions of stochastic methods out")
    parser.add_argument(
        "--share", type=float, default=1.0, help="screen only this share of the pairs, the best on the exact problems"
    )
    parser.add_argument("--keep", type=int, default=24, help="pairs that go on from the screening")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    quiet()
    records = load()
    if options.redo:
        records = {k: r for k, r in records.items() if not any(word in r["candidate"] for word in options.redo)}
        RESULTS.write_text("".join(json.dumps(r) + "\n" for r in records.values()), encoding="utf-8")
    if not options.report:
        run(oracle_cells(options), options, records)
        if not options.quick:
            run(screening_cells(options, records), options, records)
            run(network_cells(options, records), options, records)
    from _solvers_report import write

    write(records, options.pictures)


if __name__ == "__main__":
    main()
