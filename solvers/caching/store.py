"""Cached tensors, one per branch of the network's batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch


class BranchStore:
    """What was computed for each branch: a conditioning on an area, in a context window, in a guidance pass ...

    A network call carries one branch or several, in any order, and the mixture may change from call to call; so a batch
    is cut into its branches when it is kept and put together from them when it is fetched. A key must contain whatever
    makes two branches different, the shape, dtype and device of the input included.

    Copies go in and copies come out: networks add to their hidden states in place.
    """

    def __init__(self):
        self._kept: dict[Hashable, torch.Tensor] = {}
        self.peak = 0
        """The most bytes ever held."""

    def put(self, keys: Sequence[Hashable], batch: torch.Tensor) -> None:
        """Keep ``batch``, whose rows are the branches ``keys`` in this order, equally many each."""
        for key, rows in zip(keys, batch.detach().chunk(len(keys)), strict=True):
            self._kept[key] = rows.clone()
        self.peak = max(self.peak, self.nbytes)

    def get(self, keys: Sequence[Hashable]) -> torch.Tensor | None:
        """The batch of the branches ``keys``; None unless every one of them is kept."""
        if any(key not in self._kept for key in keys):
            return None
        found = [self._kept[key] for key in keys]
        return found[0].clone() if len(found) == 1 else torch.cat(found)

    @property
    def nbytes(self) -> int:
        return sum(rows.numel() * rows.element_size() for rows in list(self._kept.values()))

    def clear(self) -> None:
        self._kept.clear()
