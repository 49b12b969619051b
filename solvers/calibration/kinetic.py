"""Sigmas uniform in the time of the path from noise to data that takes the least kinetic energy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ..method import param
from ..process import ForwardProcess
from ..solver import Problem
from .cohort import Cohort
from .curve import Curve
from .klub import predicted
from .proposal import Measured, Measuring, Proposal, rounded
from .teacher import Trajectories

_FLOOR, _FINE = 1e-4, 4001


@dataclass(frozen=True)
class KineticOptimal(Proposal):
    """Measures how well your model tells its samples apart at each noise level, and goes from noise to data with the least kinetic
    energy. On the demo networks that brought nothing. One measurement gives every number of steps; it knows nothing of the sampler.

    Among x_r = alpha_r x_0 + sigma_r eps, all of which one model serves, it takes the path with the least int E || u_r ||^2 dr,

        E || u ||^2 = m alpha'^2 + sigma'^2 - alpha^2 (d log k / dr)^2 mmse(k),      k = sigma / alpha,

    with m = E x_0^2 and mmse = E (x_0 - D)^2, all per number of the latent, and its sigmas are those of r = i / n. In polar
    coordinates, sqrt(m) alpha = s cos phi and sigma = s sin phi, this is

        s'^2 + s^2 Lambda(phi) phi'^2,      Lambda = 1 - mmse(k) / (m sin^2 phi),      k = sqrt(m) tan phi,

    Lambda being the data separation. It is a plane, with the angle psi = int_0^phi sqrt(Lambda): the best path is the chord from
    angle Psi = psi(pi / 2) to 0, r its share. Lambda = 1 (points far apart) gives the straight path of flow models, sigma = 1 - r;
    Lambda = 0 (one Gaussian) the circle of variance preserving models, on which no motion costs anything: then r is the angle,
    which is the KL-optimal schedule with c = sqrt(m).

    ``levels`` x ``draws`` network calls per sample. mmse is that of the model's own samples, guidance included.

    Energy is not the error of few steps: sigmas crowd at low noise. So the proposal is tried, and others on the way to it. On a
    mixture of Gaussians, mean RMS of 200 samples to the solution (Karras, as proposed, 40 % of the way from Karras): 8 steps, Euler
    .109 .108 .085, 2M .053 .101 .031; 10 steps, Euler .079 .095 .063, 2M .025 .082 .013.

    On the demo networks, 8 steps of 2M, CFG 4, 12 samples, it brings nothing: UNet .307 (best usual, Uniform: .048), flow DiT .212
    (Beta: .046), and worse than the usual one all the way.

    Source: Shaul, Chen, Nickel, Le, Lipman (2023), arXiv:2306.06626 (read in its abstract); energy and solution were derived here.
    The paper trains models with such paths, and finds that the straight path is best for many images of high dimension.
    """

    id: ClassVar[str] = "KineticOptimal"
    title: ClassVar[str] = "Kinetic optimal path"
    paper: ClassVar[str] = "Shaul et al. (2023), arXiv:2306.06626"

    levels: int = param(20, "Noise levels at which is measured, each a network call.", min=8, max=200)
    draws: int = param(
        1, "Noisings of each sample. More make the measurement less noisy, at as many calls.", min=1, max=64
    )

    @property
    def most(self) -> int:
        return 1000

    def measure(self, cohort: Cohort, process: ForwardProcess, teacher: Trajectories | None, steps: int) -> Measuring:
        scale = process.noise_scale
        moment = float(torch.cat(cohort.targets).square().mean()) / scale**2
        ends = np.exp(Curve(process, process.t_max, process.t_min, steps).ends)
        first, last = np.arctan(ends / math.sqrt(moment))
        phi = np.linspace(first, last, self.levels)
        k = math.sqrt(moment) * np.tan(phi)
        total, count = np.zeros(self.levels), 0
        for draw in range(self.draws):
            for b, (batch, x0) in enumerate(zip(cohort.batches, cohort.targets, strict=True)):
                seed = draw * len(cohort.batches) + b

                def visit(problem: Problem, x: torch.Tensor, x0=x0, seed=seed) -> list[float]:
                    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(x) * scale
                    clean = x0.to(x)
                    off = [predicted(problem, clean + level * eps, level) - clean for level in k]
                    return torch.stack([d.square().flatten(1).mean(1).sum() for d in off]).tolist()

                total += np.array(cohort.visit(batch, visit)) / scale**2
                count += len(x0)
                yield None
        yield {"log_ratio": rounded(np.log(k)), "mmse": rounded(total / count), "moment": moment}

    def times(self, measured: Measured, process: ForwardProcess, steps: int, order: int) -> list[float]:
        k, m = np.exp(measured["log_ratio"]), measured["moment"]
        curve = Curve(process, process.t_max, process.t_min, steps)
        made = path(k, np.array(measured["mmse"]), m, math.exp(curve.ends[0]), steps)
        return curve.times(np.log(made[1:]))


def separation(k: np.ndarray, mmse: np.ndarray, moment: float) -> np.ndarray:
    """Lambda, of which only what lies between 0 and 1 has a meaning: the rest is noise of the measurement."""
    return np.clip(1.0 - mmse * (1.0 / moment + 1.0 / k**2), _FLOOR, 1.0)


def path(k: np.ndarray, mmse: np.ndarray, moment: float, highest: float, steps: int) -> np.ndarray:
    """k_0 = highest > ... > k_{n-1}; k_n would be 0. k, mmse: what was measured, falling."""
    phi = np.linspace(0.0, 0.5 * math.pi, _FINE)
    rates = np.sqrt(np.interp(phi, np.arctan(k / math.sqrt(moment))[::-1], separation(k, mmse, moment)[::-1]))
    psi = np.append(0.0, np.cumsum(0.5 * (rates[1:] + rates[:-1]) * np.diff(phi)))
    first = np.interp(math.atan(highest / math.sqrt(moment)), phi, psi)
    whole = psi[-1]
    begun = share(first, whole)
    r = begun + (1.0 - begun) * np.arange(steps) / steps
    angle = np.angle((1.0 - r) * np.exp(1j * whole) + r)
    return math.sqrt(moment) * np.tan(np.interp(angle, psi, phi))


def share(angle: float, whole: float) -> float:
    """r at which the chord from e^{i whole} to 1 has this angle."""
    z = np.exp(1j * whole)
    return float((z.imag - math.tan(angle) * z.real) / (z.imag + math.tan(angle) * (1.0 - z.real)))
