"""Reuse of attention and feed-forward layers: their modules, and joint attentions, get another ``forward`` while a call
runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from comfy.ldm.flux.layers import apply_mod
from comfy.patcher_extension import WrappersMP
from torch import nn

from ...solvers.caching.accelerator import Plan
from ...solvers.caching.layers import (
    CROSS,
    FUSED,
    MLP,
    SELF,
    TEMPORAL,
    Layer,
    LayerReuse,
    LayerSession,
    Tally,
    layer_work,
)
from ...solvers.caching.work import block_work
from .branches import branch_names, with_hooks
from .layers import PATCHES, Block, at, blocks_of, known_blocks, once_per_network
from .scoped import scoped

OVERRIDE = "optimized_attention_override"


def modules(model, settings: LayerReuse, key: str, forward_key: str) -> dict[str, Callable]:
    """The wrappers that carry out the plans of a ``LayerSession``."""
    known_blocks(model, settings.title)
    blocks = once_per_network(blocks_of)

    def forward(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        options = with_hooks(transformer_options or {}, executor.class_obj)
        session: LayerSession | None = options.get(key)
        names = branch_names(x, options)
        if session is None or session.plan in (None, Plan.PLAIN) or not names:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        network = executor.class_obj.diffusion_model
        tokens = c_crossattn.shape[1] if torch.is_tensor(c_crossattn) and c_crossattn.ndim > 1 else 0
        one = _Pass(settings, session, session.branches(names), network, tokens, options)
        with scoped(one.overrides(blocks(network))):
            out = executor(x, t, c_concat, c_crossattn, control, one.options, **kwargs)
        record = options.get(forward_key)
        if record is not None and session.plan is Plan.PARTIAL:
            record.share = None if one.along_frames else one.tally.share
        return out

    return {WrappersMP.APPLY_MODEL: forward}


class _Pass:
    """One pass of the network."""

    def __init__(self, settings, session, branches, network, tokens, options):
        self.settings, self.session, self.branches = settings, session, branches
        self.network, self.tokens = network, tokens
        self.tally = Tally()
        self.along_frames = False
        self.block: Block | None = None
        """The block whose joint attentions are running."""
        self.calls = 0
        """How many of them have been."""
        self.outer = options.get(OVERRIDE)
        # Another pack's patch would see placeholders where queries and keys should be.
        patches = options.get("patches", {})
        self.watched = bool(patches.get("attn1_patch"))
        self.unet = hasattr(network, "input_blocks")
        self.moved = self.unet and any(patches.get(name) for name in PATCHES)
        """Whether attention may get other tokens than in the call before, so that none of it is reused."""
        self.options = {**options, OVERRIDE: self.attention}

    def overrides(self, blocks: list[Block]) -> dict[nn.Module, Callable]:
        made: dict[nn.Module, Callable] = self.sized() if self.unet else {}
        for block in blocks:
            for layer, module in block.layers:
                # Of what is no UNet, the layers are the work to compare with.
                if self.settings.every(layer.kind) > 1 or not self.unet:
                    made[module] = self.layer(layer, module)
                self.along_frames |= layer.kind == TEMPORAL
            if block.joint is None:
                continue
            if block.joint.fused and self.settings.every(FUSED) > 1:
                made.update(self.fused(block))
                continue
            made[block.module] = self.entered(block)
            if self.settings.every(SELF) > 1 and not block.joint.fused:
                for i, paths in enumerate(block.joint.feeding):
                    parts = [part for path in paths if (part := at(block.module, path)) is not None]
                    made.update({part: self.feeding(block, i, part) for part in parts})
        return made

    def sized(self) -> dict[nn.Module, Callable]:
        """Reads the size of a UNet's input where it enters; only its first layer sees it as the blocks do."""
        first = self.network.input_blocks[0][0]
        original = first.forward

        def forward(x, *args, **kwargs):
            self.tally.whole = unet_work(self.network, x.shape, self.tokens)
            return original(x, *args, **kwargs)

        return {first: forward}

    def layer(self, layer: Layer, module: nn.Module) -> Callable:
        original = module.forward

        def forward(*args, **kwargs):
            x = args[0] if args else next(iter(kwargs.values()))

            def compute(given):
                return original(given, *args[1:], **kwargs) if args else original(**kwargs)

            out, computed = self.run(layer, compute, x)
            self.count(layer, module, x, args, kwargs, computed)
            return out

        return forward

    def run(self, layer: Layer, compute: Callable, x: torch.Tensor):
        """What the layer returns, and the share of its work that was computed."""
        if self.settings.every(layer.kind) == 1 or (self.moved and layer.kind != MLP):
            return compute(x), 1.0
        return self.session.run_layer(layer, self.branches, compute, x)

    def count(self, layer: Layer, module: nn.Module, x: torch.Tensor, args, kwargs, computed: float) -> None:
        other = kwargs.get("encoder_hidden_states")
        if layer.kind == CROSS:
            other = kwargs.get("context", args[1] if len(args) > 1 else x)
        size = None if other is None else other.shape[0] * other.shape[1] / len(x)
        self.tally.count(len(x) * layer_work(module, layer.kind, x.shape[1:-1].numel(), size), computed)

    def entered(self, block: Block) -> Callable:
        original = block.module.forward

        def forward(*args, **kwargs):
            self.block, self.calls = block, 0
            try:
                return original(*args, **kwargs)
            finally:
                self.block = None

        return forward

    def attention(self, func, *args, **kwargs):
        """ComfyUI calls this instead of every attention that knows the options."""
        block = self.block

        def compute(_=None):
            return func(*args, **kwargs) if self.outer is None else self.outer(func, *args, **kwargs)

        if block is None or self.calls >= len(block.joint.feeding):
            return compute()
        i, self.calls = self.calls, self.calls + 1
        q = args[0]
        out, computed = self.run(_attention(block, i), compute, q)
        self.count_attention(block, i, q, out, computed)
        return out

    def count_attention(self, block: Block, i: int, q: torch.Tensor, out: torch.Tensor, computed: float) -> None:
        n, width = out.shape[1], out.shape[-1]
        projections = 3 * n * width * width
        saved = 0.0 if block.joint.fused or self.watched else projections
        self.tally.count(len(out) * (2 * n * n * width + saved), computed)
        self.tally.count(len(out) * (projections - saved + n * width * width))
        if block.joint.fused:  # the feed-forward part of the shared layers
            whole = layer_work(at(block.module, "linear1"), MLP, n) + layer_work(at(block.module, "linear2"), MLP, n)
            self.tally.count(len(out) * (whole - projections - n * width * width))

    def feeding(self, block: Block, i: int, module: nn.Module) -> Callable:
        """Queries, keys and values that nobody will read are not computed."""
        original = module.forward

        def forward(x):
            if self.watched or not self.session.reuses(_attention(block, i), self.branches):
                return original(x)
            return x.new_zeros(()).expand(*x.shape[:-1], module.out_features)

        return forward

    def fused(self, block: Block) -> dict[nn.Module, Callable]:
        layer, module = Layer(block.name, FUSED), block.module
        whole, last = module.forward, module.linear2.forward
        width = 3 * module.hidden_size

        def count(x, computed):
            n = x.shape[1]
            work = layer_work(module.linear1, MLP, n) + layer_work(module.linear2, MLP, n) + 2 * n * n * width / 3
            self.tally.count(len(x) * work, computed)

        def joined(h):
            return self.session.run_layer(layer, self.branches, last, h)[0]

        def forward(x, vec, *args, modulation_dims=None, **kwargs):
            if not self.session.reuses(layer, self.branches):
                count(x, 1.0)
                return whole(x, vec, *args, modulation_dims=modulation_dims, **kwargs)
            count(x, 0.0)
            kept = self.session.run_layer(layer, self.branches, last, x)[0]
            gate = (module.modulation(vec)[0] if module.modulation else vec).gate
            x += apply_mod(kept, gate, None, modulation_dims)
            return torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504) if x.dtype == torch.float16 else x

        return {module: forward, module.linear2: joined}


def _attention(block: Block, i: int) -> Layer:
    return Layer(f"{block.name}.attention{i}", SELF)


def unet_work(network: nn.Module, shape, tokens: int) -> float:
    """Multiply-adds of a whole pass of a UNet over an input of this shape."""
    middle = [] if network.middle_block is None else [network.middle_block]
    parts = [*network.input_blocks, *middle, *network.output_blocks, [network.out]]
    return shape[0] * sum(block_work(parts, float(shape[2] * shape[3]), tokens))
