"""Defects of ComfyUI's samplers and nodes in noise, in where a run starts and ends, in guidance, in patches."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import comfy.samplers
import torch
from _defect import CORE, defect
from _exact import FLOW, VE, ExactModel, bias, constant, mixture, model_sampling, noise, weak_order
from comfy.k_diffusion import sampling as core
from comfy_extras import nodes_eps
from quickstep.solvers.exact import GaussianMixture
from quickstep.solvers.verify import uniform_lambda

MOMENTS = "mean {mean:+.2f}, variance {variance:+.0%} (flow)"
warnings.filterwarnings("ignore", message="To copy construct from a tensor")  # core's dpm_fast and dpm_adaptive


@defect(
    "`euler`, `heun`, `dpm_2`, `heunpp2` with s_churn, flow models", CORE, "heun, s_churn 10: " + MOMENTS, "0, 0",
    "`Churn` scales the signal too", lambda n: abs(n["mean"]) > 0.1,
)  # fmt: skip
def churn_flow():
    """Churn adds noise without scaling the signal down, so on flow models the state belongs to no sigma, and sigma may
    exceed 1."""
    return bias(core.sample_heun, FLOW, draws=True, s_churn=10.0)


@defect(
    "the same, any model", CORE, "largest difference of two runs with one seed {difference:.1f}; runs of `heunpp2` without "
    "churn that moved the global generator: {moved:.0f} of 1", "0; 0", "`Churn` draws from the run's seed",
    lambda n: n["difference"] > 0.1 and n["moved"] == 1,
)  # fmt: skip
def churn_seed():
    """Churn draws from torch's global generator, so a seed does not fix the picture."""
    model, x = mixture()
    times, made = [10.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        made.append(model.run(core.sample_euler, x, times, seed=7, s_churn=5.0))
    before = torch.get_rng_state()
    model.run(core.sample_heunpp2, x, times)
    moved = not torch.equal(before, torch.get_rng_state())
    return {"difference": (made[0] - made[1]).abs().max().item(), "moved": moved}


@defect(
    "`ddpm`, flow models", CORE, MOMENTS, "0, 0", "`DDIM`, eta 1, is DDPM on every model",
    lambda n: abs(n["mean"]) > 0.1,
)  # fmt: skip
def ddpm_flow():
    """It takes alpha from the variance-preserving formula 1 / sqrt(1 + sigma^2) whatever the model."""
    return bias(core.sample_ddpm, FLOW)


@defect(
    "`res_multistep_ancestral`, flow models", CORE, MOMENTS, "0, 0", "`SDEDPMSolverPP` with the model's own alpha",
    lambda n: abs(n["mean"]) > 0.1,
)  # fmt: skip
def res_multistep_ancestral_flow():
    """It adds the noise of variance exploding models and does not scale the signal down."""
    return bias(core.sample_res_multistep_ancestral, FLOW)


@defect(
    "`dpmpp_2s_ancestral_cfg_pp`", CORE,
    "variance {variance:+.0%} (VE); mean {flow_mean:+.2f}, variance {flow_variance:+.0%} (flow)", "0; 0, 0", "-",
    lambda n: abs(n["variance"]) > 0.2 and abs(n["flow_mean"]) > 0.1,
)  # fmt: skip
def dpmpp_2s_ancestral_cfg_pp():
    """Its second stage subtracts the unconditional prediction of the second call from the conditional one of the first,
    so the variance is wrong even where both predictions are the same; on flow models the noise is that of VE as well."""
    ve, flow = (bias(core.sample_dpmpp_2s_ancestral_cfg_pp, process) for process in (VE, FLOW))
    return {"variance": ve["variance"], "flow_mean": flow["mean"], "flow_variance": flow["variance"]}


@defect(
    "`euler_ancestral` with eta above 1", CORE, "eta 2, 20 steps: variance {variance:+.0%} (VE); eta 1: {one:+.0%}", "the nodes "
    "allow up to 100", "`DDIM` refuses eta above 1", lambda n: n["variance"] < -0.8,
)  # fmt: skip
def euler_ancestral_eta():
    """Where all of the noise would be replaced the code takes the step for the last one and adds none: the network then
    sees clean pictures labelled as noisy."""
    two, one = (bias(core.sample_euler_ancestral, VE, n=20, eta=eta) for eta in (2.0, 1.0))
    return {"variance": two["variance"], "one": one["variance"]}


@defect(
    "`dpmpp_sde`", CORE, "weak order {ve:.2f} (VE), {flow:.2f} (flow)", "2", "-",
    lambda n: n["ve"] < 1.5,
)  # fmt: skip
def dpmpp_sde():
    """The noises of its two stages are only correlated through a Brownian path in sigma, which was said to leave weak
    order 1."""
    return {"ve": weak_order(core.sample_dpmpp_sde, VE), "flow": weak_order(core.sample_dpmpp_sde, FLOW)}


@defect(
    "`uni_pc`, `uni_pc_bh2` with 1 step", CORE,
    "a picture of 2.0 everywhere comes out with mean {mean:.2f}, standard deviation {std:.2f}", "2.00, 0.00",
    "`UniPC`: one step is the network's prediction", lambda n: n["std"] > 0.5,
)  # fmt: skip
def uni_pc_one_step():
    """The loop calls the network but takes no step: the starting noise is returned."""
    sampler = comfy.samplers.sampler_object("uni_pc")
    model = constant()
    made = model.sample(sampler, noise(), comfy.samplers.calculate_sigmas(model_sampling(False), "normal", 1))
    return {"mean": made.mean().item(), "std": made.std().item()}


@defect(
    "`uni_pc`, `uni_pc_bh2`", CORE, "last sigma {before:g} before, {after:g} after; a constant picture keeps noise of "
    "standard deviation {left:.1e}", "0; 0; 0", "`UniPC` ends in the prediction at 0; nothing given is written to",
    lambda n: n["after"] > 0,
)  # fmt: skip
def uni_pc_in_place():
    """It ends at sigma 0.001 instead of 0, and writes that into the caller's sigmas: what is sampled next with the same
    SIGMAS does not end at 0 either."""
    sigmas = comfy.samplers.calculate_sigmas(model_sampling(False), "karras", 8)
    before = sigmas[-1].item()
    made = constant().sample(comfy.samplers.sampler_object("uni_pc"), noise(), sigmas)
    return {"before": before, "after": sigmas[-1].item(), "left": made.std().item()}


@defect(
    "`dpm_fast`, `dpm_adaptive`", CORE, "`simple`, 8 steps: noise of standard deviation {fast:.2f} and {adaptive:.2f} is "
    "left in a constant picture", "0", "`DPMSolverAdaptive` takes the step to 0", lambda n: n["fast"] > 0.1 and n["adaptive"] > 0.1,
)  # fmt: skip
def dpm_last_sigma():
    """They stop at the last sigma above 0 and return the picture with that noise in it; the sigmas in between are
    ignored."""
    sigmas = comfy.samplers.calculate_sigmas(model_sampling(False), "simple", 8)
    names = {"fast": "dpm_fast", "adaptive": "dpm_adaptive"}
    samplers = {key: comfy.samplers.sampler_object(name) for key, name in names.items()}
    return {key: constant().sample(sampler, noise(), sigmas).std().item() for key, sampler in samplers.items()}


@defect(
    "`dpm_adaptive`", CORE, "largest change of a sample when three others join its batch {change:.1e}", "0",
    "`DPMSolverAdaptive`: a step size per sample", lambda n: n["change"] > 1e-3,
)  # fmt: skip
def dpm_adaptive_batch():
    """The step size follows the error of the whole batch, so a picture depends on what it is made together with."""
    model, x = mixture()

    def run(x):
        def adaptive(model, x, sigmas, **options):
            return core.sample_dpm_adaptive(model, x, sigmas[-1], sigmas[0], **options)

        return model.run(adaptive, x, [10.0, 0.1])

    return {"change": (run(x)[:1] - run(x[:1])).abs().max().item()}


@defect(
    "the `_cfg_pp` samplers", CORE, "change of the result from 160 to 320 steps {change:.2f}, from 20 to 40 {coarse:.2f}; "
    "`euler` {euler:.3f}, {euler_coarse:.3f}", "shrinking", "-", lambda n: n["change"] > n["coarse"],
)  # fmt: skip
def cfg_pp_limit():
    """CFG++ pushes by the whole guidance at every step, however short, so more steps mean more guidance and there is no
    picture they converge to. (A property of the method, not a slip: choose its cfg for the number of steps.)"""
    model, x = mixture(cfg=1.5)
    result = {}
    for key, function in (("", core.sample_euler_cfg_pp), ("euler", core.sample_euler)):
        made = [model.run(function, x, uniform_lambda(VE, 10.0, 0.1, n)) for n in (20, 40, 160, 320)]
        change, coarse = ((a - b).square().mean().sqrt().item() for a, b in ((made[2], made[3]), (made[0], made[1])))
        result |= {key or "change": change, f"{key}_coarse".strip("_"): coarse}
    return result


@defect(
    "`Epsilon Scaling`, flow models", CORE, "factor 1.005, 40 Euler steps: mean {mean:+.4f} of 0.475, variance {variance:+.1%} "
    "against the unscaled run (scaled noise: {right_mean:.4f}, {right:+.1%})", "mean 0; as scaled noise",
    "`EpsilonScaling` scales the noise itself", lambda n: abs(n["mean"]) > 1e-3,
)  # fmt: skip
def epsilon_scaling_flow():
    """It divides x - x0, which on flow models is not the noise but the velocity: pictures lose contrast and little of the
    wanted noise is corrected."""
    caught = SimpleNamespace(
        clone=lambda: caught, set_model_sampler_post_cfg_function=lambda f: caught.__dict__.update(f=f)
    )
    nodes_eps.EpsilonScaling.execute(caught, 1.005)
    denoise = GaussianMixture.gaussian(0.5, 0.4, d=1).denoiser(FLOW)

    def noise_scaled(x, t):
        x0 = denoise(x, t)
        return (x - (x - (1.0 - t) * x0) / 1.005) / (1.0 - t)

    def outcome(positive):
        model = ExactModel(positive, model_sampling(True))
        times = torch.linspace(0.95, 0.05, 41, dtype=torch.float64)
        zero, one = model.run(core.sample_euler, torch.tensor([[0.0], [1.0]], dtype=torch.float64), times)[
            :, 0
        ].tolist()
        return zero + (one - zero) * 0.05 * 0.5, (one - zero) ** 2 * (0.05**2 * 0.4 + 0.95**2)

    plain, scaled, right = (
        outcome(f) for f in (denoise, lambda x, t: caught.f({"denoised": denoise(x, t), "input": x}), noise_scaled)
    )
    return {
        "mean": scaled[0] - plain[0],
        "variance": scaled[1] / plain[1] - 1.0,
        "right_mean": abs(right[0] - plain[0]),
        "right": right[1] / plain[1] - 1.0,
    }


@defect(
    "`TSR - Temporal Score Rescaling`", CORE, "batch of 1: {one:.0f} of 1 runs fails; batch of 2: {two:.0f} of 1", "0; 0", "-",
    lambda n: n["two"] == 1 and n["one"] == 0,
)  # fmt: skip
def tsr_batch():
    """It asks whether sigma is 0 of a tensor with one sigma per sample: more than one sample raises an error."""
    caught = SimpleNamespace(
        clone=lambda: caught, set_model_sampler_post_cfg_function=lambda f: caught.__dict__.update(f=f)
    )
    nodes_eps.TemporalScoreRescaling.execute(caught, 0.9, 1.0)
    patcher = SimpleNamespace(get_model_object=lambda name: model_sampling(False))

    def fails(batch: int) -> int:
        x, sigma = torch.zeros(batch, 4, 8, 8), torch.full((batch,), 2.0)
        try:
            caught.f({"denoised": x, "input": x, "sigma": sigma, "model": SimpleNamespace(current_patcher=patcher)})
        except RuntimeError:
            return 1
        return 0

    return {"one": fails(1), "two": fails(2)}
