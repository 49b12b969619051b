"""The demo's graphs through the real server, and what the server shows of the pack. Shipped workflows run in tests/browser."""

from pathlib import Path

import pytest
from quickstep_under_test.demo import graphs
from quickstep_under_test.demo.testbed import Trouble

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))


def test_there_are_workflows():
    assert WORKFLOWS


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
