"""Score-mean calibration: the mean of the predicted score, which should be zero at every level of noise, is taken off."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .. import region
from ..artifact import Artifact
from ..method import param, part
from ..process import ForwardProcess
from ..solver import Denoise, Problem
from ..transform import Transform
from .statistics import Part, over

KIND = "score_mean"
"""Of artifacts with the tensors ``lam`` (n,), increasing, and ``eta`` (n, *element): (C, 1, 1) or the latent's (C, H, W)."""

REDUCTIONS = ("channel", "full")


def measure(
    parts: Sequence[Part], process: ForwardProcess, lam: Sequence[float], reduce: str, seed: int = 0
) -> Generator[list[torch.Tensor] | None, None, torch.Tensor]:
    """eta = E[x0] - E[D], (n, *element), from one call for each sample and level; yields those of the levels done after each
    visit.

    The noise is left out of the difference, which takes most of its variance. What is left is told from the bias by two halves of
    the samples, a and b: eta is shrunk by <a, b> / |(a + b) / 2|^2, which is what of its square both have in common, and 0 where
    they have nothing in common or there is one sample only (James-Stein).
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce = {reduce!r} is not one of {', '.join(REDUCTIONS)}.")
    found = []
    for at in lam:
        t, sums, counts = process.t_of_lam(at), [0.0, 0.0], [0, 0]
        for i, one in enumerate(parts):

            def visit(problem: Problem, start: torch.Tensor, one=one, t=t, i=i) -> torch.Tensor:
                return problem.denoise(one.noised(process, start, t, seed + i), t).cpu()

            apart = one.x0.double() - one.batch(visit).double()
            first = sum(counts) % 2
            for half in (0, 1):
                rows = apart[(half + first) % 2 :: 2]
                sums[half] = sums[half] + rows.sum(0)
                counts[half] += len(rows)
            yield found or None
        found.append(_shrunk(sums, counts, reduce))
    return torch.stack(found)


def _shrunk(sums: list, counts: list[int], reduce: str) -> torch.Tensor:
    dims = list(range(1, sums[0].ndim)) if reduce == "channel" else []
    a, b = (
        (total / max(count, 1)).mean(dims, keepdim=True) if dims else total / max(count, 1)
        for total, count in zip(sums, counts, strict=True)
    )
    eta = (a * counts[0] + b * counts[1]) / sum(counts)
    common = float((a * b).sum() / eta.square().sum().clamp_min(1e-30))
    return eta * min(max(common, 0.0), 1.0)


@dataclass(frozen=True)
class ScoreMean(Transform):
    """Takes off the mean error of the predicted score, which *Find Score Mean* measured on pictures. For any sampler.

    D* = D + strength eta(k),     eta(k) = E[x0] - E[D] over pictures with noise sigma = k alpha,

    that is s* = s - E[s], as the exact score has no mean at any level of noise. eta is linear between the levels it was measured
    at and constant beyond. strength = 0 and no file change nothing.

    Honest limits: the identity holds for one condition at a time, so eta is that of the prompt and of the pictures it was measured
    on. With pictures that the model was not trained on, eta also holds how they differ from those: the samples are drawn towards
    their mean. Measured at CFG 1 and used with guidance w, the positive side is corrected by strength w (or the negative one by
    1 - w if it was measured). Well-trained models have little to correct. In inpainting the kept part is left alone.

    Raises ValueError for a latent that the file is not for.

    Source: Pang et al. (2023), arXiv:2302.10688, section 3; the difference of means without the noise, and the shrinkage, are this
    pack's.
    """

    id: ClassVar[str] = "ScoreMean"
    title: ClassVar[str] = "Score mean calibration"
    paper: ClassVar[str] = "Pang et al. (2023), arXiv:2302.10688"

    strength: float = param(
        1.0,
        "Share of the mean error that is taken off: 0 changes nothing. With a file measured at CFG 1: the guidance scale of the "
        "run.",
        min=-20.0,
        max=20.0,
        step=0.05,
    )
    calibration: Artifact | None = part(  # noqa: RUF009
        KIND, "A file of Find Score Mean in models/quickstep.", default=None
    )

    def around(self, problem: Problem, times: Sequence[float]) -> Denoise:
        if self.calibration is None or self.strength == 0.0:
            return problem.denoise
        lam, eta = (self.calibration.tensors[name].double().numpy() for name in ("lam", "eta"))
        process, element = problem.process, tuple(eta.shape[1:])

        def added(x: torch.Tensor, t: float) -> Any:
            return torch.from_numpy(self.strength * over(lam, eta, process.lam(t))).to(x, non_blocking=True)

        def denoise(x: torch.Tensor, t: float | Sequence[float]) -> torch.Tensor:
            sample = tuple(x.shape[1:])
            if len(element) != len(sample) or any(e not in (1, n) for e, n in zip(element, sample, strict=True)):
                raise ValueError(
                    f"{self.title}: the file is for latents of shape {element}, but this one has the shape {sample}; measure it "
                    "per channel, or for this size."
                )
            x0 = problem.denoise(x, t)
            at = [float(v) for v in t] if isinstance(t, Sequence) else [t]
            return region.edited(x0 + torch.stack([added(x, v) for v in at]), x0, problem.mask)

        return denoise
