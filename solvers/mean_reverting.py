"""Mean-reverting models: samples that turn into a given picture plus noise, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from .kernel import fit
from .solver import Problem, SameCost, Step


@dataclass(frozen=True, eq=False)
class MeanReverting(SameCost):
    """Runs a sampler on models trained to undo a given picture plus noise (IR-SDE, DA-CLIP: rain, blur, low light), whose
    process ends at that picture instead of zero. Of no use for ordinary models.

    The process, with mu the given (degraded) picture and its usual alpha and sigma, is

        x_t = alpha_t x_0 + (1 - alpha_t) mu + sigma_t eps.

    So y = x - mu is an ordinary state of the data x_0 - mu, whose prediction is D - mu: the sampler runs on y, and mu
    is added again. That is the paper's solvers of every kind, with their terms in mu, such as

        x_t = (sigma_t / sigma_s) x_s + alpha_t (1 - e^{-h}) D + mu (1 - sigma_t / sigma_s + (sigma_t / sigma_s) alpha_s - alpha_t)

    for data prediction of order 1. Order, calls and noise are the sampler's. mu = 0 is the sampler itself, bit for bit.

    IR-SDE has sigma^2 = sigma_inf^2 (1 - alpha^2), sigma_inf = 50 / 255. The state x and the predictions D are in these
    coordinates, from x = alpha_T x_0 + (1 - alpha_T) mu + sigma_T z on: whoever starts the run adds mu. For a network that
    predicts noise, D = (x - sigma eps - (1 - alpha) mu) / alpha. On rectified flow this is a flow from N(mu, 1) to the
    data. On variance-exploding models alpha is 1, mu cancels and nothing changes: w = (x - mu) / alpha + mu, as such
    a model is best given to ComfyUI, is ordinary already, if its network is asked at x = alpha (w - mu) + mu.

    plain_start: the run begins with an x without its share of mu, as ComfyUI makes it; the first step adds that.
    mu: broadcasts against x, in the same units (of a latent model: its latent). Raises ValueError where it does not.

    Source: Li et al. (2025), arXiv:2502.07856; the process is Luo et al.'s (2023), arXiv:2301.11699. That running on x - mu is
    the same is our derivation, checked against the published formulas.
    """

    id: ClassVar[str] = "MeanReverting"
    title: ClassVar[str] = "MR Sampler (mean-reverting)"
    paper: ClassVar[str] = "Li et al. (2025), arXiv:2502.07856"

    mu: torch.Tensor  # pyright: ignore[reportGeneralTypeIssues]  (part() without a default gives none)
    plain_start: bool = False

    def __eq__(self, other: object) -> bool:
        return self is other  # two tensors do not compare to one truth, and Wrapper would compare the solvers alone

    def __hash__(self) -> int:
        return id(self)

    @property
    def convergence_order(self) -> int:
        return self.solver.convergence_order

    def start(self, times: Sequence[float]) -> Any:
        return self.plain_start, self.solver.start(times)

    def step(self, problem: Problem, x: torch.Tensor, s: float, t: float, state: Any) -> Step:
        mu = self._fitting(x)
        plain, inner = state
        if plain:
            x = x + mu * (1.0 - problem.process.alpha(s))

        def denoise(y: torch.Tensor, t: Any) -> torch.Tensor:
            return problem.denoise(y + mu, t) - mu

        step = self.solver.step(replace(problem, denoise=denoise), x - mu, s, t, inner)
        return Step(step.x + mu, step.x0 + mu, (False, step.state))

    def _fitting(self, x: torch.Tensor) -> torch.Tensor:
        mu = tuple(self.mu.shape)
        if len(mu) > x.ndim or any(m not in (1, n) for m, n in zip(mu[::-1], tuple(x.shape)[::-1], strict=False)):
            raise ValueError(f"{self.title}: mu has shape {mu}, which does not fit samples of shape {tuple(x.shape)}.")
        return fit(self.mu, x)
