"""What ``solvers.py`` measures on: mixtures whose answer is known, and the demo networks.

A problem runs a SAMPLER through ComfyUI's own sampling (noise scaling, KSAMPLER, float32) and scores the result:

- ``Oracle``: data are a mixture of 6 Gaussians in 16 dimensions; the negative prediction is the mixture's, the positive
  that of its first three components, and ComfyUI's cfg joins them, ``D = D_- + cfg (D_+ - D_-)``; cfg 1 is D_+ alone.
  Error against the exact solution of the same ODE.
- ``Samples``: the same at cfg 1, where the distribution asked for is known: energy distance of many samples to it.
- ``Network``: a demo network; error against a converged run, share of pictures with the right colour and shape.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar

import comfy.sample
import comfy.samplers
import torch
from _exact import FLOW, VE, ExactModel, model_sampling
from _pack import prompts
from quickstep.demo import judge as judging
from quickstep.demo import world
from quickstep.nodes import demo
from quickstep.nodes.attach import ledger_of, measure
from quickstep.nodes.bridge import process_of, sampler
from quickstep.solvers.compare import rms_per_sample
from quickstep.solvers.exact import GaussianMixture
from quickstep.solvers.exponential import DPMSolverPP
from quickstep.solvers.schedules import ExponentialSchedule

SEED = 41_000  # of captions and noise; the screening uses SEED + 100, which the report never sees
SHAPE = (4, 2, 2)
OUTPUT = Path(__file__).resolve().parent.parent / "output"


@dataclass(frozen=True)
class Oracle:
    """``ve``: SD 1.5's sigmas; ``flow``: a flow model's, shift 3."""

    kind: str
    rows: ClassVar[int] = 64
    flow = property(lambda self: self.kind == "flow")

    @cached_property
    def sampling(self):
        return model_sampling(self.flow, 3.0 if self.flow else 1.0)

    @cached_property
    def data(self) -> tuple[GaussianMixture, GaussianMixture]:
        """All, and the part that the prompt asks for."""
        full = GaussianMixture.random(d=16, K=6, seed=1)
        w = full.w[:3]
        return full, GaussianMixture(w / w.sum(), full.m[:3], full.v[:3], full.Q[:3])

    @cached_property
    def noise(self) -> torch.Tensor:
        return torch.randn(self.rows, *SHAPE, generator=torch.Generator().manual_seed(SEED))

    def model(self, cfg: float) -> ExactModel:
        full, part = (data.denoiser(FLOW if self.flow else VE) for data in self.data)
        return ExactModel(part, self.sampling, full, cfg)

    def run(self, how: comfy.samplers.KSAMPLER, sigmas: torch.Tensor, cfg: float, seed: int):
        model = self.model(cfg)
        return model.sample(how, self.noise, sigmas.clone(), seed), model.calls

    @lru_cache(maxsize=4)  # noqa: B019 - problems live as long as the program
    def truth(self, cfg: float) -> torch.Tensor:
        """The ODE solved to 1e-12 from ComfyUI's start down to sigma 1e-4, and the prediction there."""
        model, top = self.model(cfg), float(self.sampling.sigma_max)
        field = _Field(lambda x, t: model(x, x.new_tensor([t])))
        x = self.sampling.noise_scaling(torch.tensor(top), self.noise.double(), torch.zeros(()), True)
        return field.denoise(field.solve_ode(VE, x, top, 1e-4), 1e-4)

    def score(self, made: torch.Tensor, cfg: float) -> dict:
        return errors(made, self.truth(cfg))


class _Field:
    """A guided denoiser in the place of a mixture: all that ``solve_ode`` needs."""

    def __init__(self, denoise):
        self.denoise = denoise

    def denoiser(self, process):
        return self.denoise

    solve_ode = GaussianMixture.solve_ode


class Samples(Oracle):
    """1000 samples and the distribution they should have. ``run`` with many rows is all that differs."""

    rows = 1000

    def perfect(self, n: int, seed: int) -> torch.Tensor:
        """n exact samples of the part, float64."""
        part, g = self.data[1], torch.Generator().manual_seed(SEED + seed)
        k = torch.multinomial(part.w, n, replacement=True, generator=g)
        z = torch.randn(n, 16, generator=g, dtype=torch.float64)
        return part.m[k] + torch.einsum("nij,nj->ni", part.Q[k], part.v[k].sqrt() * z)

    @cached_property
    def wanted(self) -> torch.Tensor:
        return self.perfect(2000, 1)

    @property
    def floor(self) -> float:
        """Standard deviation of the energy distance of 500 perfect samples."""
        return float(torch.tensor([self.energy(self.perfect(500, seed)) for seed in range(2, 22)]).std())

    def score(self, made: torch.Tensor, cfg: float) -> dict:
        x, half = made.double().flatten(1), self.rows // 2
        found = {"energy": self.energy(x), "tune": self.energy(x[:half]), "held": self.energy(x[half:])}
        return {**found, "variance": float(x.var(0).sum() / self.wanted.var(0).sum() - 1.0)}

    def energy(self, x: torch.Tensor) -> float:
        """Energy distance, unbiased: around 0 for perfect samples, and sometimes below."""
        return float(2.0 * torch.cdist(x, self.wanted).mean() - torch.pdist(x).mean() - self.spread)

    @cached_property
    def spread(self) -> torch.Tensor:
        return torch.pdist(self.wanted).mean()


@dataclass(frozen=True)
class Network:
    """A demo network, sampled as KSampler does. screening: 4 pictures of other captions and noise."""

    kind: str
    pictures: int = 16
    screening: bool = False
    size: int = 32
    reference: ClassVar[int] = 200

    @cached_property
    def model(self):
        return measure(demo.load_model(self.kind))

    @cached_property
    def sampling(self):
        return self.model.get_model_object("model_sampling")

    @cached_property
    def setting(self):
        """Noise, conditionings, and what colour and shape were asked for."""
        seed, clip = SEED + 100 * self.screening, demo.load_clip()
        _, attributes, captions = world.sample(self.pictures, torch.Generator().manual_seed(seed))
        shape = (self.pictures, 3, self.size, self.size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
        asked = {name: attributes[name] for name in ("colour", "shape")}
        return noise, prompts(clip, captions), prompts(clip, [""]), asked

    @cached_property
    def judge(self):
        return judging.load_judge()

    def run(self, how: comfy.samplers.KSAMPLER, sigmas: torch.Tensor, cfg: float, seed: int):
        noise, positive, negative, _ = self.setting
        with torch.inference_mode():
            made = comfy.sample.sample_custom(
                self.model, noise, cfg, how, sigmas.clone(), positive, negative, torch.zeros_like(noise),
                disable_pbar=True, seed=seed,
            )  # fmt: skip
        return made, ledger_of(self.model).runs[-1].calls

    def converged(self, cfg: float, steps: int) -> torch.Tensor:
        process = process_of(self.model)
        sigmas = ExponentialSchedule()(process, process.t_max, process.t_min, steps)
        how = sampler(DPMSolverPP(order=3, lower_order_final="never"))
        return self.run(how, torch.from_numpy(sigmas).float(), cfg, 0)[0]

    @lru_cache(maxsize=4)  # noqa: B019 - problems live as long as the program
    def truth(self, cfg: float) -> torch.Tensor:
        """Kept in ``output/``: it is worth several hundred runs of 10 calls."""
        size = "" if self.size == 32 else f"-{self.size}px"
        name = f"reference-{self.kind}{size}-{cfg:g}-{self.pictures}-{SEED + 100 * self.screening}-{self.reference}.pt"
        file = OUTPUT / name
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}")
            torch.save(self.converged(cfg, self.reference), partial)
            os.replace(partial, file)
        return torch.load(file)

    def score(self, made: torch.Tensor, cfg: float) -> dict:
        shown = (made + 1) / 2
        if self.size != 32:
            shown = torch.nn.functional.interpolate(shown, (32, 32), mode="area")
        right = judging.agreement(self.judge, shown, self.setting[3])["colour+shape"]
        return {**errors(made, self.truth(cfg)), "right": right}


def errors(made: torch.Tensor, truth: torch.Tensor) -> dict:
    """Mean, median and ``geometric`` mean over samples of the RMS error; ``tune`` and ``held``: the mean over either half of the
    samples.

    The best of many candidates is chosen by ``tune`` and reported by ``held``, or the luck of the draw would be reported.
    """
    each = torch.tensor(rms_per_sample(made, truth))
    half = len(each) // 2
    found = {"mean": each.mean(), "median": each.median(), "tune": each[:half].mean(), "held": each[half:].mean()}
    found["geometric"] = each.clamp(min=1e-9).log().mean().exp()
    return {key: float(value) for key, value in found.items()}


@lru_cache(maxsize=16)
def problem(name: str, pictures: int = 16):
    """``ve``, ``flow``, ``ve samples``, ``flow samples``, ``<network>``, ``<network> screening``."""
    kind, _, how = name.partition(" ")
    if kind in ("ve", "flow"):
        return Samples(kind) if how else Oracle(kind)
    return Network(kind, 4 if how else pictures, screening=bool(how))
