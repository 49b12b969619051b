"""Text on a node: the stock frontend shows none that a node returns, only what is sent while it runs."""

from __future__ import annotations

from comfy_api.latest import io


def show_text(node: type[io.ComfyNode], text: str) -> None:
    """Put ``text`` under the widgets of the running node; its schema must ask for ``io.Hidden.unique_id``."""
    from server import PromptServer  # where ComfyUI is a library, not a server, it is expensive to import

    server = getattr(PromptServer, "instance", None)  # none where ComfyUI is used as a library
    if server is not None and node.hidden is not None and node.hidden.unique_id:
        server.send_progress_text(text, node.hidden.unique_id)
