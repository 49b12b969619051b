"""Score-SDE's predictor-corrector: Langevin steps at each noise level, then one step down to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from . import region
from .method import param
from .solver import Problem, Solver, Step


@dataclass(frozen=True)
class ScoreSDE(Solver):
    """Predictor-corrector sampler of score-based SDEs: at every sigma some Langevin steps, then a step down. Meant for
    hundreds of calls; take it to have noise redrawn at every level, not to save calls.

    With the score S = (alpha_s D - x) / (nu sigma_s)^2 (nu: size of the model's noise, mostly 1), a = alpha_s / alpha_t,
    q = a sigma_t / sigma_s:

        correct   x <- x + delta S + sqrt(2 delta) z,   delta = 2 a^2 (snr |z| / |S|)^2                 (langevin)
                                                        delta = 2 a^2 (snr nu sigma_s)^2                (ald)
        predict   x_t = (2 - a) x + (1 - q^2) (nu sigma_s)^2 S + nu sigma_s sqrt(1 - q^2) z     (reverse_diffusion)
                  x_t = q sigma_t / sigma_s x + (1 - q^2) alpha_t D + nu sigma_t sqrt(1 - q^2) z        (ancestral)
                  x_t = x                                                                               (none)

    which are the authors' formulas for VE (a = 1) and for VP (a^2 = 1 - beta), and apply to flow models as they stand,
    also from sigma = 1. Norms are those of each sample, over its edited part; the authors' are means over the batch. langevin
    keeps delta below the mean square of x, so that a vanishing score does no harm.

    ancestral without corrector is DDIM with eta 1 (the authors' VP version adds noise of the larger variance 1 - a^2);
    none with ald is annealed Langevin dynamics. The predictors alone converge at weak order 1. A Langevin step does not
    shrink with the number of steps, so it leaves a variance too large by a factor 1 + delta / (2 var x) however many
    there are. n_steps + 1 calls per step, n_steps without predictor.

    Raises ValueError where nothing would happen: no predictor and n_steps = 0.

    Source: Song et al. (2021), arXiv:2011.13456, algorithms 2-5 and eq. 46-47; ald: Song, Ermon (2019), arXiv:1907.05600.
    """

    id: ClassVar[str] = "ScoreSDE"
    title: ClassVar[str] = "Score-SDE predictor-corrector"
    paper: ClassVar[str] = "Song et al. (2021), arXiv:2011.13456"

    predictor: str = param(
        "ancestral",
        "The step down: ancestral keeps the right amount of noise at any step size, reverse_diffusion is the authors' choice "
        "for hundreds of steps, none leaves everything to the corrector.",
        options=("ancestral", "reverse_diffusion", "none"),
    )
    corrector: str = param(
        "langevin",
        "Size of a Langevin step: langevin measures each sample, ald takes it from sigma.",
        options=("langevin", "ald"),
    )
    n_steps: int = param(1, "Langevin steps per level, one call each; 0 for the predictor alone.", min=0, max=100)
    snr: float = param(
        0.16, "Size of a Langevin step; larger redraws more and leaves more noise.", min=0.0, max=1.0, step=0.01
    )

    draws: ClassVar[str] = "gaussian"  # several draws over one interval: a Brownian path would give the same one

    def __post_init__(self):
        super().__post_init__()
        if self.predictor == "none" and self.n_steps == 0:
            raise ValueError(f"{self.title}: with predictor = 'none', n_steps must be at least 1.")

    @property
    def convergence_order(self) -> int:
        return 1

    @property
    def calls(self) -> int:
        return self.n_steps + (self.predictor != "none")

    def nfe(self, steps: int) -> int:
        final = 1 if self.predictor == "none" and steps > 0 else 0
        return steps * self.calls + final

    def start(self, times: Sequence[float]) -> None:
        return None

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: None) -> Step:
        process = problem.process
        alpha, sigma, nu = process.alpha(s), process.sigma(s), process.noise_scale
        a = alpha / process.alpha(t)
        x0 = x
        for _ in range(self.n_steps):
            x0 = problem.denoise(x, s)
            score = (x * -((nu * sigma) ** -2)).add_(x0, alpha=alpha * (nu * sigma) ** -2)
            x = self._langevin(problem, x, score, problem.noise(s, t), nu * sigma, a)
        if self.predictor != "none" or t == 0.0:
            x0 = problem.denoise(x, s)
        if t == 0.0:
            return Step(x0, x0, None)
        if self.predictor != "none":
            q = a * process.sigma(t) / sigma
            if self.predictor == "ancestral":
                keep, take, add = q * process.sigma(t) / sigma, (1 - q * q) * process.alpha(t), process.sigma(t)
            else:
                keep, take, add = 1 - a + q * q, (1 - q * q) * alpha, sigma
            x = (x * keep).add_(x0, alpha=take).add_(problem.noise(s, t), alpha=nu * add * math.sqrt(1 - q * q))
        return Step(x, x0, None)

    def _langevin(
        self, problem: Problem, x, score: torch.Tensor, z: torch.Tensor, size: float, a: float
    ) -> torch.Tensor:
        """One Langevin step of delta = root^2; ``size`` is the standard deviation of the noise in x."""
        reach = math.sqrt(2.0) * a * self.snr
        if self.corrector == "ald":
            root = reach * size
            return torch.add(x, score, alpha=root**2).add_(z, alpha=math.sqrt(2.0) * root)
        norm = region.rms(score, problem.mask).clamp_min(torch.finfo(x.dtype).tiny)
        root = (region.rms(z, problem.mask) / norm).mul_(reach).minimum(region.rms(x, problem.mask))
        return torch.addcmul(x, score, root.square()).addcmul_(z, root, value=math.sqrt(2.0))
