"""A real ComfyUI inside the test process: ``import comfy``, ``comfy_api`` and ``quickstep_under_test.nodes`` work here.

``COMFYUI_PATH`` names it; ``make test`` sets it. Without it these tests fail, they never skip. They run on the CPU
unless ``QUICKSTEP_DEVICE`` says otherwise, and ComfyUI reads and writes in a temporary folder only.
"""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

COMFYUI = os.environ.get("COMFYUI_PATH", "")
if not COMFYUI or not (Path(COMFYUI) / "comfy" / "samplers.py").is_file():
    raise RuntimeError(f"COMFYUI_PATH = {COMFYUI!r} is not a ComfyUI folder; run these tests with `make test`.")
if COMFYUI not in sys.path:
    sys.path.insert(0, COMFYUI)

from comfy.cli_args import args  # noqa: E402  (before anything else of ComfyUI, which looks for a GPU when imported)

args.cpu = os.environ.get("QUICKSTEP_DEVICE", "cpu") == "cpu"
args.base_directory = tempfile.mkdtemp(prefix="quickstep-comfy-")
atexit.register(shutil.rmtree, args.base_directory, ignore_errors=True)

# As ComfyUI's main.py does: its package `utils` first. Later `nodes` puts comfy/ on the path, whose utils.py would hide it.
import comfy.model_management  # noqa: E402
import folder_paths  # noqa: E402
import pytest  # noqa: E402
import utils.install_util  # noqa: E402, F401
from quickstep_under_test.nodes import artifacts, calibration_run  # noqa: E402


@pytest.fixture(autouse=True)
def nothing_dead():
    """ComfyUI collects all garbage at every load for as long as it knows a network whose patcher is gone, as after a run that
    failed. That was nine tenths of the time of all tests that come after."""
    yield
    loaded = comfy.model_management.current_loaded_models
    loaded[:] = [model for model in loaded if not model.is_dead()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty models/quickstep folder, registered as the pack does, and nothing of it known to ComfyUI afterwards."""
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    artifacts.register()
    path = tmp_path / artifacts.FOLDER
    path.mkdir()
    return path


@pytest.fixture
def searches(monkeypatch):
    """Those that nodes run, as they come."""
    begin, seen = calibration_run.Pursuit.__post_init__, []

    def noted(self):
        begin(self)
        seen.append(self.search)

    monkeypatch.setattr(calibration_run.Pursuit, "__post_init__", noted)
    return seen
