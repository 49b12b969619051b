"""Every shipped workflow in ComfyUI's real frontend: opened, compared, queued from the page. Screenshots in output/."""

import io
import json
import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from quickstep_under_test.demo import testbed
from quickstep_under_test.nodes import convert

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
SCREENSHOTS = ROOT / "output" / "screenshots"


def check(server, renderer: str, queue: bool) -> dict[str, dict]:
    """What check.mjs reports, by workflow name."""
    node, chromium, playwright = testbed.browser()
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    command = [node, HERE / "check.mjs", server.port, renderer, SCREENSHOTS, "queue" if queue else "look", *WORKFLOWS]
    environment = {**os.environ, "PLAYWRIGHT": str(playwright), "CHROMIUM": chromium}
    run = subprocess.run([str(c) for c in command], env=environment, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stderr[-3000:]
    return {report["name"]: report for report in map(json.loads, run.stdout.splitlines())}


@pytest.fixture(scope="module")
def classic(server):
    return check(server, "classic", queue=True)


@pytest.fixture(scope="module")
def nodes2(server, classic):
    return check(server, "nodes2", queue=False)


@pytest.fixture(params=["classic", "nodes2"])
def reports(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_opens_unchanged(reports, object_info, file):
    report, workflow = reports[file.stem], json.loads(file.read_text(encoding="utf-8"))
    assert report["missing"] == [] and report["faulty"] == [] and report["errors"] == []
    back = {node["id"]: node for node in report["back"]["nodes"]}
    assert back.keys() == {node["id"] for node in workflow["nodes"]}
    for node in workflow["nodes"]:
        assert (back[node["id"]].get("widgets_values") or []) == (node.get("widgets_values") or []), node["type"]
    ours = convert.to_api(workflow, object_info)
    theirs = {id: {"class_type": node["class_type"], "inputs": node["inputs"]} for id, node in report["prompt"].items()}
    assert theirs == ours


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_runs_from_the_page(classic, server, file):
    end, workflow = classic[file.stem]["end"], json.loads(file.read_text(encoding="utf-8"))
    assert not any("randomize" in (node.get("widgets_values") or []) for node in workflow["nodes"]), "seeds must stay"
    assert end["kind"] == "execution_success", end["message"]
    if any(node["type"] in ("SaveImage", "PreviewImage", "Quickstep_Compare") for node in workflow["nodes"]):
        assert end["shown"] and end["drawn"], "it ran, but no picture appeared"
    outputs = server.json(f"/history/{end['id']}")[end["id"]]["outputs"]
    prompt = classic[file.stem]["prompt"]
    shown = {id for id, node in prompt.items() if node["class_type"] in ("SaveImage", "PreviewImage", "PreviewAny")}
    assert shown and shown <= outputs.keys()
    for output in outputs.values():
        for image in output.get("images", []):
            picture = Image.open(io.BytesIO(server.image(image)))
            assert any(low != high for low, high in picture.convert("RGB").getextrema()), f"{image} is one flat colour"
