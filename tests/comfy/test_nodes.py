"""What every node promises: a schema ComfyUI accepts, help for every input, a help page that is up to date."""

import asyncio

import pytest
from quickstep_under_test.nodes import docs
from quickstep_under_test.nodes.entry import MODULES, QuickstepExtension

NODES = [node for module in MODULES for node in module.NODES]


def name(node):
    return node.__name__


@pytest.mark.smoke
def test_the_extension_lists_every_node_once():
    listed = asyncio.run(QuickstepExtension().get_node_list())
    ids = [node.GET_SCHEMA().node_id for node in listed]
    assert listed == NODES
    assert len(set(ids)) == len(ids)


@pytest.mark.smoke
@pytest.mark.parametrize("node", NODES, ids=name)
def test_schema(node):
    schema = node.GET_SCHEMA()
    assert schema.node_id.startswith("Quickstep_") and schema.node_id.isascii()
    assert schema.display_name.endswith("(Quickstep)")
    assert schema.category.startswith("Quickstep/")
    assert len(schema.description) > 20
    node.GET_NODE_INFO_V1()  # what /object_info calls


def test_schemas_are_valid_in_whichever_order_comfyui_asks():
    """ComfyUI names an output without an id by its place, once: one that several nodes share at several places needs an id."""
    places: dict[int, set[int]] = {}
    shared = {}
    for node in NODES:
        for place, output in enumerate(node.define_schema().outputs):
            shared[id(output)] = output
            places.setdefault(id(output), set()).add(place)
    several = [shared[key] for key, found in places.items() if len(found) > 1]
    assert several and all(output.id and not output.id.startswith("_") for output in several)


@pytest.mark.parametrize("node", NODES, ids=name)
def test_every_input_has_a_tooltip(node):
    for item in node.GET_SCHEMA().inputs:
        template = getattr(item, "template", None)  # Autogrow
        tooltip = item.tooltip or (template and template.input.tooltip)
        assert tooltip and tooltip.strip()[-1] in ".)", f"{node.__name__}.{item.id} has no tooltip that ends a sentence"


@pytest.mark.parametrize("node", NODES, ids=name)
def test_help_page_is_up_to_date(node):
    page = docs.PAGES / f"{node.GET_SCHEMA().node_id}.md"
    assert page.is_file(), f"{page.name} is missing; run `make docs`."
    assert page.read_text(encoding="utf-8") == docs.page(node), f"{page.name} is out of date; run `make docs`."


def test_no_help_page_without_a_node():
    assert {path.stem for path in docs.PAGES.glob("*.md")} == {node.GET_SCHEMA().node_id for node in NODES}


def test_readme_table_is_up_to_date():
    readme = (docs.ROOT / "README.md").read_text(encoding="utf-8")
    assert docs.BEGIN in readme and docs.END in readme, "README.md has no place for the generated method table."
    assert docs.with_methods(readme, NODES) == readme, "README.md's method table is out of date; run `make docs`."


def test_what_works_together_is_up_to_date():
    assert docs.COMPOSITION.read_text(encoding="utf-8") == docs.accelerators(), "run `make docs`."
