"""Calibration sets: seeds and prompts of the user's graph as batches that solvers can be run on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import torch

from ..solvers.artifact import FoundFor, now, process_name
from ..solvers.calibration.cohort import Batch, Cohort, Visit
from .bridge import empty_as_model_wants, process_of, visitor
from .fingerprint import fingerprint


@dataclass(frozen=True, eq=False)
class Samples:
    """What the graph samples: the guided model, its prompts, a latent whose batch is how many samples are run at once."""

    model: Any
    positives: list
    negative: Any
    latent: dict
    cfg: float
    seed: int

    def split(self, count: int) -> tuple[Cohort, Cohort, Cohort]:
        """Samples for the fit, as many to select by, and half as many to report on, all of other seeds.

        The r-th sample has the r-th prompt, and starts again with the first one after the last. Batches of the
        fit hold a quarter of it at most, rounded up: for some things one of them is enough.
        """
        half, quarter = max(count // 2, 2), math.ceil(count / 4)
        edges = [(0, count, quarter), (count, 2 * count, count), (2 * count, 2 * count + half, count)]
        fit, select, report = (
            Cohort([batch for _, batch in self.numbered(range(a, b), most)], size=b - a) for a, b, most in edges
        )
        return fit, select, report

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one latent."""
        return tuple(self.latent["samples"].shape[1:])

    def found_for(self, any_size: bool = False, **more) -> FoundFor:
        """The provenance of what was found on these samples; without their shape if it serves ``any_size``."""
        return FoundFor(
            model=fingerprint(self.model), process=process_name(process_of(self.model)), cfg=self.cfg,
            shape=None if any_size else self.shape, seed=self.seed, created=now(), **more,
        )  # fmt: skip

    def numbered(self, rows: range, most: int | None = None) -> list[tuple[list[int], Batch]]:
        """Batches of these samples, and which are in each: as many as the latent has, or ``most``; of one prompt, unless prompts
        can stand side by side in a batch. In the order of their first samples, so that a few batches have different prompts."""
        together, count = len(self.latent["samples"]), len(self.positives)
        together = min(together, most or together)
        if _alike(self.positives):
            parts = [rows[i : i + together] for i in range(0, len(rows), together)]
            joined = [(list(part), _joined([self.positives[r % count] for r in part])) for part in parts]
            return [(part, self._batch(positive, part)) for part, positive in joined]
        found = []
        for p, positive in enumerate(self.positives):
            mine = [r for r in rows if r % count == p]
            chunks = [mine[i : i + together] for i in range(0, len(mine), together)]
            found += [(chunk, self._batch(positive, chunk)) for chunk in chunks]
        return sorted(found, key=lambda pair: pair[0][0])

    def _batch(self, positive, rows: list[int]) -> Batch:
        start = self.latent["samples"][: len(rows)]
        noise = torch.cat([comfy.sample.prepare_noise(start[:1], self.seed + r) for r in rows])
        mask = self.latent.get("noise_mask")
        mask = mask[: len(rows)] if mask is not None and len(mask) > 1 else mask
        return batch_of(self.model, positive, self.negative, self.cfg, noise, start, mask, self.seed)


def batch_of(
    model, positive, negative, cfg: float, noise: torch.Tensor, start: torch.Tensor, mask=None, seed: int = 0
) -> Batch:
    """Runs from this noise on these latents, as ComfyUI samples them with these conditionings."""
    top = process_of(model).t_max
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)

    def batch(visit: Visit) -> Any:
        made = []
        one_step = torch.tensor([top, 0.0])
        guider.sample(
            noise, start, visitor(lambda problem, x: made.append(visit(problem, x))), one_step,
            denoise_mask=mask, disable_pbar=True, seed=seed,
        )  # fmt: skip
        return made[0]

    return batch


def samples(model, positives: list, negative, latent: dict, cfg: float, seed: int) -> Samples:
    """Refuses, in one sentence, latents that cannot be calibrated on."""
    if latent["samples"].is_nested:
        raise ValueError("Calibrations take one kind of latent, not a combined audio and video latent.")
    return Samples(model, positives, negative, empty_as_model_wants(model, latent), cfg, seed)


def _alike(conditionings: list) -> bool:
    """Whether each is one plain prompt for one sample, and all are of the same shape."""
    plain = all(len(c) == 1 and c[0][1].keys() <= {"pooled_output"} and c[0][0].shape[0] == 1 for c in conditionings)
    return (
        plain
        and len({(c[0][0].shape, *(None if v is None else v.shape for v in c[0][1].values())) for c in conditionings})
        == 1
    )


def _joined(conditionings: list) -> list:
    """One conditioning with a prompt for each sample."""
    options = {}
    pooled = [c[0][1].get("pooled_output") for c in conditionings]
    if all(p is not None for p in pooled):
        options["pooled_output"] = torch.cat(pooled)
    return [[torch.cat([c[0][0] for c in conditionings]), options]]
