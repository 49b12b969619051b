"""The code under test is ``quickstep_under_test``: the repository as a package, without running its ``__init__``."""

import signal
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "quickstep_under_test"

if PACKAGE not in sys.modules:
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(ROOT)]
    sys.modules[PACKAGE] = package


def pytest_configure(config):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped from outside: like Ctrl-C, fixtures clean up


@pytest.hookimpl(tryfirst=True)  # before xdist, which reads the marks in the same hook
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name in ("server", "browser"):
            item.add_marker(pytest.mark.xdist_group("server"))  # one process has them all, and so the only server


@pytest.fixture(scope="session")
def server():
    """The one real ComfyUI server of the session, with the pack in it. Fails, never skips, without COMFYUI_PATH."""
    from quickstep_under_test.demo.server import Server

    with Server() as running:
        yield running


@pytest.fixture(scope="session")
def object_info(server):
    return server.object_info()
