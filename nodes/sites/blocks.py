"""Leaving out transformer blocks of any DiT: gates around its blocks while one network pass runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import nn

from ...solvers.artifact import mismatches
from ...solvers.caching.accelerator import Plan
from ...solvers.caching.block_cache import BlockCache, BlockSession, sampled
from ...solvers.caching.work_dit import Work
from ..fingerprint import fingerprint
from .branches import branch_names, with_hooks
from .families import Chain, Left, Streams, chain, joined
from .scoped import scoped


def blocks(model, settings: BlockCache, key: str, forward_key: str) -> dict[str, Callable]:
    """The wrapper that carries out the plans of a ``BlockSession``.

    key, forward_key: where ``transformer_options`` has the session and the record of the current network pass.
    """
    network = model.get_model_object("diffusion_model")
    kind = type(model.model).__name__
    _check(model, settings, chain(network, kind, settings.title), network)
    shares: dict[Hashable, float] = {}

    def apply(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        options = with_hooks(transformer_options or {}, executor.class_obj)
        session: BlockSession | None = options.get(key)
        names = branch_names(x, options)
        if session is None or session.plan in (None, Plan.PLAIN) or not names:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        session.sees(tuple(x.shape[1:]))
        # Passes of skip-layer guidance and the like differ in the blocks that they replace.
        replaced = frozenset(options.get("patches_replace", {}).get("dit", {}))
        network = executor.class_obj.diffusion_model  # with several GPUs every thread has its own
        walk = Walk(
            chain(network, kind, settings.title), session, session.branches([(name, replaced) for name in names])
        )
        with scoped(walk.gates()):
            out = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        record = options.get(forward_key)
        if record is not None and walk.left is not None:
            what = (walk.span, walk.shapes)
            if what not in shares:
                shares[what] = Work(network, walk.chain.blocks).share(walk.span, walk.shapes)
            record.share = shares[what]
        return out

    return {WrappersMP.APPLY_MODEL: apply}


class Walk:
    """One pass through the blocks: shows the session what it watches, asks it at the start of the span, tells it the end."""

    def __init__(self, chain: Chain, session: BlockSession, branches: Sequence[Hashable]):
        self.chain, self.session, self.branches = chain, session, branches
        self.span = session.span(len(chain))
        self.watched = torch.empty(0)
        self.tokens = 0
        """Of the picture, in the first block."""
        self.keys: list[Hashable] = []
        self.shapes: tuple[tuple[int, ...], ...] = ()
        self.entered: Streams | None = None
        """Copies of what entered the span, of a pass that computes it."""
        self.left: Left | None = None
        """What leaves the span, of a pass that hits."""

    def gates(self) -> dict[nn.Module, Callable]:
        first, end = self.span
        gated = {*range(first, end)} | ({0} if self.session.watches else set())
        found = [(i, self.chain.blocks[i]) for i in sorted(gated)]
        return {block: partial(self.block, i, block, block.forward) for i, block in found}

    def block(self, i: int, block: nn.Module, compute: Callable, *args: Any, **kwargs: Any) -> Any:
        """Block ``i`` in this pass. ``compute`` is its own forward."""
        layout, (first, end) = self.chain.layouts[i], self.span
        if i == 0 and self.session.watches:
            self.watched = self._watch(block, args, kwargs)
        if i == first:
            self._enter(layout.streams(args, kwargs))
        if self.left is not None and first <= i < end:
            # The network adds ControlNet residuals between the blocks to what it gets here; they are part of R already.
            return layout.pack(self.left if i == end - 1 else layout.streams(args, kwargs))
        out = compute(*args, **kwargs)
        if i == end - 1 and self.entered is not None:
            self._leave(self.entered, layout.unpack(out))
        return out

    def _watch(self, block: nn.Module, args, kwargs) -> torch.Tensor:
        layout = self.chain.layouts[0]
        picture = self._rows(layout.streams(args, kwargs)[-1])
        self.tokens = picture.shape[1]
        found = layout.watched(block, args, kwargs) if self.session.watches == "modulated" else None
        return sampled(picture if found is None else self._rows(found))

    def _enter(self, streams: Streams) -> None:
        if self.session.watches and not self.tokens:
            return  # skip-layer guidance has left out block 0
        if self.session.watches == "change":
            # Where the lists of blocks change, the text comes first in the stream.
            self.watched = sampled(self._rows(streams[-1])[:, -self.tokens :]) - self.watched
        self.shapes = tuple(tuple(self._rows(s).shape[1:]) for s in streams)
        self.keys = [(branch, self.span, self.shapes) for branch in self.branches]
        rows = self._rows(streams[-1])
        if len(rows) % len(self.keys):
            return
        residual = self.session.hit(self.keys, self.watched, rows.device)
        if residual is None:
            self.entered = tuple(s.clone() for s in streams)
        else:
            self.left = self._added(self._met(streams), residual)

    def _leave(self, entered: Streams, streams: Left) -> None:
        parts = [
            self._rows(after - before).flatten(1)
            for after, before in zip(streams, self._met(entered), strict=True)
            if after is not None
        ]
        self.entered = None
        self.session.keep(self.keys, parts[0] if len(parts) == 1 else torch.cat(parts, 1), self.watched)

    def _met(self, streams: Streams) -> Streams:
        """What entered the span, in the form in which it leaves it."""
        first, end = self.span
        same = len(self.chain.layouts[first].takes) == len(self.chain.layouts[end - 1].takes)
        return streams if same else joined(streams)

    def _added(self, streams: Streams, residual: torch.Tensor) -> Left:
        sizes = [self._rows(s)[0].numel() for s in streams]
        if residual.shape[1] == sizes[-1]:  # a last block returns no text
            return (*(None for _ in streams[:-1]), self._sum(streams[-1], residual))
        return tuple(self._sum(s, part) for s, part in zip(streams, residual.split(sizes, 1), strict=True))

    def _sum(self, stream: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        rows = self._rows(stream)
        return (rows + residual.view(rows.shape)).movedim(0, self.chain.family.rows)

    def _rows(self, stream: torch.Tensor) -> torch.Tensor:
        """With the pictures of the batch in the first dimension."""
        return stream.movedim(self.chain.family.rows, 0)


def _check(model, settings: BlockCache, found: Chain, network: nn.Module) -> None:
    """Raise ``ValueError`` in one sentence where the settings do not fit the network."""
    spans = settings.spans(len(found))
    if found.family.skips and any(first < len(found) - end for first, end in spans):
        raise ValueError(
            f"{settings.title}: late blocks of {found.family.name} read what early ones return, so none may be skipped whose "
            "partner at the other end is computed."
        )
    if settings.made_for not in (None, found.family.name):
        raise ValueError(
            f"{settings.title}: this polynomial was made for {settings.made_for}, and the model is {found.family.name}."
        )
    if settings.profile is not None:
        source = settings.profile.source
        wrong = source is not None and mismatches(source, model=fingerprint(model))
        if wrong or (settings.profile.network, settings.profile.blocks) != (type(network).__name__, len(found)):
            raise ValueError(
                f"{settings.title}: the calibration was made with another model; calibrate this one, or choose its file."
            )
