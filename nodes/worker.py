"""A worker: runs trials of a study that a Search Solver node leads, in a ComfyUI without interface.

    cd ComfyUI
    python -m custom_nodes.quickstep.nodes.worker --storage URL --study NAME --workflow FILE [-- ComfyUI's own options]

Loads the workflow, of either of ComfyUI's two JSON formats, executes what its Search Solver node needs, and that node as a
worker. The study must be of the same model, prompts and settings: anything else is refused in one sentence. Ends when the study
has its trials or the node's minutes are over; SIGTERM and Ctrl-C end it sooner, and put the trial that runs in the queue again.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from .convert import to_api

NODE = "Quickstep_SearchSolver"


def main(given: list[str] | None = None) -> int:
    """Returns 0 when its work is done, also when it was asked to stop, and 1 after saying what is wrong."""
    given = sys.argv[1:] if given is None else given
    own, theirs = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    asked = _parser().parse_args(own)
    try:
        workflow = json.loads(Path(asked.workflow).read_text(encoding="utf-8"))
        comfyui = _comfyui(asked.comfyui)
    except (OSError, ValueError) as error:
        return _trouble(f"{error}")
    temporary = tempfile.mkdtemp(prefix="quickstep-worker-")
    try:
        server, loop = _started(comfyui, [*theirs, *_apart(theirs, temporary)])
        try:
            prompt, node = _prompt(workflow, asked.storage, asked.study)
        except ValueError as error:
            return _trouble(f"{asked.workflow}: {error}")
        return loop.run_until_complete(_run(server, prompt, node))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="worker", description="Runs trials of a Search Solver study.")
    parser.add_argument(
        "--storage", required=True, help="URL of the study's database: postgresql://user@host/name, sqlite:///file"
    )
    parser.add_argument("--study", required=True, help="name of the study")
    parser.add_argument("--workflow", required=True, help="JSON file of the workflow with the Search Solver node")
    parser.add_argument("--comfyui", help="folder of ComfyUI; the one that this pack is in, if not given")
    return parser


def _comfyui(given: str | None) -> Path:
    """Its folder."""
    here = Path(__file__)
    found = (
        Path(given)
        if given
        else next((p for p in (Path.cwd(), *here.parents) if (p / "main.py").is_file()), Path.cwd())
    )
    if not (found / "comfy" / "samplers.py").is_file():
        raise ValueError(f"{found} is no ComfyUI folder; say where it is with --comfyui.")
    return found.absolute()


def _apart(theirs: list[str], temporary: str) -> list[str]:
    """Options with which it disturbs no ComfyUI that runs from the same folders."""
    own = {"--temp-directory": temporary, "--database-url": "sqlite:///:memory:"}
    return [part for option, value in own.items() if option not in theirs for part in (option, value)]


def _started(comfyui: Path, options: list[str]) -> tuple[Any, asyncio.AbstractEventLoop]:
    """ComfyUI as its own main.py starts it, all custom nodes included, but for the listening port."""
    sys.path[:] = [str(comfyui), *(p for p in sys.path if p not in ("", str(comfyui), str(Path(__file__).parent)))]
    sys.argv = [str(comfyui / "main.py"), *options]
    os.chdir(comfyui)
    loop, server, _ = importlib.import_module("main").start_comfyui()
    return server, loop


def _prompt(workflow: dict, storage: str, study: str) -> tuple[dict, str]:
    """The workflow as ComfyUI executes it, its search node being a worker, and that node."""
    if "nodes" in workflow:
        classes = importlib.import_module("nodes").NODE_CLASS_MAPPINGS
        known = {node["type"] for node in workflow["nodes"]} & classes.keys()
        workflow = to_api(workflow, {kind: {"input": classes[kind].INPUT_TYPES()} for kind in known})
    found = [key for key, node in workflow.items() if isinstance(node, dict) and node.get("class_type") == NODE]
    if len(found) != 1:
        raise ValueError(f"it has {len(found)} Search Solver nodes, and a worker needs one.")
    workflow[found[0]]["inputs"] |= {"storage": storage, "study": study, "role": "worker"}
    return workflow, found[0]


async def _run(server: Any, prompt: dict, node: str) -> int:
    """Executes it, as if it had come through the interface."""
    execution, management = map(importlib.import_module, ("execution", "comfy.model_management"))
    number = uuid.uuid4().hex
    valid, error, *_, problems = await execution.validate_prompt(number, prompt, [node])
    if not valid:
        each = [f"{p['class_type']}: {e['message']} ({e['details']})" for p in problems.values() for e in p["errors"]]
        return _trouble("; ".join(each) or error["message"])
    stopped = []

    def stop(*_) -> None:
        stopped.append(True)
        management.interrupt_current_processing()

    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, stop)
    publishing = asyncio.ensure_future(server.publish_loop())
    server.prompt_queue.put((0, number, prompt, {}, [node], {}))
    while number not in server.prompt_queue.get_history():
        await asyncio.sleep(0.1)
        if stopped:  # also where no node had begun
            management.interrupt_current_processing()
    publishing.cancel()
    status = server.prompt_queue.get_history()[number]["status"]
    failed = [said for kind, said in status["messages"] if kind == "execution_error"]
    if failed and not stopped:
        return _trouble(failed[0]["exception_message"].strip())
    print("worker: stopped." if stopped else "worker: the study is done.", flush=True)
    return 0


def _trouble(words: str) -> int:
    print(f"worker: {words}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
