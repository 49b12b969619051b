"""A calibration made in one ComfyUI serves a second user, who has only its file and the workflow."""

from __future__ import annotations

import io
import shutil

import pytest
from PIL import Image
from quickstep_under_test.demo.server import Server
from quickstep_under_test.demo.testbed import Trouble

NAME = "shared_schedule"


def graph(network: str, **more) -> dict:
    """Nodes that both workflows have."""
    nodes = {
        "model": ("Quickstep_DemoModel", {"network": network}),
        "positive": ("CLIPTextEncode", {"text": "a big blue ring", "clip": ["model", 1]}),
        "negative": ("CLIPTextEncode", {"text": "", "clip": ["model", 1]}),
        "latent": ("EmptyLatentImage", {"width": 32, "height": 32, "batch_size": 2}),
        **more,
    }
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


SHARED = {"model": ["model", 0], "positive": ["positive", 0], "negative": ["negative", 0], "cfg": 3.0}
BUDGET = {"latent": ["latent", 0], "steps": 5, "samples": 2, "minutes": 0.05, "seed": 0, "name": NAME, "loss": "rms"}
FIT = {**SHARED, **BUDGET, "memory": 3, "resume": "none", "decouple": True, "rescale": True}


def picture(sampler: list, sigmas: list) -> dict:
    sampled = {
        **SHARED,
        "add_noise": True,
        "noise_seed": 7,
        "sampler": sampler,
        "sigmas": sigmas,
        "latent_image": ["latent", 0],
    }
    return {
        "sampled": ("SamplerCustom", sampled),
        "decoded": ("VAEDecode", {"samples": ["sampled", 0], "vae": ["model", 2]}),
        "saved": ("SaveImage", {"images": ["decoded", 0], "filename_prefix": "shared"}),
    }


def used(network: str) -> dict:
    found = {
        "sigmas": ("Quickstep_FoundSchedule", {"file": f"{NAME}.json", "model": ["model", 0], "steps": 0}),
        "sampler": ("Quickstep_FittedSolver", {"calibration": f"{NAME}.json", "elsewhere": "refuse"}),
    }
    return graph(network, **found, **picture(["sampler", 0], ["sigmas", 0]))


def shown(server, prompt: dict) -> list[bytes]:
    """The pixels; the files also have the workflow in them."""
    images = server.run(prompt)["saved"]["images"]
    return [Image.open(io.BytesIO(server.image(of))).tobytes() for of in images]


def test_a_second_user_needs_the_file_and_the_workflow(server, tmp_path):
    first = shown(
        server, graph("unet_small", found=("Quickstep_FitSolver", FIT), **picture(["found", 0], ["found", 1]))
    )
    file = server.base / "models" / "quickstep" / f"{NAME}.json"
    assert [path.name for path in file.parent.iterdir() if NAME in path.name] == [file.name]  # no draft is left
    with pytest.raises(Trouble, match="is for another model"):
        shown(server, used("dit"))

    theirs = tmp_path / "models" / "quickstep"
    theirs.mkdir(parents=True)
    shutil.copy(file, theirs)
    with Server(tmp_path) as fresh:
        for node, name in (("FoundSchedule", "file"), ("FittedSolver", "calibration")):
            declared = fresh.object_info()[f"Quickstep_{node}"]["input"]
            assert f"{NAME}.json" in str({**declared["required"], **declared.get("optional", {})}[name])
        assert shown(fresh, used("unet_small")) == first
