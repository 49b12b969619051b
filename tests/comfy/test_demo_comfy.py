"""The demo model in the real ComfyUI: loads without touching anything, understands captions, says what is wrong."""

from __future__ import annotations

import json

import comfy.sample
import comfy.supported_models
import pytest
import torch
from quickstep_under_test.demo import judge as judging
from quickstep_under_test.demo import text, train_recipes, world
from quickstep_under_test.nodes import demo
from quickstep_under_test.nodes.bridge import process_of, sampler
from quickstep_under_test.solvers.exponential import DPMSolverPP
from quickstep_under_test.solvers.schedules import ExponentialSchedule
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nodes as core_nodes


def encode(clip, captions):
    encoded = [clip.encode_from_tokens(clip.tokenize(caption), return_pooled=True) for caption in captions]
    return [[torch.cat([c for c, _ in encoded]), {"pooled_output": torch.cat([p for _, p in encoded])}]]


@pytest.mark.smoke
@pytest.mark.parametrize("network", list(demo.NETWORKS))
def test_standard_graph(network):
    """DemoModel -> CLIPTextEncode -> KSampler -> VAEDecode, with ComfyUI's own nodes."""
    before = list(comfy.supported_models.models)
    model, clip, vae = demo.DemoModel.execute(network).args
    assert comfy.supported_models.models == before
    positive = core_nodes.CLIPTextEncode().encode(clip, "a big red circle on the left")[0]
    negative = core_nodes.CLIPTextEncode().encode(clip, "")[0]
    latent = {"samples": torch.zeros(2, 3, 32, 32)}
    out = core_nodes.common_ksampler(model, 1, 4, 3.0, "euler", "normal", positive, negative, latent)[0]
    images = core_nodes.VAEDecode().decode(vae, out)[0]
    assert images.shape == (2, 32, 32, 3)
    assert images.isfinite().all() and images.min() >= 0 and images.max() <= 1


def test_text_encoder_is_the_one_that_was_trained():
    twin = text.TextEncoder()
    twin.load_state_dict({k: v.float() for k, v in load_file(demo.FOLDER / "text_encoder.safetensors").items()})
    captions = ["", "a big red circle on the left on a white background", "a blue ring"]
    with torch.no_grad():
        expected = twin(torch.tensor([world.tokenize(c) for c in captions]))
    got = encode(demo.load_clip(), captions)[0][0]
    assert (got.cpu() - expected).abs().max() < 2e-2  # ComfyUI may keep the encoder in half precision


@pytest.mark.parametrize(("network", "bar"), [("unet", 0.8), ("unet_small", 0.6), ("dit", 0.8)])
def test_pictures_show_what_the_caption_says(network, bar):
    """A small version of ``demo/evaluate.py``, whose full result (256 pictures) is in the weights' metadata."""
    clip, model = demo.load_clip(), demo.load_model(network)
    _, attributes, captions = world.sample(32, torch.Generator().manual_seed(77))
    process = process_of(model)
    sigmas = torch.from_numpy(ExponentialSchedule()(process, process.t_max, process.t_min, 16)).float()
    noise = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    out = comfy.sample.sample_custom(
        model, noise, 3.0, sampler(DPMSolverPP()), sigmas, encode(clip, captions), encode(clip, [""]),
        torch.zeros_like(noise), disable_pbar=True, seed=5,
    )  # fmt: skip
    asked = {name: attributes[name] for name in ("colour", "shape")}
    assert judging.agreement(judging.load_judge(), (out.cpu() + 1) / 2, asked)["colour+shape"] >= bar


def test_judge_reads_real_pictures():
    pictures, attributes, _ = world.sample(256, torch.Generator().manual_seed(123))
    scores = judging.agreement(judging.load_judge(), pictures, attributes)
    assert min(scores.values()) > 0.97, scores
    wrong = {name: (index + 1) % len(world.ATTRIBUTES[name]) for name, index in attributes.items()}
    assert max(judging.agreement(judging.load_judge(), pictures, wrong).values()) < 0.05


@pytest.mark.parametrize(("network", "bar"), [("unet", 0.9), ("unet_small", 0.75), ("dit", 0.9)])
def test_recorded_scores_meet_the_bar(network, bar):
    with safe_open(demo.FOLDER / f"{network}.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["licence"] == "Apache-2.0"
    assert int(metadata["training_steps"]) == train_recipes.RECIPES[network]["steps"]
    assert json.loads(metadata["scores"])["colour+shape"] >= bar


def test_all_weights_together_stay_below_20_mb():
    assert sum(path.stat().st_size for path in demo.FOLDER.glob("*.safetensors")) < 20e6


def test_odd_sizes_and_long_prompts():
    model, clip, _ = demo.DemoModel.execute("unet_small").args
    long = encode(clip, ["a small blue ring at the top on a black background " * 3])
    assert long[0][0].shape[1] > world.MAX_TOKENS
    noise = torch.randn(1, 3, 33, 47)
    out = comfy.sample.sample(
        model,
        noise,
        2,
        3.0,
        "euler",
        "normal",
        long,
        encode(clip, [""]),
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=1,
    )
    assert out.shape == noise.shape


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "FOLDER", tmp_path)
    return tmp_path


def test_missing_broken_and_foreign_weights_are_said(folder):
    with pytest.raises(FileNotFoundError, match=r"are missing\. Reinstall"):
        demo.load_model("unet")
    (folder / "unet.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        demo.load_model("unet")
    save_file({"a": torch.zeros(1)}, folder / "unet.safetensors", metadata={"format": "other"})
    with pytest.raises(ValueError, match="not this version's weights file"):
        demo.load_model("unet")


def test_unknown_network():
    with pytest.raises(ValueError, match="not one of unet, unet_small, dit"):
        demo.DemoModel.execute("sdxl")


def test_captions_say_the_attributes_and_nothing_else():
    attributes = {name: 1 for name in world.ATTRIBUTES}
    assert world.caption(attributes) == "a big yellow square on the left on a grey background"
    assert world.caption(attributes, set()) == "a yellow square"
    assert world.UNKNOWN not in world.tokenize(world.caption(attributes))
    assert len(world.tokenize("a " * 40)) == world.MAX_TOKENS
