"""Defects of ComfyUI's schedulers."""

from __future__ import annotations

import comfy.samplers
from _defect import SCHEDULES, defect
from _exact import model_sampling
from comfy.k_diffusion import sampling as core


@defect(
    "`ddim_uniform`", SCHEDULES, "12 steps asked, {twelve:.0f} given; 30 asked, {thirty:.0f} given", "12; 30",
    "`UniformSchedule`: as many as asked", lambda n: n["thirty"] != 30,
)  # fmt: skip
def ddim_uniform_steps():
    """The stride is rounded down to whole training steps, so there may be more steps than asked for."""
    twelve, thirty = (
        len(comfy.samplers.calculate_sigmas(model_sampling(False), "ddim_uniform", n)) - 1 for n in (12, 30)
    )
    return {"twelve": twelve, "thirty": thirty}


@defect(
    "`beta`", SCHEDULES, "200 steps asked, {some:.0f} given; 1000 asked, {many:.0f} given", "200; 1000",
    "`BetaSchedule` keeps nodes apart instead", lambda n: n["many"] != 1000,
)  # fmt: skip
def beta_steps():
    """Nodes that round to the same training step are dropped. (Below about 200 steps there are none.)"""
    some, many = (len(comfy.samplers.calculate_sigmas(model_sampling(False), "beta", n)) - 1 for n in (200, 1000))
    return {"some": some, "many": many}


@defect(
    "`kl_optimal` with 1 step", SCHEDULES, "the sigmas that are no number: {bad:.0f}", "0", "`CosineSchedule`: [sigma_max, 0]",
    lambda n: n["bad"] > 0,
)  # fmt: skip
def kl_optimal_one_step():
    """It divides by the number of steps minus 1."""
    sigmas = comfy.samplers.calculate_sigmas(model_sampling(False), "kl_optimal", 1)
    return {"bad": int(sigmas.isnan().sum())}


@defect(
    "`LaplaceScheduler`", SCHEDULES, "20 steps asked, {steps:.0f} given; the last sigma is {last:.3f}", "20; 0",
    "-", lambda n: n["last"] > 0,
)  # fmt: skip
def laplace_end():
    """It returns as many sigmas as steps and no final 0: one step fewer, and its noise is left in the picture."""
    sigmas = core.get_sigmas_laplace(20, 0.0291675, 14.614642)
    return {"steps": len(sigmas) - 1, "last": sigmas[-1].item()}
