"""Every shipped workflow through the real server, and what the server shows of the pack."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from quickstep_under_test.demo import graphs
from quickstep_under_test.demo.testbed import Trouble
from quickstep_under_test.nodes import convert

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


def test_there_are_workflows():
    assert WORKFLOWS


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_workflow_runs(server, object_info, file):
    workflow = json.loads(file.read_text(encoding="utf-8"))
    assert not any("randomize" in (node.get("widgets_values") or []) for node in workflow["nodes"]), "seeds must stay"
    prompt = convert.to_api(workflow, object_info)
    outputs = server.run(prompt)
    shown = {id for id, node in prompt.items() if node["class_type"] in ("SaveImage", "PreviewImage", "PreviewAny")}
    assert shown and shown <= outputs.keys()
    for output in outputs.values():
        for image in output.get("images", []):
            picture = Image.open(io.BytesIO(server.image(image)))
            assert any(low != high for low, high in picture.convert("RGB").getextrema()), f"{image} is one flat colour"


@pytest.mark.smoke
@pytest.mark.parametrize("network", ["unet", "dit"])
def test_demo(server, object_info, network):
    """The demo's graph, small: pictures, plot and the table with a row per candidate."""
    graph = graphs.demo(network, batch=1, reference_steps=8).filled(object_info)
    seen = []
    outputs = server.run(graph, lambda node, done, total: seen.append((done, total)))
    assert outputs[graphs.PICTURES]["images"] and outputs[graphs.PLOT]["images"]
    table = outputs[graphs.TABLE]["text"][0]
    assert "dpmpp_2m" in table and "Quickstep" in table and "reference" in table
    assert ("DeepCache" in table) == (network == "unet")
    assert seen


@pytest.mark.smoke
def test_plain_ksampler(server, object_info):
    """The demo model in ComfyUI's standard graph, with an accelerator."""
    outputs = server.run(graphs.plain("unet", steps=4).filled(object_info))
    assert outputs[graphs.PICTURES]["images"]


def test_templates_and_help_are_served(server):
    templates = server.json("/workflow_templates")
    assert {file.stem for file in WORKFLOWS} <= set(templates.get("quickstep", []))
    for page in sorted((ROOT / "web" / "docs").glob("*.md")):
        assert server.get(f"/extensions/quickstep/docs/{page.name}") == page.read_bytes()


def test_a_refused_prompt_says_why(server, object_info):
    graph = graphs.plain("unet", steps=4).filled(object_info)
    next(node for node in graph.values() if node["class_type"] == "KSampler")["inputs"]["steps"] = -1
    with pytest.raises(Trouble, match=r"KSampler.*smaller than min.*steps"):
        server.run(graph)
