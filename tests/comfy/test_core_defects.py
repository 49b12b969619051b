"""``docs/defects.md`` cannot lie: its numbers, measured again on the ComfyUI they were written for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_version import __version__ as VERSION
from quickstep_under_test.solvers import library
from quickstep_under_test.solvers.schedules import CLOSED_FORMS

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = {  # check: {number: (from, to)}
    "dpmpp_3m": {"ve": (1.75, 2.25), "flow": (1.75, 2.25)},
    "ipndm_v": {"ve": (0.5, 1.6), "constant": (1e-3, 1e-2)},
    "heunpp2": {"ve": (0.8, 1.2), "flow": (0.8, 1.2)},
    "er_sde": {"ve": (1.2, 2.1), "flow": (1.2, 2.1)},
    "ddpm_flow": {"mean": (0.3, 0.5), "variance": (0.7, 1.2)},
    "res_multistep_ancestral_flow": {"mean": (0.3, 0.5), "variance": (1.0, 1.4)},
    "churn_flow": {"mean": (0.7, 1.1), "variance": (2.0, 3.0)},
    "dpmpp_2s_ancestral_cfg_pp": {"variance": (-0.4, -0.25), "flow_mean": (0.2, 0.4)},
    "uni_pc_one_step": {"mean": (-0.1, 0.1), "std": (0.9, 1.1)},
    "uni_pc_in_place": {"before": (0.0, 0.0), "after": (1e-4, 1e-2)},
    "dpm_last_sigma": {"fast": (0.35, 0.45), "adaptive": (0.35, 0.45)},
    "tsr_batch": {"one": (0.0, 0.0), "two": (1.0, 1.0)},
    "dpmpp_sde": {"ve": (1.7, 2.5), "flow": (1.7, 2.5)},  # the one on the page's list of claims that do not hold
    "kl_optimal_one_step": {"bad": (1.0, 1.0)},
}
pytestmark = pytest.mark.skipif(
    not VERSION.startswith("0.30."), reason=f"docs/defects.md is about ComfyUI 0.30; this is {VERSION}"
)


@pytest.fixture(scope="module")
def measured():
    """All of them in one process of their own, where the pack is imported as ComfyUI does it."""
    command = [sys.executable, str(ROOT / "benchmarks" / "defects.py"), "--json", *EXPECTED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", EXPECTED)
def test_the_page_still_tells_the_truth(measured, name):
    for number, (low, high) in EXPECTED[name].items():
        found = measured[name][number]
        assert low <= found <= high, (
            f"{name}: {number} is now {found:.3g}, not between {low:g} and {high:g}: if ComfyUI fixed it, "
            "run benchmarks/defects.py, which rewrites docs/defects.md, and change this test."
        )
    assert measured[name]["wrong"] == (name != "dpmpp_sde")


def test_every_check_is_on_the_page():
    page = (ROOT / "docs" / "defects.md").read_text(encoding="utf-8")
    source = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "benchmarks").glob("defects_*.py"))
    rows = [
        line for line in page.splitlines() if line.startswith(("| `", "| the ", "| UniPC", "| LML", "| SEEDS", "- **"))
    ]
    assert len(rows) == source.count("@defect(")


def test_what_quickstep_offers_instead_exists():
    page = (ROOT / "docs" / "defects.md").read_text(encoding="utf-8")
    cells = [line.split("|")[-2] for line in page.splitlines() if line.startswith("|")]
    named = {word for cell in cells for word in re.findall(r"`(\w+)`", cell)}
    methods = (*library.SOLVERS, *library.WRAPPERS, *library.TRANSFORMS, *CLOSED_FORMS)
    assert len(named) > 15
    assert named <= {method.id for method in methods}
