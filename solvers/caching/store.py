"""Cached tensors, one per branch of the network's batch."""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Sequence

import torch

from .forecast import Weights, combine


class BranchStore:
    """What was computed for each branch: a conditioning on an area, in a context window, in a guidance pass ...

    A network call carries one branch or several, in any order, and the mixture may change from call to call; so a batch
    is cut into its branches when it is kept and put together from them when it is fetched. A key must contain whatever
    makes two branches different, the shape, dtype and device of the input included.

    Copies go in and copies come out: networks add to their hidden states in place.

    anchors: how many values of each key are kept, the newest ones, for forecasts.
    limit: the most bytes that may be held; what does not fit is not kept, so the caller computes in full. None: no limit.
    device: where tensors are kept; None: where they were computed.
    """

    def __init__(self, anchors: int = 1, limit: int | None = None, device: str | None = None):
        self.anchors, self.limit, self.device = anchors, limit, device
        self.peak = 0
        """The most bytes ever held."""
        self.overflowed = False
        """Whether something was not kept for lack of room."""
        self._kept: dict[Hashable, list[tuple[float, torch.Tensor]]] = {}
        self._lock = threading.Lock()  # with several GPUs there is a thread for each

    def put(self, keys: Sequence[Hashable], batch: torch.Tensor, at: float = 0.0) -> bool:
        """Keep ``batch``, whose rows are the branches ``keys`` in this order, equally many each.

        at: its coordinate along the run. A value with the coordinate of the newest one replaces it (a corrector's call at the
        same time). Returns False, and keeps nothing of these keys, where the limit would be passed.
        """
        with self._lock:
            for key, rows in zip(keys, batch.detach().chunk(len(keys)), strict=True):
                old = self._kept.get(key, [])
                if old and _same(old[-1][0], at):
                    old = old[:-1]
                old = old[-(self.anchors - 1) :] if self.anchors > 1 else []
                self._kept[key] = old
                if self.limit is not None and self.nbytes + _size(rows) > self.limit:
                    self.overflowed = True
                    for each in keys:
                        self._kept.pop(each, None)
                    return False
                copy = rows.clone() if self.device is None else rows.to(self.device, copy=True)
                self._kept[key] = [*old, (at, copy)]
            self.peak = max(self.peak, self.nbytes)
            return True

    def has(self, keys: Sequence[Hashable], anchors: int = 1, since: float = -math.inf) -> bool:
        """Whether every one of the branches has that many values, the newest with a coordinate of ``since`` or later."""
        kept = [self._kept.get(key, ()) for key in keys]
        return all(len(values) >= max(anchors, 1) and not values[-1][0] < since for values in kept)

    def get(self, keys: Sequence[Hashable], device: torch.device | None = None) -> torch.Tensor | None:
        """The newest batch of the branches ``keys``; None unless every one of them is kept."""
        if not self.has(keys):
            return None
        found = [self._kept[key][-1][1] for key in keys]
        if device is not None:
            found = [rows.to(device, non_blocking=True) for rows in found]
        return found[0].clone() if len(found) == 1 else torch.cat(found)

    def forecast(
        self, keys: Sequence[Hashable], at: float, weights: Weights, device: torch.device | None = None
    ) -> torch.Tensor | None:
        """The batch of the branches ``keys`` as it should be at ``at``; None unless every one of them is kept.

        weights: ``(at, coordinates of the anchors, oldest first) -> one weight each``, of ``forecast``.
        """
        if not self.has(keys):
            return None
        parts = []
        for key in keys:
            anchors = self._kept[key]
            values = [rows if device is None else rows.to(device, non_blocking=True) for _, rows in anchors]
            parts.append(combine(weights(at, [c for c, _ in anchors]), values))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def coordinates(self, key: Hashable) -> list[float]:
        """The coordinates of the values kept for ``key``, oldest first."""
        return [at for at, _ in self._kept.get(key, ())]

    def forget(self, before: float) -> None:
        """Drop the branches that have no value with a coordinate of ``before`` or later: they are no longer asked for."""
        for key in [key for key, anchors in self._kept.items() if anchors[-1][0] < before]:
            del self._kept[key]

    @property
    def nbytes(self) -> int:
        return sum(_size(rows) for anchors in list(self._kept.values()) for _, rows in anchors)

    def clear(self) -> None:
        self._kept.clear()


def _size(rows: torch.Tensor) -> int:
    return rows.numel() * rows.element_size()


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-4 * max(1.0, abs(a))
