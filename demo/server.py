"""A real ComfyUI server with this pack in it, and a small client: for the demo, the tests and ``make serve``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

from .testbed import ROOT, Trouble, say, users_comfyui

HOST = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as s:
        s.bind((HOST, 0))
        return s.getsockname()[1]


def check_port(port: int) -> None:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((HOST, port))
        except OSError as error:
            raise Trouble(
                f"port {port} cannot be used ({error.strerror}); choose another: make serve PORT=8190."
            ) from None


def device_flags() -> list[str]:
    """``--cpu`` unless there is a GPU; ``QUICKSTEP_DEVICE=cpu`` or ``=gpu`` decides."""
    wanted = os.environ.get("QUICKSTEP_DEVICE")
    if wanted is None:
        import torch

        wanted = "gpu" if torch.cuda.is_available() or torch.backends.mps.is_available() else "cpu"
    return ["--cpu"] if wanted == "cpu" else []


def _die_with_parent() -> None:
    """In the child: let the kernel stop it should we be killed without a chance to clean up."""
    import ctypes

    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Client:
    """The HTTP and WebSocket interface of a running server."""

    def __init__(self, port: int):
        self.port = port
        self.url = f"http://{HOST}:{port}"

    def get(self, path: str, timeout: float = 60, **query) -> bytes:
        url = f"{self.url}{path}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        with urllib.request.urlopen(url, timeout=timeout) as response:
            return response.read()

    def json(self, path: str, **query):
        return json.loads(self.get(path, **query))

    def object_info(self) -> dict:
        """What every node of the server declares."""
        return self.json("/object_info")

    def image(self, of: dict) -> bytes:
        """The file behind one entry of a node's ``images``."""
        return self.get("/view", filename=of["filename"], subfolder=of["subfolder"], type=of["type"])

    def run(self, prompt: dict, progress: Callable[[str, int, int], None] | None = None, timeout: float = 600) -> dict:
        """Queue an API prompt and wait for it; returns ``{node id: its UI outputs}``.

        progress: called with the node id, done and total, as the server reports them.
        Raises ``Trouble`` with ComfyUI's own words if it refuses the prompt or a node fails.
        """
        try:
            return asyncio.run(asyncio.wait_for(self._run(prompt, progress), timeout))
        except (TimeoutError, asyncio.TimeoutError) as error:  # two classes before Python 3.11
            raise Trouble(f"the workflow did not finish within {timeout:.0f} s; is the machine busy?") from error

    async def _run(self, prompt, progress) -> dict:
        import aiohttp  # comes with ComfyUI

        client = uuid.uuid4().hex
        async with aiohttp.ClientSession(self.url) as session:
            async with session.ws_connect(f"/ws?clientId={client}", max_msg_size=0) as socket:
                async with session.post("/prompt", json={"prompt": prompt, "client_id": client}) as response:
                    answer = await response.json()
                if response.status != 200 or answer.get("node_errors"):
                    raise Trouble(f"ComfyUI refused the prompt: {refusal(answer)}")
                number = answer["prompt_id"]
                async for message in socket:
                    if message.type is not aiohttp.WSMsgType.TEXT:
                        continue
                    event = json.loads(message.data)
                    data = event.get("data") or {}
                    if data.get("prompt_id") not in (None, number):
                        continue
                    if event["type"] == "progress" and progress:
                        progress(data["node"], data["value"], data["max"])
                    if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                        break
                else:
                    raise Trouble("ComfyUI closed the connection before the prompt was done.")
            if event["type"] == "execution_error":
                where = f"{data['node_type']} (node {data['node_id']})"
                raise Trouble(f"{where} failed: {data['exception_type']}: {data['exception_message'].strip()}")
            if event["type"] == "execution_interrupted":
                raise Trouble("the prompt was interrupted.")
            for _ in range(200):  # the history is written a moment later
                async with session.get(f"/history/{number}") as response:
                    history = await response.json()
                if number in history:
                    return history[number]["outputs"]
                await asyncio.sleep(0.05)
        raise Trouble("ComfyUI finished the prompt but wrote no history.")


def refusal(answer: dict) -> str:
    """ComfyUI's answer to a bad prompt, in one line."""
    problems = [
        f"{node['class_type']}: {error['message']} ({error['details']})"
        for node in (answer.get("node_errors") or {}).values()
        for error in node["errors"]
    ]
    error = answer.get("error") or {}
    return "; ".join(problems) or (error.get("message", str(error)) if isinstance(error, dict) else str(error))


class Server(Client):
    """``with Server() as server:`` a ComfyUI of ``COMFYUI_PATH`` on a free loopback port, stopped at the end.

    base: folder for everything it writes (temporary and removed at the end if not given); output: where pictures go;
    pack: what is put into ``custom_nodes`` as ``quickstep``.
    """

    def __init__(
        self, base: Path | None = None, output: Path | None = None, port: int | None = None, pack: Path = ROOT
    ):
        super().__init__(port or free_port())
        self.given_base, self.output, self.pack = base, output, pack
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Server:
        check_port(self.port)
        self.base = self.given_base or Path(tempfile.mkdtemp(prefix="quickstep-server-"))
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        comfyui = users_comfyui()
        if comfyui is None:
            raise Trouble("COMFYUI_PATH is not set; start this with make, which sets it.")
        nodes = self.base / "custom_nodes"
        nodes.mkdir(parents=True, exist_ok=True)
        link = nodes / "quickstep"
        if link.is_symlink():
            link.unlink()
        link.symlink_to(self.pack, target_is_directory=True)
        flags = ["--listen", HOST, "--port", str(self.port), "--base-directory", str(self.base), *device_flags()]
        flags += ["--disable-api-nodes", "--database-url", "sqlite:///:memory:", "--disable-auto-launch"]
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
            flags += ["--output-directory", str(self.output)]
        self.log = self.base / "server.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", str(comfyui / "main.py"), *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=comfyui,
                start_new_session=True,  # Ctrl-C reaches only us; we stop the server
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        self._await_ready(self.process)

    def _await_ready(self, process: subprocess.Popen, timeout: float = 600) -> None:
        end = time.monotonic() + timeout
        while True:
            if process.poll() is not None:
                raise Trouble(f"ComfyUI stopped while starting: {self._last_words()}")
            with contextlib.suppress(urllib.error.URLError, OSError, ValueError):
                self.get("/system_stats", timeout=5)
                break
            if time.monotonic() > end:
                raise Trouble(f"ComfyUI did not answer within {timeout:.0f} s: {self._last_words()}")
            time.sleep(0.2)
        if "IMPORT FAILED" in self.log.read_text(errors="replace"):
            raise Trouble(f"ComfyUI could not import the pack: {self._last_words()}")
        if not any(name.startswith("Quickstep_") for name in self.object_info()):
            raise Trouble(f"ComfyUI started without any node of the pack: {self._last_words()}")

    def _last_words(self) -> str:
        """The last line of the log that names an exception, or its last line; the log is kept for the user."""
        kept = ROOT / "output" / "server.log"
        kept.parent.mkdir(exist_ok=True)
        shutil.copyfile(self.log, kept)
        text = re.sub(r"\x1b\[\d*m", "", self.log.read_text(errors="replace"))
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        named = [
            line
            for line in lines
            if line.split(":")[0].endswith(("Error", "Exception")) and " " not in line.split(":")[0]
        ]
        return f"{(named or lines or ['it said nothing'])[-1]} (log: {kept})"

    def wait(self) -> None:
        """Until the server stops by itself."""
        assert self.process is not None
        self.process.wait()

    def __exit__(self, *_) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.given_base is None:
            shutil.rmtree(self.base, ignore_errors=True)


def stopping_politely(main: Callable[[], None]) -> int:
    """Run ``main``; trouble is one sentence and an exit code, Ctrl-C and SIGTERM leave no server behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except Trouble as trouble:
        say(str(trouble))
        return 1
    except KeyboardInterrupt:
        say("stopped.")
        return 130
    return 0


def serve() -> None:
    """``make serve``: the interface with the pack and its demo model, until Ctrl-C. Settings stay in output/serve."""
    given = sys.argv[1] if len(sys.argv) > 1 else "8188"
    if not given.isdigit() or not 0 < int(given) < 65536:
        raise Trouble(f"PORT = {given} is not a port number.")
    say("starting ComfyUI")
    with Server(base=ROOT / "output" / "serve", output=ROOT / "output", port=int(given)) as server:
        say(f"ready: {server.url} (its log: {server.log}; Ctrl-C stops it)")
        server.wait()
        raise Trouble(f"ComfyUI stopped by itself: {server._last_words()}")


if __name__ == "__main__":
    sys.exit(stopping_politely(serve))
