"""A+: one start noise for all inputs, the best of many on references, found by a race.

A deterministic sampler maps a start noise x_T and an input y (a picture to enlarge, to complete, to restore) to a result
x_0 = h(x_T, y). Of all x_T one that is good for every y is wanted,

    x_T* = arg min  mean over references (y_r, x_r) of  RMS( h(x_T, y_r) - x_r )
           x_T among N draws of N(0, I)

In the race all candidates run on the first few references, the best share ``keep`` of them on 1 / keep times as many, and so on
until what is left has run on all. No candidate runs twice on one reference.

If pictures are Gaussian given the input, x_r ~ N(mu_r, s^2 I), a flow model's exact ODE ends at mu_r + s x_T, and the expected
square error of d numbers is s^2 (|x_T|^2 / d + 1): best is no noise at all, and of drawn noises the shortest. Those are all
about equally long, so little is gained there. The best of 64 on 16 references, on others, as a share of a random noise's error:

    latent         4x8x8   4x32x32  4x64x64  16x128x128     no noise
    its error      0.96    0.987    0.992    0.999          0.71

The paper's gain must come from what networks have beyond that.

Source: Ma et al. (2023), arXiv:2305.15357 (one x_T for all inputs, chosen among random ones on a small set of references; there by
LPIPS). The RMS of latents and the race are this pack's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..solver import Problem, sample
from .cohort import Batch, Cohort, Running
from .families import Plan
from .losses import LOSSES

KIND = "start_noise"
"""Of artifacts with the tensor ``noise``, of the shape of one latent; their table has the ``seed`` it was drawn with."""

RANDOM = 8
"""Noises that did not take part, to which the winner is compared on references kept aside."""


class Reference(NamedTuple):
    """What should come out, (1, *element), on the CPU, and runs with its input: ``begin(noise)`` is a batch of them, one from
    each row of ``noise``, (b, *element)."""

    x0: torch.Tensor
    begin: Callable[[torch.Tensor], Batch]


class Seen(NamedTuple):
    """The least loss of those that have run on so many references, after so many network calls."""

    calls: int
    references: int
    loss: float


@dataclass
class Race:
    """A race of the noises ``draw(0)``, ``draw(1)``, ..., each (1, *element), on references, with a deterministic plan.

    few: references that all run on; as many as there are, or more: no race, all on all. keep: share of the candidates that go on.
    together: noises in a batch. errors: for each candidate those on the first references, in their order; trail: what is drawn.
    """

    references: Sequence[Reference]
    plan: Plan
    draw: Callable[[int], torch.Tensor]
    candidates: int
    few: int = 4
    keep: float = 0.25
    together: int = 4
    errors: dict[int, list[float]] = field(default_factory=dict)
    trail: list[Seen] = field(default_factory=list)
    runs: Cohort = field(default_factory=lambda: Cohort([]))

    def rungs(self) -> list[tuple[int, int]]:
        """How many candidates run on how many references."""
        count, known, every = self.candidates, min(self.few, len(self.references)), len(self.references)
        found = [(count, known)]
        while known < every and count > 1:
            count, known = math.ceil(self.keep * count), min(math.ceil(known / self.keep), every)
            if count > 1:  # else the last one has won
                found.append((count, known))
        return found

    @property
    def visits(self) -> int:
        """Batches of the whole race."""
        before, total = 0, 0
        for count, known in self.rungs():
            total += math.ceil(count / self.together) * (known - before)
            before = known
        return total

    def run(self) -> Running:
        """The race. It may be left after any visit: ``best`` is the best so far."""
        going, before = list(range(self.candidates)), 0
        for count, known in self.rungs():
            going, lowest = going[:count], math.inf
            for chunk in _chunks(going, self.together):
                for reference in self.references[before:known]:
                    for i, error in zip(chunk, self._errors(chunk, reference), strict=True):
                        self.errors.setdefault(i, []).append(error)
                    yield
                lowest = min(lowest, *map(self.loss, chunk))
                self.trail.append(Seen(self.runs.calls, known, lowest))
            going.sort(key=self.loss)
            before = known

    def loss(self, i: int) -> float:
        """Mean error of a candidate on the references that it has run on."""
        return LOSSES["rms"](torch.tensor(self.errors[i], dtype=torch.float64))

    @property
    def best(self) -> int | None:
        """The best of those that have run on most references; in every rung they run in the order of the one before."""
        return min(self.errors, key=lambda i: (-len(self.errors[i]), self.loss(i)), default=None)

    @property
    def tried(self) -> list[float]:
        """Mean errors, least first, on the first references, of all that have run on those."""
        if self.best is None:
            return []
        first = min(self.rungs()[0][1], len(self.errors[self.best]))
        return sorted(LOSSES["rms"](torch.tensor(e[:first])) for e in self.errors.values() if len(e) >= first)

    def compared(self, aside: Sequence[Reference]) -> Running:
        """Errors on references kept aside, (1 + RANDOM, references): of the best, and of noises that did not take part."""
        assert self.best is not None
        them = [self.best, *range(self.candidates, self.candidates + RANDOM)]
        columns = []
        for reference in aside:
            column = []
            for chunk in _chunks(them, self.together):
                column += self._errors(chunk, reference)
                yield
            columns.append(torch.tensor(column))
        return torch.stack(columns, 1)

    def _errors(self, chunk: Sequence[int], reference: Reference) -> list[float]:
        def visit(problem: Problem, x: torch.Tensor) -> torch.Tensor:
            return sample(problem, self.plan.solver, x, self.plan.times).cpu()

        noise = torch.cat([self.draw(i) for i in chunk])
        apart = self.runs.visit(reference.begin(noise), visit) - reference.x0
        return apart.flatten(1).square().mean(1).sqrt().tolist()


def _chunks(them: Sequence[int], size: int) -> list[Sequence[int]]:
    return [them[i : i + size] for i in range(0, len(them), size)]
