"""All benchmarks, or those named: ``make bench ARGS="orders overhead"``. Results go to ``benchmarks/results/<name>.md``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from _hardware import hardware

HERE = Path(__file__).resolve().parent
NAMES = ("orders", "overhead", "demo_table", "deepcache_sd15", "stitch")


def main() -> int:
    names = sys.argv[1:] or NAMES
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"Unknown benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}.", file=sys.stderr)
        return 2
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    for name in names:
        print(f"== {name}", flush=True)
        process = subprocess.Popen(
            [sys.executable, str(HERE / f"{name}.py")], stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        if process.wait():
            print(f"{name} failed; its old result was kept.", file=sys.stderr)
            return 1
        (results / f"{name}.md").write_text(f"# {name}\n\n{hardware()}\n\n{''.join(lines).strip()}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
