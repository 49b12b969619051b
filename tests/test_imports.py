"""The import rules of the house, and what importing the pack costs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMFYUI = {"comfy", "comfy_api", "comfy_api_nodes", "comfy_extras", "comfy_execution", "folder_paths", "execution",
           "server", "latent_preview", "node_helpers"}  # fmt: skip
OURS = {"solvers", "nodes", "demo", "tests"}
# nodes/ speaks ComfyUI; of the rest only what describes or trains the demo's networks may.
SPEAKS_COMFYUI = {"demo/networks.py", "demo/text.py", "demo/train.py", "demo/evaluate.py"}
SCRIPTS = {"demo/train.py", "demo/evaluate.py", "nodes/docs.py"}  # started by name, so some absolute imports
# sites: attach's hooks by level; stitch: runs of several models; calibrate: what looks into a run of the model.
TRANSLATORS = ("nodes/bridge.py", "nodes/attach.py", "nodes/sites/", "nodes/stitch", "nodes/calibrate_")
BUDGET = 2000  # calls of functions per node


def files(*folders: str) -> list[str]:
    found = [ROOT / "__init__.py"] if not folders else []
    for folder in folders or ("solvers", "nodes", "demo"):
        found += (ROOT / folder).rglob("*.py")
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def imports(file: str) -> list[tuple[int, int, str]]:
    """Every import in a file, wherever it stands: ``(line, level, dotted name)``; ``from . import x`` names x."""
    found = []
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, 0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(node.lineno, node.level, name) for name in names]
    return found


def top_level(file: str, level: int, name: str) -> str:
    """The folder of this repository that a relative import reaches, or an absolute import's first name."""
    if level == 0:
        return name.split(".")[0]
    package = Path(file).parent.parts
    assert level - 1 <= len(package), f"{file} imports from outside the repository"
    return [*package[: len(package) - level + 1], *name.split(".")][0]


@pytest.mark.parametrize("file", files("solvers"))
def test_solvers_know_neither_comfyui_nor_the_nodes(file):
    for line, level, name in imports(file):
        reached = top_level(file, level, name)
        assert reached not in COMFYUI | {"nodes", "demo"}, f"{file}:{line} imports {name}"


@pytest.mark.parametrize("file", [f for f in files("demo") if f not in SPEAKS_COMFYUI])
def test_the_rest_of_the_demo_knows_no_comfyui(file):
    for line, level, name in imports(file):
        assert top_level(file, level, name) not in COMFYUI, f"{file}:{line} imports {name}"


def test_translators_are_few():
    """Only these know ComfyUI's model and sampling classes *and* the solvers' vocabulary; other node files know the
    latter and ComfyUI's services."""
    vocabulary = {"comfy.model_sampling", "comfy.model_patcher", "comfy.patcher_extension", "comfy.k_diffusion"}
    for file in files("nodes"):
        names = imports(file)
        internals = {name for _, level, name in names if level == 0 and name in vocabulary}
        solvers = [name for _, level, name in names if top_level(file, level, name) == "solvers"]
        if internals and solvers:
            assert file.startswith(TRANSLATORS), f"{file} imports {internals} and {solvers}"


@pytest.mark.parametrize("file", files())
def test_imports_inside_the_repository_are_relative(file):
    """ComfyUI imports the pack under an arbitrary name, and its own ``nodes`` is another module."""
    if file in SCRIPTS:
        return
    for line, level, name in imports(file):
        assert level or name.split(".")[0] not in OURS, f"{file}:{line} imports {name} absolutely"


def test_the_root_imports_nothing_when_imported():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    assert not [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]


MEASURE = """
import asyncio, importlib.util, sys
sys.path.insert(0, {comfyui!r})
from comfy.cli_args import args
args.cpu = True
import comfy.samplers, comfy.sample, comfy.sd, comfy.utils, latent_preview, folder_paths, nodes, scipy.integrate
import comfy.ldm.modules.diffusionmodules.mmdit, PIL.ImageDraw, PIL.ImageFont
from comfy_api.latest import io
before, calls = set(sys.modules), 0
def count(frame, event, argument):
    global calls
    calls += event in ("call", "c_call")
spec = importlib.util.spec_from_file_location("pack", {root!r} + "/__init__.py", submodule_search_locations=[{root!r}])
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
sys.setprofile(count)
spec.loader.exec_module(pack)
extension = asyncio.run(pack.comfy_entrypoint())
classes = asyncio.run(extension.get_node_list())
for node in classes:
    node.GET_SCHEMA()
sys.setprofile(None)
print(sorted(name for name in set(sys.modules) - before if name.split(".")[0] != "pack"))
print(calls, len(classes))
"""


def test_import_stays_within_its_budget():
    """What ComfyUI pays for the pack beyond what it has imported already: no library, and few calls of functions.

    Calls, not seconds: they are the same on every machine (0.2 s on the one where there were 66,000).
    """
    comfyui = os.environ.get("COMFYUI_PATH")
    assert comfyui, "COMFYUI_PATH is not set; run this with `make test`."
    code = MEASURE.format(comfyui=comfyui, root=str(ROOT))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=comfyui)
    assert run.returncode == 0, run.stderr[-2000:]
    libraries, counts = run.stdout.splitlines()[-2:]
    calls, nodes = map(int, counts.split())
    assert nodes > 10
    assert libraries == "[]", f"importing the pack imports {libraries}"
    assert calls <= BUDGET * nodes, f"importing the pack makes {calls} calls for {nodes} nodes"
