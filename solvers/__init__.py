"""The mathematics of Quickstep: torch, numpy, scipy and torchsde only, no ComfyUI."""
