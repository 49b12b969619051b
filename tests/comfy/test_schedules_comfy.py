"""Schedules against ComfyUI's own where it has the same one, and the derived nodes inside ComfyUI."""

from functools import partial

import comfy.model_sampling
import comfy.samplers
import numpy as np
import pytest
import torch
from comfy.k_diffusion import sampling as k_diffusion
from comfy_extras import nodes_align_your_steps
from comfy_extras.nodes_custom_sampler import BasicScheduler
from PIL import Image
from quickstep_under_test.nodes import schedules as nodes
from quickstep_under_test.nodes.bridge import process_from
from quickstep_under_test.solvers.process import VarianceExploding
from quickstep_under_test.solvers.schedules import (
    CLOSED_FORMS,
    AlignYourSteps,
    BetaSchedule,
    CosineSchedule,
    ExponentialSchedule,
    KarrasSchedule,
    LinearQuadraticSchedule,
    PolyexponentialSchedule,
    UniformSchedule,
    times,
)
from quickstep_under_test.solvers.schedules.ays import TABLES


class StableDiffusion(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    pass


class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    pass


class Flux(comfy.model_sampling.ModelSamplingFlux, comfy.model_sampling.CONST):
    pass


def shifted_flow() -> Flow:
    sampling = Flow()
    sampling.set_parameters(shift=3.0)
    return sampling


def zero_terminal_snr() -> StableDiffusion:
    sampling = StableDiffusion()
    sampling.set_sigmas(comfy.model_sampling.rescale_zero_terminal_snr_sigmas(sampling.sigmas))
    return sampling


SAMPLINGS = {"sd": StableDiffusion, "zsnr": zero_terminal_snr, "flow": Flow, "shifted": shifted_flow, "flux": Flux}
STEPS = (1, 2, 3, 10, 25, 50)


@pytest.fixture(params=SAMPLINGS)
def sampling(request):
    return SAMPLINGS[request.param]()


class Model:
    """As much of a MODEL as a schedule needs."""

    def __init__(self, model_sampling):
        self.model_sampling = model_sampling

    def get_model_object(self, name: str):
        assert name == "model_sampling"
        return self.model_sampling


def check(schedule, sampling, reference, steps, rtol=2e-5):
    """Our schedule on the whole range against ``reference(n)``."""
    for n in steps:
        ours = times(schedule, process_from(sampling), n)
        theirs = reference(n).double().numpy()
        assert len(ours) == len(theirs), n
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize(
    "schedule, reference",
    [
        (KarrasSchedule(space="sigma"), k_diffusion.get_sigmas_karras),
        (KarrasSchedule(space="sigma", rho=3.0), lambda n, lo, hi: k_diffusion.get_sigmas_karras(n, lo, hi, rho=3.0)),
        (ExponentialSchedule(space="sigma"), k_diffusion.get_sigmas_exponential),
        (
            PolyexponentialSchedule(space="sigma", rho=1.7),
            lambda n, lo, hi: k_diffusion.get_sigmas_polyexponential(n, lo, hi, rho=1.7),
        ),
    ],
)
def test_curves_are_k_diffusion_s(schedule, reference, sampling):
    low, high = float(sampling.sigma_min), float(sampling.sigma_max)
    check(schedule, sampling, lambda n: reference(n, low, high), STEPS)


def test_cosine_is_kl_optimal_without_flow():
    sampling = StableDiffusion()
    low, high = float(sampling.sigma_min), float(sampling.sigma_max)
    check(CosineSchedule(), sampling, lambda n: comfy.samplers.kl_optimal_scheduler(n, low, high), STEPS[1:])


def test_linear_quadratic(sampling):
    check(LinearQuadraticSchedule(), sampling, lambda n: comfy.samplers.linear_quadratic_schedule(sampling, n), STEPS)
    settings = dict(threshold_noise=0.1, linear_steps=4)

    def reference(n):
        return comfy.samplers.linear_quadratic_schedule(sampling, n, **settings)

    check(LinearQuadraticSchedule(**settings), sampling, reference, (10, 25, 50))


@pytest.mark.parametrize("spacing, name", [("trailing", "sgm_uniform"), ("linspace", "normal")])
@pytest.mark.parametrize("kind", ["sd", "zsnr", "flow"])
def test_uniform(spacing, name, kind):
    # We interpolate log-linearly between the training sigmas, ComfyUI's flow models evaluate a formula.
    sampling = SAMPLINGS[kind]()
    reference = partial(comfy.samplers.calculate_sigmas, sampling, name)
    check(UniformSchedule(spacing=spacing), sampling, reference, STEPS[1:], rtol=5e-4 if kind == "flow" else 2e-5)


@pytest.mark.parametrize("kind, training_steps", [("shifted", 1000), ("flux", 10000)])
def test_uniform_on_shifted_flow_models(kind, training_steps):
    """There ComfyUI's ``timestep`` is no inverse of its ``sigma``, and its schedules miss sigma_min by the shift."""
    sampling = SAMPLINGS[kind]()
    low = 1.0 / training_steps

    def reference(n):
        t = low + (1.0 - low) * (1.0 - torch.arange(n + 1).double() / n)
        scale = 1000.0 if kind == "shifted" else 1.0
        return torch.stack([torch.as_tensor(sampling.sigma(v * scale)) for v in t[:-1]] + [torch.tensor(0.0).double()])

    check(UniformSchedule(), sampling, reference, STEPS, rtol=5e-4)
    ends = {n: comfy.samplers.calculate_sigmas(sampling, "normal", n)[-2] for n in (2, 10)}
    assert all(end > 2.5 * sampling.sigma_min for end in ends.values())  # ComfyUI's; ours:
    assert times(UniformSchedule(spacing="linspace"), process_from(sampling), 10)[-2] == sampling.sigma_min


@pytest.mark.parametrize("name", ["sd", "flow", "shifted"])
def test_beta_where_comfyui_does_not_drop_steps(name):
    """ComfyUI rounds quantiles to training steps: at most half a step away."""
    sampling = SAMPLINGS[name]()
    process = process_from(sampling)
    theirs = comfy.samplers.beta_scheduler(sampling, 10).double().numpy()[:-1]
    ours = times(BetaSchedule(), process, 10)[:-1]
    assert len(theirs) == len(ours)
    assert np.abs(process.u_of_t(ours) - process.u_of_t(theirs)).max() <= 0.5001 / 999


def test_beta_keeps_the_steps_comfyui_drops():
    assert len(comfy.samplers.beta_scheduler(StableDiffusion(), 400)) < 401
    assert len(times(BetaSchedule(), process_from(StableDiffusion()), 400)) == 401


@pytest.mark.parametrize("table, name", [("SD1.5", "SD1"), ("SDXL", "SDXL"), ("SVD", "SVD")])
def test_align_your_steps(table, name):
    # ComfyUI holds the sigmas of the rounded timesteps for SD 1.5 and SDXL, we hold the paper's three digits.
    np.testing.assert_allclose(TABLES[table], nodes_align_your_steps.NOISE_LEVELS[name], rtol=0.015)
    levels = TABLES[table]
    process = VarianceExploding(levels[-1], levels[0])
    for n in STEPS:
        theirs = nodes_align_your_steps.loglinear_interp(list(levels), n + 1)[:-1]
        ours = times(AlignYourSteps(table=table), process, n)
        np.testing.assert_allclose(ours[1:-1], theirs[1:], rtol=1e-12)


# The nodes


def run(node, **given):
    return node.execute(**given).result


@pytest.mark.smoke
@pytest.mark.parametrize("node", nodes.NODES[:-1], ids=lambda node: node.__name__)
def test_every_schedule_node_gives_sigmas(node, sampling):
    schema = node.GET_SCHEMA()
    assert schema.node_id == f"Quickstep_{node.METHOD.id}" and schema.category == "Quickstep/schedules"
    assert [i.id for i in schema.inputs][:3] == ["model", "steps", "denoise"]
    (sigmas,) = run(node, model=Model(sampling), steps=10, denoise=1.0)
    assert sigmas.dtype == torch.float32 and sigmas.device.type == "cpu" and sigmas.shape == (11,)
    assert (sigmas.diff() < 0).all() and sigmas[-1] == 0
    assert sigmas[0] == sampling.sigma_max
    (part,) = run(node, model=Model(sampling), steps=10, denoise=0.6)
    whole = times(node.METHOD(), process_from(sampling), 16)
    np.testing.assert_array_equal(part.numpy(), whole[-11:].astype(np.float32))
    assert run(node, model=Model(sampling), steps=10, denoise=0.0)[0].shape == (0,)


def test_there_is_a_node_for_every_closed_form():
    assert [node.METHOD for node in nodes.NODES[:-1]] == list(CLOSED_FORMS)
    assert nodes.NODES[-1] is nodes.DrawSchedule


def test_denoise_is_basic_scheduler_s():
    model = Model(StableDiffusion())
    for denoise in (1.0, 0.75, 0.6, 0.3):
        theirs = run(BasicScheduler, model=model, scheduler="exponential", steps=10, denoise=denoise)[0]
        ours = run(nodes.NODES[1], model=model, steps=10, denoise=denoise)[0]
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)


# Drawing


def drawn(curves, show="sigma", process=None):
    return np.asarray(nodes.schedule_plot(curves, show, process))


def coloured(picture, i):
    """Where the picture has colour i."""
    rgb = [int(nodes.plot.COLORS[i][k : k + 2], 16) for k in (1, 3, 5)]
    return np.abs(picture.astype(int) - rgb).max(-1) < 8


def test_a_plot_shows_each_schedule_in_its_colour():
    curves = {"a": [10.0, 1.0, 0.1, 0.0], "b": [10.0, 3.0, 1.0, 0.0], "c": [5.0, 4.0, 0.1, 0.0]}
    for n in (1, 2, 3):
        picture = drawn(dict(list(curves.items())[:n]))
        assert picture.shape == (600, 960, 3)
        for i in range(3):
            assert (coloured(picture, i).sum() > 500) == (i < n)  # a legend entry has 80 pixels


def test_sigma_has_a_logarithmic_axis_where_it_exceeds_one():
    def bend(sigmas):
        """How far the middle of the curve lies below the line through its ends, as a share of its height."""
        picture = coloured(drawn({"": sigmas}), 0)
        columns = np.flatnonzero(picture.any(0))
        first, middle, last = (
            np.flatnonzero(picture[:, c]).mean() for c in np.quantile(columns, (0, 0.5, 1)).astype(int)
        )
        return (middle - (first + last) / 2) / (last - first)

    assert abs(bend([16.0, 4.0, 1.0, 0.25, 0.0625])) < 0.03
    assert bend([1.0, 0.25, 0.0625, 0.015625, 0.00390625]) > 0.2


def test_lambda_is_drawn_with_the_model_and_refused_without():
    sampling = shifted_flow()
    curves = {"sigmas": times(KarrasSchedule(), process_from(sampling), 10).tolist()}
    assert (drawn(curves, "lambda", process_from(sampling)) != drawn(curves)).any()
    with pytest.raises(ValueError, match=r"^To draw lambda, connect the model"):
        drawn(curves, "lambda")
    with pytest.raises(ValueError, match=r"^'sigmas_2' holds no sigmas; a denoise of 0 gives none\.$"):
        drawn({**curves, "sigmas_2": []})


def test_the_draw_node_gives_an_image_a_table_and_a_preview():
    sigmas = torch.tensor([14.6, 3.0, 0.0])
    given = dict(sigmas=sigmas, show="lambda", sigmas_3=torch.tensor([2.0, 0.0]), model=Model(StableDiffusion()))
    node = nodes.DrawSchedule.PREPARE_CLASS_CLONE(None)
    output = node.execute(**given)
    image, table = output.result
    assert image.shape == (1, 600, 960, 3) and image.dtype == torch.float32
    assert image.min() >= 0.0 and image.max() <= 1.0
    assert [line.split() for line in table.splitlines()] == [
        ["step", "sigmas", "sigmas_3"],
        ["0", "14.6", "2"],
        ["1", "3", "0"],
        ["2", "0"],
    ]
    assert len(output.ui.as_dict()["images"]) == 1


def test_a_picture_survives_the_way_to_image_and_back():
    (picture,) = nodes.plot.to_pictures(torch.rand(1, 5, 7, 4))
    again = nodes.plot.to_pictures(nodes.plot.to_image(picture))[0]
    assert picture.size == (7, 5) and picture.tobytes() == again.tobytes()


def test_a_grid_holds_every_picture_unsmoothed():
    picture = Image.new("RGB", (2, 2), (200, 0, 0))
    picture.paste((0, 0, 200), (1, 0, 2, 2))
    sheet = np.asarray(nodes.plot.picture_grid([("first", [picture, picture]), ("second", [picture])], "All", cell=30))
    assert (sheet == (200, 0, 0)).all(-1).sum() == (sheet == (0, 0, 200)).all(-1).sum() == 3 * 15 * 30
    with pytest.raises(ValueError, match=r"^There are no pictures"):
        nodes.plot.picture_grid([("empty", [])])


def test_a_plot_without_a_drawable_point_says_so():
    with pytest.raises(ValueError, match=r"^There is nothing to draw in the plot 'T'"):
        nodes.plot.line_plot([("a", [0, 1], [0.0, -1.0])], "T", "x", "y", log_y=True)
    with pytest.raises(ValueError, match=r"^The line 'a' has 2 x values and 1 y values"):
        nodes.plot.line_plot([("a", [0, 1], [0.0])], "T", "x", "y")
