"""Which transformer blocks a DiT of ComfyUI has, in their order, and what goes from one to the next.

A row is here if ``tests/comfy/test_blocks_comfy.py`` has run that network: leaving out blocks and adding what they did to the same
input gives the same output. Nothing of a network's ``forward`` is repeated here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.ldm.common_dit
import torch
from torch import nn

Streams = tuple[torch.Tensor, ...]
Left = tuple[torch.Tensor | None, ...]
"""What a block returned: SD 3's last one returns no text."""


@dataclass(frozen=True)
class Layout:
    """How a class of blocks is called.

    takes: position and name of the carried hidden states among its arguments, text before picture.
    gives: for each value that it returns, which of them it is.
    modulated: ``(block, arguments by name) -> tensor``: the first norm's output, scaled and shifted by the time, which is what
        TeaCache watches; None where it is not known.
    names: of its positional arguments, for ``modulated``.
    """

    takes: tuple[tuple[int, str], ...]
    gives: tuple[int, ...] = (0,)
    names: tuple[str, ...] = ()
    modulated: Callable[[nn.Module, dict[str, Any]], torch.Tensor | None] | None = None

    def streams(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Streams:
        return tuple(kwargs[name] if name in kwargs else args[place] for place, name in self.takes)

    def unpack(self, out: Any) -> Left:
        """What a block returned, in the order of ``takes``."""
        values = out if len(self.gives) > 1 else (out,)
        return tuple(values[self.gives.index(i)] for i in range(len(self.takes)))

    def pack(self, streams: Left) -> Any:
        """What a block returns."""
        return tuple(streams[i] for i in self.gives) if len(self.gives) > 1 else streams[0]

    def watched(self, block: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor | None:
        if self.modulated is None:
            return None
        return self.modulated(block, {**dict(zip(self.names, args, strict=False)), **kwargs})


@dataclass(frozen=True)
class Family:
    """A kind of network.

    lists: attribute -> layout of its blocks, in the order in which they run. Between two lists the streams are joined
        along the tokens.
    rows: which dimension of the hidden states counts the pictures.
    skips: whether late blocks also read what early ones returned, the last block the first one's, and so on.
    """

    name: str
    lists: dict[str, Layout]
    rows: int = 0
    skips: bool = False


@dataclass(frozen=True, eq=False)
class Chain:
    """The blocks of one network and their layouts, in the order in which they run."""

    family: Family
    blocks: list[nn.Module]
    layouts: list[Layout]

    def __len__(self) -> int:
        return len(self.blocks)


def chain(network: nn.Module, model: str, needed_by: str) -> Chain:
    """The blocks of ``network``; raises ``ValueError`` for a network that is not known.

    A subclass is another network: its forward may do more between the blocks.
    """
    kind = type(network)
    family = FAMILIES.get(f"{kind.__module__.removeprefix('comfy.ldm.')}.{kind.__qualname__}")
    if family is None:
        known = ", ".join(dict.fromkeys(f.name for f in FAMILIES.values()))
        raise ValueError(
            f"{needed_by}: this model is a {kind.__name__} ({model}), whose blocks are not known here; it works on "
            f"{known}."
        )
    lists = [(layout, getattr(network, name)) for name, layout in family.lists.items()]
    lists = [(layout, found.values() if isinstance(found, nn.ModuleDict) else found) for layout, found in lists]
    return Chain(
        family,
        [block for _, found in lists for block in found],
        [layout for layout, found in lists for _ in found],
    )


def joined(streams: Streams) -> Streams:
    """What the second list of blocks gets of the first one's streams."""
    return (torch.cat(streams, 1),) if len(streams) > 1 else streams


def _scaled(norm: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return norm * (1 + scale) + shift


def _flux(block, given):
    if given.get("modulation_dims_img") is not None:
        return None
    mod = block.img_mod(given["vec"])[0] if block.modulation else given["vec"][0][0]
    return _scaled(block.img_norm1(given["img"]), mod.shift, mod.scale)


def _sd3(block, given):
    inner = block.x_block
    shift, scale = inner.adaLN_modulation(given["c"]).chunk(9 if inner.x_block_self_attn else 6, dim=1)[:2]
    return _scaled(inner.norm1(given["x"]), shift.unsqueeze(1), scale.unsqueeze(1))


def _wan(block, given):
    return given["e"]  # the projected time embedding, as published for its "ret" polynomials


def _lumina(block, given):
    if given.get("timestep_zero_index") is not None:
        return None
    scale = block.adaLN_modulation(given["adaln_input"]).chunk(4, dim=1)[0]
    return block.attention_norm1(given["x"]) * (1 + scale.unsqueeze(1))


def _qwen(block, given):
    if given.get("timestep_zero_index") is not None:
        return None
    shift, scale = block.img_mod(given["temb"]).chunk(6, dim=-1)[:2]
    return _scaled(block.img_norm1(given["hidden_states"]), shift.unsqueeze(1), scale.unsqueeze(1))


def _ltxv(block, given):
    x, timestep, table = given["x"], given["timestep"], block.scale_shift_table
    moved = table.to(x) + timestep.reshape(x.shape[0], timestep.shape[1], table.shape[0], -1)
    return _scaled(comfy.ldm.common_dit.rms_norm(x), moved[:, :, 0], moved[:, :, 1])


def _aura(block, given):
    shift, scale = block.modX(given["global_cond"]).chunk(6, dim=1)[:2]
    return _scaled(block.normX1(given["x"]), shift.unsqueeze(1), scale.unsqueeze(1))


def _pixart(block, given):
    x, table = given["x"], block.scale_shift_table
    moved = table.to(x) + given["t"].reshape(x.shape[0], 6, -1)
    return _scaled(block.norm1(x), moved[:, :1], moved[:, 1:2])


_X = ((0, "x"),)
_DOUBLE = Layout(((1, "txt"), (0, "img")), (1, 0), ("img", "txt", "vec", "pe"), _flux)
_SINGLE = Layout(_X)
_FLUX = {"double_blocks": _DOUBLE, "single_blocks": _SINGLE}
_JOINT = Layout(((0, "context"), (1, "x")), (0, 1), ("context", "x"), _sd3)
_WAN = Family("Wan", {"blocks": Layout(_X, names=("x", "e"), modulated=_wan)})
_LUMINA_NAMES = ("x", "x_mask", "freqs_cis", "adaln_input")
_LUMINA = Family("Lumina 2 and Z-Image", {"layers": Layout(_X, names=_LUMINA_NAMES, modulated=_lumina)})
_QWEN = Layout(((1, "encoder_hidden_states"), (0, "hidden_states")), (0, 1), modulated=_qwen)
_AURA = Layout(((0, "c"), (1, "x")), (0, 1), ("c", "x", "global_cond"), _aura)
_PREDICT2 = Family("Cosmos Predict2", {"blocks": Layout(((0, "x_B_T_H_W_D"),))})

FAMILIES: dict[str, Family] = {
    "flux.model.Flux": Family("Flux", _FLUX),
    "chroma.model.Chroma": Family("Chroma", _FLUX),
    "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper": Family("SD 3", {"joint_blocks": _JOINT}),
    "wan.model.WanModel": _WAN,
    "wan.model.VaceWanModel": _WAN,
    "lumina.model.NextDiT": _LUMINA,
    "qwen_image.model.QwenImageTransformer2DModel": Family("Qwen-Image", {"transformer_blocks": _QWEN}),
    "lightricks.model.LTXVModel": Family(
        "LTX-Video", {"transformer_blocks": Layout(_X, names=("x",), modulated=_ltxv)}
    ),
    "hunyuan_video.model.HunyuanVideo": Family("HunyuanVideo", _FLUX),
    "aura.mmdit.MMDiT": Family("AuraFlow", {"double_layers": _AURA, "single_layers": Layout(((0, "cx"),))}),
    "pixart.pixartms.PixArtMS": Family("PixArt", {"blocks": Layout(_X, names=("x", "y", "t"), modulated=_pixart)}),
    "hydit.models.HunYuanDiT": Family("HunyuanDiT", {"blocks": Layout(_X)}, skips=True),
    "cosmos.model.GeneralDIT": Family("Cosmos", {"blocks": Layout(_X)}, rows=3),
    "cosmos.predict2.MiniTrainDIT": _PREDICT2,
    "anima.model.Anima": _PREDICT2,
}
"""By module, below ``comfy.ldm``, and class."""
