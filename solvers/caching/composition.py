"""Which accelerators work together: by the level at which they work, outermost first."""

from __future__ import annotations

from collections.abc import Iterable

from ..process import VarianceExploding
from .accelerator import Accelerator, Run

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


SITUATIONS: dict[str, dict] = {
    "ODE sampler": {},
    "sampler that adds noise": {"stochastic": True},
    "CFG++ sampler": {"both_sides": True},
    "adaptive sampler": {"adaptive": True},
    "CFG 1": {"cfg": 1.0},
    "fewer than 10 steps": {"steps": 6},
}
"""What a run can be like that matters to accelerators, as fields of ``Run``."""


def verdicts(accelerator: type[Accelerator]) -> dict[str, str]:
    """For each of ``SITUATIONS``: "yes", "off" where its default settings switch it off, "note" where they say something."""
    process = VarianceExploding(0.03, 14.6)

    def verdict(steps: int = 25, **known) -> str:
        times = [14.6 * (1 - i / steps) ** 3 for i in range(steps)] + [0.0]
        run = Run(times, process=process, **{"cfg": 4.0, **known})
        settings = accelerator()
        return "off" if settings.off(run) else "note" if settings.note(run) else "yes"

    return {name: verdict(**known) for name, known in SITUATIONS.items()}


FEATURES: dict[str, dict[str, str]] = {
    "batch": {"": "yes"},
    "inpainting, noise masks": {"": "yes"},
    "areas, several prompts": {"": "yes; what differs in its area alone is told apart by its order", "evaluation": "yes"},
    "positive and negative in one call or two": {"": "yes"},
    "ControlNet, T2I adapter": {"": "yes", "evaluation": "yes, its calls are saved too"},
    "LoRA": {"": "yes"},
    "scheduled LoRA hooks": {"": "yes, what was kept at another strength is not used", "evaluation": "yes"},
    "context windows": {"": "yes, each has its own cache", "evaluation": "yes", "tuning": "yes"},
    "second pass, other size": {"": "yes"},
    "FreeU and other patches": {"": "yes", "tokens": "not attention masks of regional prompts or IP-Adapter"},
    "perturbed attention, skip-layer guidance": {"": "yes, each pass has its own cache", "evaluation": "yes"},
    "other packs' wrappers around the network": {"": "yes, they see every pass that is made", "tuning": "yes"},
    "packs that change the sigmas inside a run": {"": "no: steps are counted by those the run starts with", "tiles": "yes"},
    "torch.compile": {"": "no, refused", "evaluation": "yes", "guidance": "yes", "tiles": "yes"},
    "ComfyUI's EasyCache, LazyCache": {"": "no, refused", "guidance": "yes", "tiles": "yes", "tokens": "yes",
                                       "tuning": "yes"},
    "low VRAM, offloading": {"": "by construction; no GPU test"},
    "several GPUs": {"": "by construction (a key for each device); no GPU test"},
}  # fmt: skip
"""How each level gets on with what else a workflow can have; "" stands for every level that is not named."""
