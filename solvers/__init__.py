"""The mathematics of Quickstep: torch, numpy and scipy only, no ComfyUI."""
