"""Seamless tiles inside a real ComfyUI."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from quickstep_under_test.nodes import attach
from quickstep_under_test.nodes.sites import tiles as site
from quickstep_under_test.solvers.caching.accelerator import Run
from quickstep_under_test.solvers.caching.seamless_tiles import FILLS, SeamlessTiles


def _beside(name):
    full = f"quickstep_tests_comfy_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


M = _beside("models")
MOVED = SeamlessTiles(tile=8, max_shift=5)


@pytest.fixture(scope="module")
def model():
    return M.unet()


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def last(model):
    return attach.ledger_of(model).runs[-1]


def close(a, b):
    return float((a - b).norm() / b.norm()) < 1e-5


def spied(model):
    """A clone that writes down the shape of every network call."""
    shapes = []

    def deep(executor, x, t, *args, **kwargs):
        shapes.append(tuple(x.shape))
        return executor(x, t, *args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "deep", deep)
    return clone, shapes


@pytest.mark.smoke
@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("size", [8, 16])
def test_a_tile_as_large_as_the_picture_changes_no_bit(model, fill, size):
    on = attach.attach(model, SeamlessTiles(tile=16, max_shift=5, fill=fill))
    assert torch.equal(
        M.sample(on, x=M.latent(2, size=size), steps=4), M.sample(model, x=M.latent(2, size=size), steps=4)
    )
    assert last(on).work == 1.0


@pytest.mark.parametrize(("fill", "shares"), [("previous", 4), ("wrap", 4), ("extra", 9)])
def test_every_network_call_is_a_tile(model, fill, shares):
    clone, shapes = spied(attach.attach(model, SeamlessTiles(tile=8, max_shift=5, fill=fill, reset_every=1)))
    M.sample(clone, x=M.latent(size=16), steps=3)
    assert {s[-2:] for s in shapes} == {(8, 8)} and 3 * 4 <= len(shapes) <= 3 * shares
    if fill != "extra":
        assert last(clone).work == 1.0 and len(shapes) == 12


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("maker", [M.gaussian, lambda: M.gaussian("eps")])
def test_a_network_that_sees_one_pixel_at_a_time_does_not_mind(maker, fill):
    """Its picture is the same from any tiles, to rounding; margins that keep an old d are off by a little."""
    model = maker()
    whole = M.sample(model, x=M.latent(size=20), steps=6)
    on = attach.attach(model, SeamlessTiles(tile=8, max_shift=5, fill=fill, overlap=2))
    made = M.sample(on, x=M.latent(size=20), steps=6)
    if fill == "previous":
        assert not close(made, whole) and float((made - whole).abs().mean()) < 0.2
        fresh = SeamlessTiles(tile=8, max_shift=5, fill=fill, reset_every=1)
        assert close(M.sample(attach.attach(model, fresh), x=M.latent(size=20), steps=6), whole)
    else:
        assert close(made, whole)


def test_the_same_seed_is_the_same_picture(model):
    x = M.latent(size=16)
    once = M.sample(attach.attach(model, MOVED), x=x, steps=4)
    assert torch.equal(once, M.sample(attach.attach(model, MOVED), x=x, steps=4))
    other = SeamlessTiles(tile=8, max_shift=5, seed=1)
    assert not torch.equal(once, M.sample(attach.attach(model, other), x=x, steps=4))


@pytest.mark.parametrize("fill", FILLS)
def test_positive_and_negative_apart_or_together(model, fill, monkeypatch):
    on = attach.attach(model, SeamlessTiles(tile=8, max_shift=5, fill=fill))
    x = M.latent(2, size=16)
    together = M.sample(on, x=x, steps=4)
    monkeypatch.setattr(type(model), "get_free_memory", lambda self, device: 0)
    assert close(M.sample(on, x=x, steps=4), together)


def test_areas_masks_and_inpainting(model):
    positive = [
        *M.conditioning(1),
        *M.conditioning(3, area=(12, 8, 4, 8)),
        *M.conditioning(4, mask=torch.ones(1, 16, 16)),
    ]
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1.0
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    on = attach.attach(model, MOVED)
    made = M.sample(on, x=x, mask=mask, positive=positive, steps=5)
    assert torch.allclose(made[..., :8], x[..., :8], atol=1e-5) and made.isfinite().all()
    assert not torch.allclose(made[..., 8:], x[..., 8:], atol=1.0)


def test_residuals_lie_where_they_belong():
    """A residual that says where it is, cut and moved with the picture."""
    rows = torch.arange(8.0).view(1, 1, 8, 1).expand(2, 3, 8, 8)
    control = {"output": [None, rows], "middle": [rows[..., ::4, ::4]]}
    box = (slice(4, 12), slice(0, 8))
    cut = site._cut_control(control, (16, 16), box)
    assert cut["output"][0] is None and cut["output"][1][0, 0, :, 0].tolist() == [2, 3, 4, 5]
    assert cut["middle"][0][0, 0].tolist() == [[0.0]] and cut["output"][1].shape == (2, 3, 4, 4)
    moved = site._moved(control, (16, 16), (8, 0))
    assert moved["output"][1][0, 0, :, 0].tolist() == [4, 5, 6, 7, 0, 1, 2, 3] and moved["output"][0] is None
    cut["output"][1].add_(1)
    assert rows[0, 0, 2, 0] == 2
    with pytest.raises(ValueError, match="works on tokens"):
        site._cut_control({"output": [torch.zeros(1, 64, 8)]}, (16, 16), box)


@pytest.mark.parametrize("fill", FILLS)
def test_what_comes_with_the_picture_is_cut_with_it(fill):
    """Every tile sees the part of a c_concat that lies under it."""
    settings = SeamlessTiles(tile=8, max_shift=5, fill=fill, reset_every=100)
    wrapper = site.tiles(None, settings, "key", "forward")[WrappersMP.APPLY_MODEL]
    running = settings.start(Run([4.0, 2.0, 1.0, 0.0]))
    x = torch.randn(2, 4, 20, 20)

    class Executor:
        class_obj = type("Base", (), {"current_patcher": None})

        def __call__(self, part, t, concat, crossattn, control, options, **more):
            assert torch.equal(part, concat[:, :4]) and torch.equal(part, more["mask"]) and more["y"].shape == (2, 5)
            return part * 2

    for t in (4.0, 2.0, 1.0):
        with running.call(t):
            options = {"key": running, "uuids": ["a", "b"], "cond_or_uncond": [0, 1]}
            given = (torch.full((2,), t), torch.cat([x, x], 1), torch.zeros(2, 7, 8), None, options)
            made = wrapper(Executor(), x, *given, mask=x.clone(), y=torch.zeros(2, 5))
        # Where an older d stands in, the network's rule D = 2 x gives d = -x / t of that time.
        same = torch.isclose(made, 2 * x)
        assert same.all() if fill != "previous" or t == 4.0 else same.float().mean() > 0.2


def test_a_second_picture_is_refused():
    for name, value in (("ref_latents", [torch.zeros(1, 4, 6, 6)]), ("image", torch.zeros(1, 4, 6, 6))):
        with pytest.raises(ValueError, match=f"second picture \\({name}\\)"):
            site._cut(name, value, (16, 16), (slice(0, 8), slice(0, 8)))


def test_gligen_is_refused(model):
    patched = model.clone()
    patched.set_model_patch(lambda *a: None, "middle_patch")
    with pytest.raises(ValueError, match="GLIGEN's boxes"):
        M.sample(attach.attach(patched, MOVED), x=M.latent(size=16))


def test_adaptive_samplers_have_tiles_that_stand_still(model):
    clone, shapes = spied(attach.attach(model, MOVED))
    M.sample(clone, "dpm_adaptive", x=M.latent(size=16), steps=3)
    assert {s[-2:] for s in shapes} == {(8, 8)}
