"""Import the repository as the package ``quickstep``, and ComfyUI from ``COMFYUI_PATH``: shared by the benchmarks."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))

from evaluate import CFG, import_comfy, import_pack, prompts

__all__ = ["CFG", "import_comfy", "import_pack", "prompts"]
