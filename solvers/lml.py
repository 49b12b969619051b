"""LML: the slope turned away from its own past direction, its length kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from . import region
from .method import param
from .multistep import Place
from .turned import Turned


@dataclass(frozen=True)
class LML(Turned):
    """Levenberg-Marquardt-Langevin direction for any multistep sampler: extrapolates each slope and keeps its length.

    nbar = (1 - kappa) n + kappa n_prev
    o    = n - nbar <n, nbar> / (lambda + <nbar, nbar>),     lambda = lam_rel <n, n>
    n'   = o |n| / |o|

    n being the mean prediction of the wrapped sampler in this step, n_prev that of the step before, both unturned; norms
    and products are per sample, in inpainting over the edited part. n' replaces n. The inverse of the damped rank-one
    Hessian is what the paper takes the first lines for.

    What it does: with little change from step to step, n' is n + (kappa / lam_rel) (n - n_prev) brought to the length of n,
    an extrapolation as in gradient estimation (gamma = 1 + kappa / lam_rel there). kappa = 0, the default of the authors'
    code, gives n' = n exactly; what their published settings change (lambda 0.001, which is lam_rel 1e-7 at a latent's
    size) is rounding error of single precision. kappa > 0 and lam_rel near 1 are therefore this pack's choice. A small
    lam_rel / kappa throws n away: the result no longer follows the model. Order 1 with kappa > 0, which helps first-order
    samplers (DDIM, DEIS with one point) and mostly costs the others accuracy.

    Their DDIM turns only the noise in sigma_t eps and keeps D; here the closest are DEIS with one point (noise; on flow
    models the velocity, as theirs) and DPM-Solver++ (clean samples, as theirs).

    Raises ValueError if the sampler is not a multistep one.

    Source: Wang et al. (2025), arXiv:2505.24222, and the authors' code.
    """

    id: ClassVar[str] = "LML"
    title: ClassVar[str] = "LML"
    paper: ClassVar[str] = "Wang et al. (2025), arXiv:2505.24222"

    kappa: float = param(
        0.3,
        "Share of the previous slope in the direction that is damped; 0 changes nothing.",
        min=0.0,
        max=1.0,
        step=0.05,
    )
    lam_rel: float = param(
        1.0,
        "Damping, in units of the slope's squared length. The slope is extrapolated by kappa / lam_rel: raise it for less.",
        min=0.05,
        max=100.0,
        step=0.05,
    )
    freeze: float = param(
        0.0,
        "Share of the training time, from pure noise on, in which the slope is left as it is.",
        min=0.0,
        max=1.0,
        step=0.05,
        advanced=True,
    )

    @property
    def changes(self) -> bool:
        return self.kappa > 0.0 and self.freeze < 1.0

    def turn(self, place: Place, p: torch.Tensor, memory: Any) -> tuple[torch.Tensor, Any]:
        frozen = place.process.u_of_t(place.s) > 1.0 - self.freeze
        return (p if memory is None or frozen else self.direction(p, memory, place.mask)), p

    def direction(self, n: torch.Tensor, past: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """n' of n and n_prev."""
        tiny = torch.finfo(n.dtype).tiny
        nbar = torch.lerp(n, past, self.kappa)
        length = region.dot(n, n, mask)
        share = region.dot(n, nbar, mask) / (self.lam_rel * length + region.dot(nbar, nbar, mask)).clamp_min(tiny)
        o = n - nbar * share
        return o * (length / region.dot(o, o, mask).clamp_min(tiny)).sqrt()
