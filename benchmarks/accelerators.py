"""What accelerators save and what they cost in quality: ``make bench-accelerators``.

    python benchmarks/accelerators.py                   parts quality and cost where something is missing, then the reports (hours)
    python benchmarks/accelerators.py --quick           one number of steps, one repeat; SD 1.5 only (tens of minutes)
    python benchmarks/accelerators.py quality --only StepForecast DeepCache      these candidates (and the baselines)
    python benchmarks/accelerators.py cost --models sdxl --size 128 --dtype bfloat16      1024 px, on a GPU
    python benchmarks/accelerators.py report            the reports alone, from what was measured

*quality*: demo UNet and DiT, error to the uncached run and to the converged solution against work and seconds, beside the
plain model with fewer steps and core's EasyCache and LazyCache. *cost*: SD 1.5, SDXL, SD3 in their real sizes with random
weights: arithmetic, seconds, memory. The candidates are the table in ``_accelerators_candidates.py``.

Results are JSON lines in ``output/accelerators/``, written as they come; what is there is not measured again
(``--redo WORD`` forgets the candidates whose label contains the word). On the CPU one thread is used unless ``--threads``.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from _pack import import_comfy, import_pack

import_comfy()
import_pack()
import torch  # noqa: E402

OUTPUT = Path(__file__).resolve().parent.parent / "output" / "accelerators"
PARTS = ("quality", "cost", "report")
Todo = tuple[str, Callable[[], Iterable[dict]]]
"""A key, and what measures the records that belong under it."""


def load(part: str) -> dict[str, list[dict]]:
    """The records by key, in the order they were measured."""
    file, found = OUTPUT / f"{part}.jsonl", {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        record = json.loads(line)
        found.setdefault(record["key"], []).append(record)
    return found


def forget(part: str, words: list[str]) -> None:
    if not (OUTPUT / f"{part}.jsonl").exists():
        return
    kept = [r for rows in load(part).values() for r in rows if not any(w.lower() in r["label"].lower() for w in words)]
    (OUTPUT / f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")


def run(part: str, todo: Iterable[Todo]) -> None:
    """Measure what is missing; every result is written at once."""
    done = load(part)
    missing = [(key, make) for key, make in todo if key not in done]
    print(f"{part}: {len(missing)} to measure", flush=True)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    began = time.time()
    with (OUTPUT / f"{part}.jsonl").open("a", encoding="utf-8") as file:
        for i, (key, make) in enumerate(missing, 1):
            for record in make():
                file.write(json.dumps({"key": key, **record}) + "\n")
                if "failed" in record:
                    print(f"{key}: {record['failed']}", flush=True)
            file.flush()
            left = (time.time() - began) / i * (len(missing) - i)
            print(f"{i}/{len(missing)} {key}, about {left / 60:.0f} minutes left", flush=True)


def quality(options) -> list[Todo]:
    import _accelerators_quality as part

    candidates, refused = part.wanted(options)
    for label, why in refused.items():
        print(f"left out, {label}: {why}", flush=True)
    todo: list[Todo] = []
    for cell in part.cells(options):
        todo.append((f"{cell.name}|plain", lambda cell=cell: part.curve(cell)))
        for label, what in candidates:
            if not part.applies(cell, label):
                continue
            make = lambda cell=cell, label=label, what=what: [part.contest(cell, label, what, options.repeats)]  # noqa: E731
            todo.append((f"{cell.name}|{label}", make))
    return todo


def cost(options) -> list[Todo]:
    import _accelerators_cost as part

    return part.todo(options)


def arguments():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="candidates whose label contains it")
    parser.add_argument(
        "--redo", nargs="*", default=[], metavar="WORD", help="forget candidates whose label contains it"
    )
    parser.add_argument("--repeats", type=int, help="timed runs per candidate; 3, or 1 with --quick")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--networks", nargs="*", default=["unet", "dit"], help="quality: demo networks")
    parser.add_argument("--pictures", type=int, default=8, help="quality: per cell, in one batch")
    parser.add_argument("--models", nargs="*", default=None, help="cost: sd15, sdxl, sd3; --quick: sd15")
    parser.add_argument(
        "--size", type=int, default=None, help="cost: latent height and width; 64 is 512 px, 128 is 1024 px"
    )
    parser.add_argument("--steps", type=int, default=10, help="cost")
    parser.add_argument(
        "--cfg", type=float, default=4.0, help="cost: 1 makes one network row per picture, more makes two"
    )
    parser.add_argument(
        "--dtype", default=None, help="cost: float32, bfloat16, float16; bfloat16 on a GPU, else float32"
    )
    options = parser.parse_args()
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    options.parts = options.parts or list(PARTS)
    options.repeats = options.repeats or (1 if options.quick else 3)
    return options


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    logging.getLogger().setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    for part, make in (("quality", quality), ("cost", cost)):
        if options.redo:
            forget(part, options.redo)
        if part in options.parts:
            run(part, make(options))
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # demo/ is before it, and has a run.py as well
    from _accelerators_report import write

    write(load("quality"), load("cost"))


if __name__ == "__main__":
    main()
