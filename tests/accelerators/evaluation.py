"""Accelerators of whole network calls."""

from quickstep_under_test.solvers.caching.adaptive_diffusion import AdaptiveDiffusion
from quickstep_under_test.solvers.caching.easycache import EasyCachePaper
from quickstep_under_test.solvers.caching.sada import SADA
from quickstep_under_test.solvers.caching.step_forecast import StepForecast

from . import Variant

MODELS = ("unet", "sdxl", "sd3", "flux", "flow", "eps")

VARIANTS = [
    Variant(StepForecast(tol=1.0), StepForecast(tol=0.0), models=MODELS),
    Variant(
        StepForecast(mode="interval", interval=3, warmup=1),
        StepForecast(mode="interval", interval=1),
        models=MODELS,
        name="interval",
    ),
    Variant(
        StepForecast(mode="budget", share=0.5),
        StepForecast(mode="budget", share=1.0),
        models=("unet", "flow"),
        name="budget",
    ),
    Variant(
        StepForecast(mode="growing", forecast="chebyshev", order=4, gain=1.0, adapt=False, interval=3),
        StepForecast(mode="schedule"),
        models=("unet", "flow"),
        name="spectrum",
    ),
    Variant(EasyCachePaper(tau=3.0), EasyCachePaper(tau=0.0), models=("unet", "sd3", "flow")),
    Variant(SADA(coefficients="published"), SADA(max_interval=0), models=("unet", "sd3", "flow")),
    Variant(AdaptiveDiffusion(threshold=1.0), AdaptiveDiffusion(threshold=0.0), models=("unet", "sd3", "flow")),
]
