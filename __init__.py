"""Quickstep: published training-free ways to sample diffusion and flow models in fewer network calls, as ComfyUI nodes."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called once by ComfyUI. Nothing of the pack, and no torch, is imported before."""
    from .nodes.entry import QuickstepExtension

    return QuickstepExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
