"""``make demo``: the demo workflow through a real ComfyUI, the comparison picture and the table into ``output/``."""

from __future__ import annotations

import argparse
import sys
import time

from . import graphs
from .server import Server, stopping_politely
from .testbed import ROOT, Trouble, say

OUTPUT = ROOT / "output"
NETWORKS = ("unet", "unet_small", "dit")


class Bar:
    """Progress of one prompt on one line of a terminal; on a pipe a line per quarter."""

    def __init__(self):
        self.last = None

    def __call__(self, node: str, done: int, total: int) -> None:
        share = done / max(total, 1)
        if sys.stderr.isatty():
            print(
                f"\r  [{'#' * int(40 * share):40}] {done}/{total} ", end="" if done < total else "\n", file=sys.stderr
            )
        elif (node, int(4 * share)) != self.last:
            say(f"  {done} of {total} steps")
        self.last = (node, int(4 * share))


def main() -> None:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="unet")
    parser.add_argument("--prompt", default=graphs.PROMPT)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()

    began = time.monotonic()
    say("starting ComfyUI")
    with Server() as server:
        say(f"ComfyUI is up after {time.monotonic() - began:.0f} s; sampling '{given.prompt}' with {given.network}")
        graph = graphs.demo(given.network, given.prompt, given.seed)
        outputs = server.run(graph.filled(server.object_info()), Bar())
        name = "demo" if given.network == "unet" else f"demo_{given.network}"
        OUTPUT.mkdir(exist_ok=True)
        for node, suffix in ((graphs.PICTURES, ""), (graphs.PLOT, "_plot")):
            if not outputs.get(node, {}).get("images"):
                raise Trouble(f"the workflow ran, but node {node} left no picture.")
            (OUTPUT / f"{name}{suffix}.png").write_bytes(server.image(outputs[node]["images"][0]))
        table = outputs[graphs.TABLE]["text"][0]
    (OUTPUT / f"{name}.md").write_text(table + "\n")
    print(table)
    say(f"pictures: output/{name}.png, plot: output/{name}_plot.png; {time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    sys.exit(stopping_politely(main))
