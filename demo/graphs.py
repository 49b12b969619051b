"""The demo's graphs, as ComfyUI's API prompts."""

from __future__ import annotations

from typing import Any

PROMPT = "a big red circle on the left on a white background"
STEPS = 8
PICTURES, PLOT, TABLE = "pictures", "plot", "table"  # ids of the nodes whose outputs the demo shows


class Graph(dict):
    """An API prompt under construction: ``add`` returns the node's id, ``(id, slot)`` links."""

    def add(self, class_type: str, id: Any = None, **inputs) -> str:
        id = id or str(len(self) + 1)
        self[id] = {
            "class_type": class_type,
            "inputs": {name: list(value) if isinstance(value, tuple) else value for name, value in inputs.items()},
            "_meta": {"title": class_type},
        }
        return id

    def filled(self, object_info: dict) -> Graph:
        """The same with the declared default of every widget that was not given."""
        for node in self.values():
            _fill(node["inputs"], "", object_info[node["class_type"]]["input"])
            node["_meta"]["title"] = object_info[node["class_type"]]["display_name"]
        return self


def _fill(given: dict, prefix: str, declared: dict) -> None:
    """Defaults of all required widgets that ``given`` lacks, those of the chosen option of a dynamic dropdown included."""
    for name, (kind, *rest) in declared.get("required", {}).items():
        options = rest[0] if rest else {}
        choices = kind if isinstance(kind, list) else options.get("options") or [None]
        dynamic = {choice["key"]: choice["inputs"] for choice in choices if isinstance(choice, dict)}
        default = options.get("default", next(iter(dynamic), None) if dynamic else choices[0])
        if default is not None:
            given.setdefault(prefix + name, default)
        if dynamic:
            _fill(given, f"{prefix}{name}.", dynamic[given[prefix + name]])


def inputs(g: Graph, network: str, prompt: str, batch: int) -> tuple[str, dict, tuple]:
    """The demo model, the two prompts and an empty latent, as every sampler of the standard graph takes them."""
    model = g.add("Quickstep_DemoModel", network=network)
    positive = g.add("CLIPTextEncode", text=prompt, clip=(model, 1))
    negative = g.add("CLIPTextEncode", text="", clip=(model, 1))
    latent = g.add("EmptyLatentImage", width=32, height=32, batch_size=batch)
    return model, {"positive": (positive, 0), "negative": (negative, 0)}, (latent, 0)


def plain(network: str = "unet", prompt: str = PROMPT, seed: int = 1, steps: int = 20) -> Graph:
    """ComfyUI's standard graph, its model going through DeepCache if it is a UNet."""
    g = Graph()
    model, prompts, latent = inputs(g, network, prompt, 1)
    link = (g.add("Quickstep_DeepCache", model=(model, 0)), 0) if network != "dit" else (model, 0)
    sampled = g.add("KSampler", model=link, latent_image=latent, **prompts, seed=seed, steps=steps, cfg=3.0)
    decoded = g.add("VAEDecode", samples=(sampled, 0), vae=(model, 2))
    g.add("SaveImage", PICTURES, images=(decoded, 0), filename_prefix="quickstep")
    return g


def demo(network="unet", prompt=PROMPT, seed=1, batch=4, cfg=3.0, reference_steps=100) -> Graph:
    """From the same noise: the converged reference, dpmpp_2m, Quickstep, and Quickstep with DeepCache on a UNet.

    Schedules are the ones that did best over several prompts and seeds, for ComfyUI's sampler as for ours. On a UNet
    both have the same, Karras, and DPM-Solver++ 2M is dpmpp_2m: equal rows are right, the gain is DeepCache's. On the
    flow model ComfyUI's does best with "simple", ours with Beta.
    """
    flow = network == "dit"
    g = Graph()
    model, prompts, latent = inputs(g, network, prompt, batch)
    link, scheduler = (model, 0), "simple" if flow else "karras"
    core = g.add("BasicScheduler", model=link, scheduler=scheduler, steps=STEPS, denoise=1.0)
    ours = g.add("Quickstep_BetaSchedule" if flow else "Quickstep_KarrasSchedule", model=link, steps=STEPS)
    stock = g.add("KSamplerSelect", sampler_name="dpmpp_2m")
    quick = g.add("Quickstep_DPMSolverPP")
    contenders = [
        dict(label="ComfyUI dpmpp_2m", sampler=(stock, 0), sigmas=(core, 0)),
        dict(label="Quickstep", sampler=(quick, 0), sigmas=(ours, 0)),
    ]
    if not flow:
        cached = g.add("Quickstep_DeepCache", model=(model, 0))
        contenders.append(dict(label="Quickstep + DeepCache", sampler=(quick, 0), sigmas=(ours, 0), model=(cached, 0)))
    shared = dict(model=(model, 0), latent=latent, vae=(model, 2), **prompts)
    compared(g, contenders, "quickstep_demo", **shared, seed=seed, cfg=cfg, reference_steps=reference_steps)
    return g


def compared(g: Graph, contenders: list[dict], prefix: str, **inputs) -> None:
    """Compare's node with its candidates, and its pictures, plot and table where they are seen."""
    candidates = {
        f"candidates.candidate{i}": (g.add("Quickstep_Candidate", **contender), 0)
        for i, contender in enumerate(contenders)
    }
    compare = g.add("Quickstep_Compare", **inputs, **candidates)
    g.add("SaveImage", PICTURES, images=(compare, 0), filename_prefix=prefix)
    g.add("SaveImage", PLOT, images=(compare, 1), filename_prefix=f"{prefix}_plot")
    g.add("PreviewAny", TABLE, source=(compare, 2))
