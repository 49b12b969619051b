"""The demo's graphs, as ComfyUI's API prompts."""

from __future__ import annotations

PROMPT = "a big red circle on the left on a white background"
STEPS = 8
PICTURES, PLOT, TABLE = "pictures", "plot", "table"  # ids of the nodes whose outputs the demo shows


class Graph(dict):
    """An API prompt under construction: ``add`` returns the node's id, ``(id, slot)`` links."""

    def add(self, class_type: str, id: str | None = None, **inputs) -> str:
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
            for name, (kind, *rest) in object_info[node["class_type"]]["input"].get("required", {}).items():
                options = rest[0] if rest else {}
                choices = kind if isinstance(kind, list) else options.get("options") or [None]
                default = options.get("default", choices[0])
                if default is not None and name not in node["inputs"]:
                    node["inputs"][name] = default
        return self


def demo(network: str = "unet", prompt: str = PROMPT, seed: int = 1, batch: int = 4, cfg: float = 3.0) -> Graph:
    """From the same noise: the converged reference, dpmpp_2m, Quickstep, and Quickstep with DeepCache on a UNet."""
    g = Graph()
    model = g.add("Quickstep_DemoModel", network=network)
    positive = g.add("CLIPTextEncode", text=prompt, clip=(model, 1))
    negative = g.add("CLIPTextEncode", text="", clip=(model, 1))
    latent = g.add("EmptyLatentImage", width=32, height=32, batch_size=batch)
    karras = g.add("Quickstep_KarrasSchedule", model=(model, 0), steps=STEPS)
    lam = g.add("Quickstep_CosineSchedule", model=(model, 0), steps=STEPS)
    stock = g.add("KSamplerSelect", sampler_name="dpmpp_2m")
    quick = g.add("Quickstep_DPMSolverPP")
    contenders = [
        dict(label="ComfyUI dpmpp_2m", sampler=(stock, 0), sigmas=(karras, 0)),
        dict(label="Quickstep", sampler=(quick, 0), sigmas=(lam, 0)),
    ]
    if network != "dit":
        cached = g.add("Quickstep_DeepCache", model=(model, 0))
        contenders.append(dict(label="Quickstep + DeepCache", sampler=(quick, 0), sigmas=(lam, 0), model=(cached, 0)))
    candidates = {
        f"candidates.candidate{i}": (g.add("Quickstep_Candidate", **contender), 0)
        for i, contender in enumerate(contenders)
    }
    shared = dict(model=(model, 0), positive=(positive, 0), negative=(negative, 0), latent=(latent, 0), vae=(model, 2))
    compare = g.add("Quickstep_Compare", **shared, seed=seed, cfg=cfg, reference_steps=100, repeats=1, **candidates)
    g.add("SaveImage", PICTURES, images=(compare, 0), filename_prefix="quickstep_demo")
    g.add("SaveImage", PLOT, images=(compare, 1), filename_prefix="quickstep_demo_plot")
    g.add("PreviewAny", TABLE, source=(compare, 2))
    return g
