"""Attention and feed-forward layers that keep their outputs: what is reused in which call, and how much work that is.

A *layer* here is what is added to the hidden state with one gate: the output of an attention (after its projection) or
of a feed-forward network, before the gate. Where attention is joint and no module of its own, it is the attention
itself, before the projections. Gates and modulations are always fresh.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .accelerator import Accelerator, Plan, Run, Session
from .declared import place, room
from .forecast import lagrange
from .store import BranchStore
from .tracker import Position

SELF, CROSS, TEMPORAL, MLP, FUSED = "self", "cross", "temporal", "mlp", "fused"
"""Kinds of layers; ``FUSED`` is an attention and a feed-forward network with one output projection (Flux's single
blocks)."""
KINDS = (SELF, CROSS, TEMPORAL, MLP, FUSED)

FEW = 10
"""Fewer steps than this leave little to reuse, and every call counts."""

Out = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Layer:
    """name: unique in its network. kind: one of ``KINDS``."""

    name: str
    kind: str


class Tally:
    """The share of a network's work that was computed in one pass.

    whole: the network's work; None: that of all counted layers together (the rest is left out).
    """

    def __init__(self, whole: float | None = None):
        self.whole = whole
        self._counted = self._saved = 0.0

    def count(self, work: float, computed: float = 1.0) -> None:
        self._counted += work
        self._saved += work * (1.0 - computed)

    @property
    def share(self) -> float:
        whole = self.whole or self._counted
        return max(1.0 - self._saved / whole, 0.0) if whole else 1.0


KEYS = {"k", "v", "to_k", "to_v", "k_proj", "v_proj", "kv_linear", "k_img", "v_img"}
"""Names of the layers that see the other sequence in a cross-attention."""


def layer_work(module: nn.Module, kind: str, own: float, other: float | None = None) -> float:
    """Multiply-adds of an attention or a feed-forward network for one row.

    own: tokens of its stream. other: for ``CROSS`` tokens of the conditioning; for ``SELF`` those of the second stream
    of a joint attention (its layers are called ``add_...``, ``to_add_...``), if there is one.
    """
    total, inner = 0.0, 0
    for name, part in module.named_modules():
        if not isinstance(part, nn.Linear):
            continue
        second = (
            name.rsplit(".", 1)[-1] in KEYS if kind == CROSS else name.startswith(("add_", "to_add"))
        )  # sees the other tokens
        total += part.in_features * part.out_features * (other if second and other is not None else own)
        inner = part.in_features
    if kind == MLP:
        return total
    rows = own if kind == CROSS or other is None else own + other
    columns = own if other is None else other if kind == CROSS else own + other
    return total + 2 * rows * columns * inner


class LayerReuse(Accelerator):
    """Abstract: an accelerator that treats every layer by its kind. Its session is a ``LayerSession``."""

    @abstractmethod
    def every(self, kind: str) -> int:
        """One in this many calls computes the layers of a kind in full; 1 leaves them alone."""

    def note(self, run: Run) -> str | None:
        return few(self, run)


def few(accelerator: Accelerator, run: Run) -> str | None:
    """The note for runs with so few steps that reuse does harm."""
    if not 0 < run.steps < FEW:
        return None
    return f"{accelerator.title}: with {run.steps} steps there is little to reuse and each step counts; {FEW} or more are better"


class LayerSession(Session):
    """Abstract: knows which kinds are due, counting calls since each was computed in full.

    A kind with interval N is computed in one of N calls, counted from the last one in which it was; the first calls of
    a run and of the window, and the last steps, compute everything.
    """

    def __init__(self, settings: LayerReuse, run: Run, warmup: int, tail: int, anchors: int, limit: int, device: str):
        super().__init__(run)
        self.settings, self.warmup, self.tail, self.anchors = settings, warmup, tail, anchors
        self.store = BranchStore(anchors, room(limit), place(device))
        self.age: dict[str, int] = {}
        self.since: dict[str, float] = {}
        """For each kind the coordinate of the last call in which it was due: what is older belongs to a branch that had
        no part in it."""
        self.reused: frozenset[str] = frozenset()
        """Kinds that are not computed in full in the current call."""

    def decide(self, t: float, position: Position) -> Plan:
        self.reused = frozenset()
        if not self.active(t) or all(self.settings.every(kind) == 1 for kind in KINDS):
            self.flush()
            return Plan.PLAIN
        warming = position.call < self.warmup
        if not warming and self.guarded(position, 0, self.tail):
            return Plan.PLAIN
        if position.call < self.warmup - self.anchors:
            return Plan.PLAIN  # would be pushed out before it is used
        for kind in KINDS:
            interval = self.settings.every(kind)
            age = self.age.get(kind, interval) + 1
            self.age[kind] = 0 if warming or age >= interval else age
            if self.age[kind] == 0:
                self.since[kind] = self.run.coordinate(t)
        self.reused = frozenset(kind for kind, age in self.age.items() if age > 0)
        return Plan.PARTIAL if self.reused else Plan.FULL

    def has(self, layer: Layer, keys: Sequence[Hashable]) -> bool:
        """Whether every branch has what it computed when the layer's kind was last due, or since."""
        return self.store.has(keys, since=self.since.get(layer.kind, -math.inf))

    def flush(self) -> None:
        self.age, self.since = {}, {}
        super().flush()

    @abstractmethod
    def reuses(self, layer: Layer, branches: Sequence[Hashable]) -> bool:
        """Whether ``run`` will compute nothing of the layer in this call."""

    @abstractmethod
    def run_layer(
        self,
        layer: Layer,
        branches: Sequence[Hashable],
        compute: Callable[[torch.Tensor | None], Out],
        x: torch.Tensor | None,
    ) -> tuple[Out, float]:
        """The layer's output for the batch of ``branches``, and the share of its work that was computed.

        compute: the layer itself, a function of its input ``x``. x: the input of an ``MLP``, else it may be None.
        """


class Broadcast(LayerSession):
    """Outputs are reused as they are, or forecast in half log-SNR (``order`` 1)."""

    def __init__(self, settings, run: Run, order: int):
        s = settings
        super().__init__(s, run, s.warmup, s.tail, order + 1, s.max_cache_mb, s.cache_device)
        self.weights = lagrange(order)
        self.parts: dict[str, int | None] = {}  # how many tensors a layer returns; None: one, not in a tuple

    def _keys(self, layer: Layer, branches: Sequence[Hashable]) -> list[list[Hashable]]:
        return [[(branch, layer.name, i) for branch in branches] for i in range(self.parts.get(layer.name) or 1)]

    def reuses(self, layer, branches):
        return layer.kind in self.reused and all(self.has(layer, keys) for keys in self._keys(layer, branches))

    def run_layer(self, layer, branches, compute, x):
        at = self.run.coordinate(self.t)
        if self.reuses(layer, branches):
            device = None if x is None else x.device
            found = [self.store.forecast(keys, at, self.weights, device) for keys in self._keys(layer, branches)]
            return (found[0] if self.parts[layer.name] is None else tuple(found)), 0.0
        out = compute(x)
        several = isinstance(out, tuple)
        self.parts[layer.name] = len(out) if several else None
        for keys, part in zip(self._keys(layer, branches), out if several else (out,), strict=True):
            if len(part) % len(branches) == 0:
                self.store.put(keys, part, at)
        return out, 1.0
