"""Which accelerators work together: by the level at which they work, outermost first."""

from __future__ import annotations

from collections.abc import Iterable

from .accelerator import Accelerator

SITES = {
    "evaluation": "whole network calls",
    "guidance": "the conditionings of a call",
    "tiles": "tiles of a large picture",
    "unet": "a part of a UNet",
    "blocks": "a run of transformer blocks",
    "modules": "attention and feed-forward layers",
    "tokens": "tokens inside a block",
    "tuning": "how the network is evaluated, at the same cost",
}
"""The levels, in the order in which they decide about a call: what an outer one answers, an inner one never sees."""

_SAME = "they replace the same part of the network"
_BOTH = "both replace parts of the network by older results, and neither knows which of them are old already"
_MOVED = "the tiles move from step to step, so what was kept belongs to other places"
REFUSED: dict[frozenset[str], str] = {
    **{frozenset({site}): _SAME for site in SITES if site != "tuning"},
    frozenset({"unet", "blocks"}): _BOTH,
    frozenset({"unet", "modules"}): _BOTH,
    frozenset({"blocks", "modules"}): _BOTH,
    frozenset({"blocks", "tokens"}): "kept blocks would see other tokens than they were kept for",
    frozenset({"modules", "tokens"}): "kept layers would see other tokens than they were kept for",
    **{frozenset({"tiles", site}): _MOVED for site in ("unet", "blocks", "modules")},
}


def conflict(a: type[Accelerator], b: type[Accelerator]) -> str | None:
    """Why two different accelerators cannot be on one model, as the end of a sentence; None if they can."""
    return REFUSED.get(frozenset({a.site, b.site}))


def rank(site: str) -> int:
    """The place of a level in ``SITES``."""
    return list(SITES).index(site)


def check(new: Accelerator, present: Iterable[Accelerator]) -> None:
    """Raise ``ValueError`` if ``new`` cannot join those that are on the model; one of its own kind is replaced."""
    for other in present:
        why = None if other.id == new.id else conflict(type(new), type(other))
        if why is not None:
            raise ValueError(f"{new.title} cannot be used together with {other.title}, which is on this model: {why}.")
