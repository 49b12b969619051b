"""UI workflows to API prompts, as the frontend's ``graphToPrompt`` does it, for what our workflows use.

The browser test compares the two. Muted and bypassed nodes, subgraphs and primitive nodes are refused.
"""

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NOTES = {"Note", "MarkdownNote"}
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"


def to_api(workflow: dict, object_info: dict) -> dict:
    """The API prompt of a workflow of version 0.4, given the server's ``/object_info``."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    origins = {link[0]: (link[1], link[2]) for link in workflow["links"]}

    def origin(link: int) -> list:
        node, slot = origins[link]
        while nodes[node]["type"] == "Reroute":
            node, slot = origins[nodes[node]["inputs"][0]["link"]]
        return [str(node), slot]

    prompt = {}
    for node in workflow["nodes"]:
        kind = node["type"]
        if kind in NOTES or kind == "Reroute":
            continue
        if kind not in object_info:
            raise ValueError(f"node {node['id']} has the unknown type {kind}")
        if node.get("mode", 0) != 0:
            raise ValueError(f"node {node['id']} ({kind}) is muted or bypassed")
        inputs = widget_values(node, object_info[kind])
        for slot in node.get("inputs", []):
            if slot.get("link") is not None:
                inputs[slot["name"]] = origin(slot["link"])
        prompt[str(node["id"])] = {"class_type": kind, "inputs": inputs}
    return prompt


def widget_values(node: dict, info: dict) -> dict:
    """The node's positional widget values by input name."""
    values = list(node.get("widgets_values") or [])
    found = {}

    def take(declared: dict, prefix: str = "") -> None:
        for group in ("required", "optional"):
            for name, spec in declared.get(group, {}).items():
                kind, options = spec[0], spec[1] if len(spec) > 1 else {}
                if kind == DYNAMIC:
                    found[prefix + name] = key = values.pop(0)
                    chosen = next(option for option in options["options"] if option["key"] == key)
                    take(chosen["inputs"], f"{prefix}{name}.")
                elif (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput"):
                    if not values:
                        raise ValueError(f"node {node['id']} ({node['type']}) has no value for {prefix + name}")
                    found[prefix + name] = values.pop(0)
                    seed = kind == "INT" and name in ("seed", "noise_seed")
                    if options.get("control_after_generate", seed):
                        values.pop(0)  # "fixed", "randomize" ...

    take(info["input"])
    if values:
        raise ValueError(f"node {node['id']} ({node['type']}) has values left over: {values}")
    return found
