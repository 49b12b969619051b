"""DiSA around ComfyUI's autoregressive video sampler, on a small causal Wan with random weights."""

import importlib.util
import sys
from pathlib import Path

import comfy.sample
import comfy.samplers
import comfy.supported_models
import pytest
import torch
from quickstep_under_test.nodes.disa import NODES, annealed
from quickstep_under_test.solvers.caching.disa import DiSA


def _beside(name):
    full = f"quickstep_tests_comfy_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


M = _beside("models")
WAN = {"image_model": "wan2.1", "model_type": "t2v", "dim": 48, "ffn_dim": 96, "num_heads": 2, "num_layers": 2,
       "text_dim": 32, "freq_dim": 32, "patch_size": (1, 2, 2), "in_dim": 16, "out_dim": 16, "text_len": 8}  # fmt: skip
SIGMAS = torch.tensor([1.0, 0.94, 0.83, 0.63, 0.0])


@pytest.fixture(scope="module")
def model():
    return M.build(comfy.supported_models.WAN21_CausalAR_T2V, WAN)


@pytest.fixture
def calls(model):
    """(sigma, first frame, where the cache of the first layer ends afterwards) of every network call."""
    made = []
    network = model.model.diffusion_model

    def note(module, args, given, out):
        state = given["transformer_options"]["ar_state"]
        made.append((round(float(args[1].max()) / 1000, 2), state["start_frame"], state["kv_caches"][0]["end"]))

    handle = network.register_forward_hook(note, with_kwargs=True)
    yield made
    handle.remove()


def run(model, sampler, sigmas=SIGMAS, frames=5, size=(6, 6)):
    x = torch.zeros(1, 16, frames, *size)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    text = M.conditioning(1, width=32)
    with torch.inference_mode():
        return comfy.sample.sample_custom(model, noise, 1.0, sampler, sigmas, text, text, x, disable_pbar=True, seed=7)


def autoregressive(frames=1):
    return comfy.samplers.ksampler("ar_video", {"num_frame_per_block": frames})


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("lower", [0, 4, 9])
def test_nothing_annealed_changes_no_bit(model, frames, lower):
    once = annealed(DiSA(lower=lower), autoregressive(frames))
    assert torch.equal(run(model, once), run(model, autoregressive(frames)))


def test_later_blocks_take_fewer_calls(model, calls):
    made = run(model, annealed(DiSA(lower=2), autoregressive()))
    assert made.isfinite().all()
    tokens = 9  # 3 x 3 of a frame
    taken = [(1.0, 0.94, 0.83, 0.63), (1.0, 0.94, 0.63), (1.0, 0.94, 0.63), (1.0, 0.83), (1.0, 0.83)]
    wanted = [(t, b, (b + 1) * tokens) for b, times in enumerate(taken) for t in (*times, 0.0)]
    assert [(t, frame, end) for t, frame, end in calls] == wanted


def test_the_first_block_is_the_whole_one_and_the_last_is_one_of_fewer_sigmas(model):
    """A block that leaves steps out is a run without these sigmas, but for the noise that is drawn."""
    plain = run(model, autoregressive(), frames=2)
    made = run(model, annealed(DiSA(lower=1), autoregressive()), frames=2)
    assert torch.equal(made[:, :, :1], plain[:, :, :1]) and not torch.equal(made[:, :, 1:], plain[:, :, 1:])
    # One step from sigma 1: the noise drawn on the way reaches nothing.
    alone = run(model, annealed(DiSA(lower=1, strategy="two-stage"), autoregressive()), frames=2)
    assert torch.equal(made, alone)


def test_the_last_uneven_block(model, calls):
    made = run(model, annealed(DiSA(lower=1), autoregressive(2)), frames=5, size=(6, 8))
    assert made.shape == (1, 16, 5, 6, 8) and made.isfinite().all()
    assert [frame for _, frame, _ in calls] == [0] * 5 + [2] * 3 + [4] * 2
    assert calls[-1] == (0.0, 4, 5 * 3 * 4)


def test_other_samplers_are_refused():
    with pytest.raises(ValueError, match=r"DiSA: sampler is euler.*connect Sampler AR Video"):
        annealed(DiSA(), comfy.samplers.ksampler("euler"))
    (node,) = NODES
    (made,) = node.execute(sampler=autoregressive(3), lower=1, strategy="cosine").args
    assert made.extra_options == {"num_frame_per_block": 3}
