"""What the Comfy registry would ship: validated and packed by its own tool, then loaded by a clean ComfyUI."""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest
from quickstep_under_test.demo import testbed
from quickstep_under_test.demo.server import Server

ROOT = Path(__file__).resolve().parents[2]


def run(command: list, cwd: Path) -> str:
    environment = {**os.environ, "DO_NOT_TRACK": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The tracked files as they are on disk, in a repository of their own, where packing disturbs nobody."""
    target = tmp_path_factory.mktemp("checkout")
    for name in run(["git", "ls-files"], ROOT).splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    run(["git", "init", "-q"], target)
    run(["git", "add", "-A"], target)
    return target


@pytest.fixture(scope="module")
def comfy() -> list:
    return [testbed.comfy_cli(), "--skip-prompt", "--no-enable-telemetry"]


def test_validates(comfy, checkout):
    said = run([*comfy, "node", "validate"], checkout)
    assert "warning" not in said.lower(), said


def test_packed_zip_loads(comfy, checkout, tmp_path):
    run([*comfy, "node", "pack"], checkout)
    with zipfile.ZipFile(checkout / "node.zip") as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "quickstep")
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", ".ci/"))]
    assert [name for name in names if name.startswith("web/docs/Quickstep_")]
    assert {"__init__.py", "pyproject.toml", "LICENSE", "README.md", "requirements.txt"} <= set(names)
    assert sum(info.file_size for info in zipfile.ZipFile(checkout / "node.zip").infolist()) < 30e6
    with Server(pack=tmp_path / "quickstep") as clean:
        assert len([name for name in clean.object_info() if name.startswith("Quickstep_")]) > 10
