"""The code under test is ``quickstep_under_test``: the repository as a package, without running its ``__init__``."""

import os
import signal
import sys
import tempfile
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "quickstep_under_test"

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is loaded, and for the servers that tests start: threads that wait for each other take the cores of the
    # other processes.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if PACKAGE not in sys.modules:
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(ROOT)]
    sys.modules[PACKAGE] = package


def pytest_configure(config):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped from outside: like Ctrl-C, fixtures clean up


def pytest_itemcollected(item):
    if item.path.parent.name in ("server", "browser"):
        item.add_marker(pytest.mark.xdist_group("server"))  # one process has them all, and so the only server


@pytest.fixture(scope="session")
def server():
    """The one real ComfyUI server of the session, with the pack in it. Fails, never skips, without COMFYUI_PATH."""
    from quickstep_under_test.demo.server import Server

    only_one()
    with Server() as running:
        yield running


def only_one():
    """Fails in the second process of a run that wants a server: the machine has cores for one."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is not None:
        try:
            (Path(tempfile.gettempdir()) / f"quickstep-server-{run}").touch(exist_ok=False)
        except FileExistsError:
            pytest.fail("a second server in one run: pytest-xdist did not keep the group `server` together.")


@pytest.fixture(scope="session")
def object_info(server):
    return server.object_info()
