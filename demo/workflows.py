"""The shipped workflows: ``make workflows`` writes ``workflows/<name>.json`` and its thumbnail ``<name>.jpg``.

Each is defined as an API prompt (``graphs``), turned into a UI workflow by the real frontend, laid out in columns by
this module, and run once for the thumbnail. Widget values come from the node definitions, so a workflow never holds a
value that the nodes do not know.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import graphs
from .graphs import Graph
from .server import Server, stopping_politely
from .testbed import ROOT, browser, say

FOLDER = ROOT / "workflows"
GAP_X, GAP_Y, TITLE = 80, 60, 40


def _shown(g: Graph, images: tuple, prefix: str) -> None:
    """Save the 32 x 32 pictures at eight times the size, so that a person sees them."""
    large = g.add("ImageScaleBy", image=images, upscale_method="nearest-exact", scale_by=8.0)
    g.add("SaveImage", graphs.PICTURES, images=(large, 0), filename_prefix=prefix)


def _sampled(
    network: str, solver: str, schedule: str, prompt: str, steps: int, seed: int, batch: int, prefix: str, **settings
) -> Graph:
    g = Graph()
    model, prompts, latent = graphs.inputs(g, network, prompt, batch)
    sampled = g.add(
        "SamplerCustom",
        model=(model, 0),
        **prompts,
        sampler=(g.add(solver, **settings), 0),
        sigmas=(g.add(schedule, model=(model, 0), steps=steps), 0),
        latent_image=latent,
        noise_seed=seed,
        cfg=3.0,
    )
    _shown(g, (g.add("VAEDecode", samples=(sampled, 0), vae=(model, 2)), 0), prefix)
    return g


def first_picture() -> Graph:
    return _sampled(
        "unet", "Quickstep_DPMSolverPP", "Quickstep_KarrasSchedule", graphs.PROMPT, 10, 1, 4, "quickstep_first"
    )


def flow_model() -> Graph:
    return _sampled(
        "dit", "Quickstep_DPMSolverPP", "Quickstep_BetaSchedule", "a big green cross", 12, 3, 4, "quickstep_flow"
    )


def stochastic() -> Graph:
    return _sampled(
        "unet", "Quickstep_SDEDPMSolverPP", "Quickstep_KarrasSchedule", "a pink ring", 20, 2, 4, "quickstep_sde"
    )


def quickstep_sampler() -> Graph:
    return _sampled(
        "dit", "Quickstep_Sampler", "Quickstep_BetaSchedule", "a big green triangle", 10, 1, 4, "quickstep_sampler"
    )


def solvers() -> Graph:
    """Four ways to spend eight calls."""
    g = Graph()
    model, prompts, latent = graphs.inputs(g, "unet", "a big yellow square", 3)
    sigmas = (g.add("Quickstep_KarrasSchedule", model=(model, 0), steps=8), 0)
    contenders = [
        dict(label=title, sampler=(g.add("Quickstep_Sampler", solver=title, **options), 0), sigmas=sigmas)
        for title, options in (("DDIM", {}), ("DPM-Solver++", {}), ("UniPC", {}), ("DEIS", {"solver.points": 2}))
    ]
    shared = dict(model=(model, 0), latent=latent, vae=(model, 2), **prompts)
    graphs.compared(g, contenders, "quickstep_solvers", **shared, seed=4, cfg=3.0, reference_steps=60)
    return g


def momentum() -> Graph:
    """A sampler with another node around it, at few steps and high guidance."""
    g = Graph()
    model, prompts, latent = graphs.inputs(g, "unet", "a big red ring on a black background", 3)
    sigmas = (g.add("Quickstep_KarrasSchedule", model=(model, 0), steps=6), 0)
    plain = (g.add("Quickstep_DPMSolverPP"), 0)
    damped = (g.add("Quickstep_HB", sampler=plain, beta=0.8), 0)
    contenders = [
        dict(label="DPM-Solver++ 2M", sampler=plain, sigmas=sigmas),
        dict(label="the same with momentum", sampler=damped, sigmas=sigmas),
    ]
    shared = dict(model=(model, 0), latent=latent, vae=(model, 2), **prompts)
    graphs.compared(g, contenders, "quickstep_momentum", **shared, seed=6, cfg=7.5, reference_steps=60)
    return g


def deepcache() -> Graph:
    """DeepCache with the plain KSampler, and what it saved."""
    g = Graph()
    model, prompts, latent = graphs.inputs(g, "unet", "a big blue triangle on a grey background", 4)
    cached = g.add("Quickstep_DeepCache", model=(model, 0), interval=2)
    sampled = g.add(
        "KSampler",
        model=(cached, 0),
        **prompts,
        latent_image=latent,
        seed=1,
        steps=20,
        cfg=3.0,
        sampler_name="dpmpp_2m",
        scheduler="karras",
    )
    report = g.add("Quickstep_Report", latent=(sampled, 0), model=(cached, 0))
    g.add("PreviewAny", source=(report, 1))
    _shown(g, (g.add("VAEDecode", samples=(report, 0), vae=(model, 2)), 0), "quickstep_deepcache")
    return g


def t_stitch() -> Graph:
    """The small UNet for the first 40 % of the steps, the large one for the rest."""
    g = Graph()
    model, prompts, latent = graphs.inputs(g, "unet", "a big pink triangle on a white background", 4)
    small = g.add("Quickstep_DemoModel", network="unet_small")
    guiders = {
        f"guiders.guider{i}": (g.add("CFGGuider", model=(m, 0), **prompts, cfg=3.0), 0)
        for i, m in enumerate((small, model))
    }
    stitch = g.add("Quickstep_TStitch", **guiders)
    sampled = g.add(
        "SamplerCustomAdvanced",
        noise=(g.add("RandomNoise", noise_seed=2), 0),
        guider=(stitch, 0),
        sampler=(g.add("Quickstep_DPMSolverPP"), 0),
        sigmas=(g.add("Quickstep_KarrasSchedule", model=(model, 0), steps=20), 0),
        latent_image=latent,
    )
    report = g.add("Quickstep_Report", latent=(sampled, 0), model=(stitch, 1))
    g.add("PreviewAny", source=(report, 1))
    _shown(g, (g.add("VAEDecode", samples=(report, 0), vae=(model, 2)), 0), "quickstep_stitch")
    return g


def accelerators() -> Graph:
    """What accelerators buy at 25 steps, next to simply taking fewer."""
    g = Graph()
    model, prompts, latent = graphs.inputs(g, "unet", "a big blue square on the left on a black background", 3)
    link = (model, 0)
    sampler = (g.add("Quickstep_DPMSolverPP"), 0)
    whole, fewer = ((g.add("Quickstep_KarrasSchedule", model=link, steps=n), 0) for n in (25, 12))
    forecast = (g.add("Quickstep_StepForecast", model=link), 0)
    deep = (g.add("Quickstep_DeepCache", model=link, interval=2), 0)
    guidance = (g.add("Quickstep_GuidanceCache", model=link), 0)
    both = (g.add("Quickstep_GuidanceCache", model=deep), 0)
    contenders = [
        dict(label="25 steps", sampler=sampler, sigmas=whole),
        dict(label="12 steps", sampler=sampler, sigmas=fewer),
        dict(label="Step forecast", sampler=sampler, sigmas=whole, model=forecast),
        dict(label="DeepCache", sampler=sampler, sigmas=whole, model=deep),
        dict(label="Guidance cache", sampler=sampler, sigmas=whole, model=guidance),
        dict(label="DeepCache + Guidance cache", sampler=sampler, sigmas=whole, model=both),
    ]
    shared = dict(model=link, latent=latent, vae=(model, 2), **prompts)
    graphs.compared(g, contenders, "quickstep_accelerators", **shared, seed=3, cfg=4.0, reference_steps=80)
    return g


def accelerate() -> Graph:
    """A target instead of knobs, on the flow model."""
    g = Graph()
    model, prompts, latent = graphs.inputs(g, "dit", "a big green circle", 4)
    sampler = (g.add("Quickstep_DPMSolverPP"), 0)
    sigmas = (g.add("Quickstep_BetaSchedule", model=(model, 0), steps=20), 0)
    shared = dict(sampler=sampler, sigmas=sigmas, cfg=3.0, **prompts)
    fast = g.add("Quickstep_Accelerate", model=(model, 0), latent=latent, **shared)
    sampled = g.add("SamplerCustom", model=(fast, 0), latent_image=latent, noise_seed=5, **shared)
    report = g.add("Quickstep_Report", latent=(sampled, 0), model=(fast, 0))
    g.add("PreviewAny", source=(report, 1))
    g.add("PreviewAny", source=(fast, 1))
    _shown(g, (g.add("VAEDecode", samples=(report, 0), vae=(model, 2)), 0), "quickstep_accelerate")
    return g


def calibrate() -> Graph:
    """Sigmas for the loaded model, and how much nearer to the converged result they bring it."""
    g = Graph()
    model, prompts, latent = graphs.inputs(g, "unet", "a big blue ring", 4)
    sampler = (g.add("Quickstep_DPMSolverPP"), 0)
    shared = dict(sampler=sampler, cfg=3.0, **prompts)
    found = g.add(
        "Quickstep_Curvature",
        model=(model, 0),
        latent=latent,
        steps=8,
        samples=4,
        minutes=2.0,
        name="demo_schedule",
        **shared,
    )
    sampled = g.add("SamplerCustom", model=(model, 0), sigmas=(found, 0), latent_image=latent, noise_seed=7, **shared)
    g.add("PreviewImage", images=(found, 2))
    g.add("PreviewAny", source=(found, 3))
    _shown(g, (g.add("VAEDecode", samples=(sampled, 0), vae=(model, 2)), 0), "quickstep_calibrate")
    return g


def schedules() -> Graph:
    """Three schedules in one drawing."""
    g = Graph()
    model = g.add("Quickstep_DemoModel", network="unet")
    names = ("KarrasSchedule", "AlignYourSteps", "UniformSchedule")
    drawn = {
        key: (g.add(f"Quickstep_{name}", model=(model, 0), steps=10), 0)
        for key, name in zip(("sigmas", "sigmas_2", "sigmas_3"), names, strict=True)
    }
    plot = g.add("Quickstep_DrawSchedule", **drawn, model=(model, 0))
    g.add("SaveImage", graphs.PICTURES, images=(plot, 0), filename_prefix="quickstep_schedules")
    return g


WORKFLOWS: dict[str, tuple[Callable[[], Graph], str]] = {
    "first_picture": (
        first_picture,
        "# A first picture in 10 calls\nA solver (SAMPLER) and a schedule (SIGMAS) go into the core node *SamplerCustom*. "
        "With your own checkpoint: load it in place of the demo model, set the latent's size and the CFG, take *Upscale Image By* "
        "out, and on flow models (SD3, Flux, Wan) take *Beta* in place of *Karras*.",
    ),
    "flow_model": (
        flow_model,
        "# A flow model\nThe same solver on a flow-matching DiT (SD3's architecture). Beta did best on it in our measurements.",
    ),
    "stochastic": (
        stochastic,
        "# Fresh noise at every step\nSDE-DPM-Solver++ adds noise as it goes. It wants 15 steps or more.",
    ),
    "quickstep_sampler": (
        quickstep_sampler,
        "# One sampler node for all\n*Quickstep Sampler*: choose a solver in its dropdown, its options appear below. "
        "*auto* chooses by model, guidance and steps.",
    ),
    "solvers": (
        solvers,
        "# Four solvers, eight calls each\nThe same noise, the same schedule. Errors are distances to the converged reference.",
    ),
    "momentum": (
        momentum,
        "# Nodes around a sampler\n*Momentum*, *LML*, *Restart* ... take a Quickstep sampler and give one. Here momentum damps "
        "what 6 steps at guidance 7.5 overshoot.",
    ),
    "deepcache": (
        deepcache,
        "# DeepCache with the plain KSampler\nOne call in two reuses the deep part of the UNet. *Report* says what was skipped; "
        "bypass the DeepCache node to see the difference.",
    ),
    "accelerators": (
        accelerators,
        "# What do accelerators buy?\nThe same noise at 25 steps with each of them, and with 12 plain steps: an accelerator is "
        "worth its knobs only where it beats simply taking fewer steps at the same work.",
    ),
    "accelerate": (
        accelerate,
        "# A target instead of knobs\n*Accelerate* tries what fits the model once, keeps what it measured in models/quickstep, and "
        "takes the best for your target. Its report shows all of it, fewer plain steps included.",
    ),
    "t_stitch": (
        t_stitch,
        "# T-Stitch\nThe first 40 % of the steps by a small model, the rest by the large one. The guiders are in the order of use; "
        "each has its model, prompts and scale.",
    ),
    "calibrate": (
        calibrate,
        "# Sigmas for your own model\n*Curvature* measures where the model's prediction bends and places the sigmas there. Its "
        "report says how much nearer to the converged result they end, on seeds kept aside; the file in models/quickstep serves "
        "*Found Schedule*. *Fit Solver* and the other calibrations have the same inputs.",
    ),
    "schedules": (schedules, "# Schedules, drawn\nWhere each schedule puts its network calls."),
    "compare": (
        graphs.demo,
        "# What does a step cost, and what does it buy?\nEvery candidate starts from the same noise; errors are distances to "
        "the converged reference. Add candidates: a free input appears.",
    ),
}


def laid_out(workflow: dict, note: str) -> dict:
    """The workflow in columns, each node right of everything it depends on, with a note in front."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    depth: dict[int, int] = {}

    def column(id: int) -> int:
        if id not in depth:
            depth[id] = max((column(link[1]) + 1 for link in workflow["links"] if link[3] == id), default=0)
        return depth[id]

    columns: dict[int, list[dict]] = {}
    for id in sorted(nodes):
        columns.setdefault(column(id), []).append(nodes[id])
    x, top = 0.0, 230.0
    for index in sorted(columns):
        y = top
        for node in columns[index]:
            if node["type"] == "PreviewImage":
                node["size"] = [320, 280]  # it grows to that with its picture, over what is below
            node["pos"] = [round(x), round(y)]
            y += node["size"][1] + GAP_Y + TITLE
        x += max(node["size"][0] for node in columns[index]) + GAP_X
    workflow["last_node_id"] = last = max(nodes) + 1
    workflow["nodes"].append(
        {
            "id": last, "type": "MarkdownNote", "pos": [0, 0], "size": [520, 150], "flags": {}, "order": 0, "mode": 0,
            "inputs": [], "outputs": [], "properties": {}, "widgets_values": [note],
        }
    )  # fmt: skip
    workflow.pop("id", None)  # made anew by every frontend: nothing to compare
    workflow.setdefault("extra", {}).pop("ds", None)
    return workflow


def thumbnail(picture: bytes, path: Path) -> None:
    from PIL import Image

    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.thumbnail((640, 640), Image.Resampling.LANCZOS)
    image.save(path, quality=85)


def main() -> None:
    node, chromium, playwright = browser()
    environment = {**os.environ, "PLAYWRIGHT": str(playwright), "CHROMIUM": chromium}
    chosen = sys.argv[1:] or list(WORKFLOWS)
    with Server() as server, tempfile.TemporaryDirectory() as folder:
        object_info = server.object_info()
        for name in chosen:
            build, note = WORKFLOWS[name]
            prompt = build().filled(object_info)
            source, target = Path(folder) / "prompt.json", Path(folder) / "workflow.json"
            numbered = renumbered(prompt)
            source.write_text(json.dumps(numbered), encoding="utf-8")
            script = ROOT / "tests" / "browser" / "save.mjs"
            subprocess.run([node, script, str(server.port), source, target], env=environment, check=True)
            made = laid_out(json.loads(target.read_text(encoding="utf-8")), note)
            (FOLDER / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
            outputs = server.run(prompt)
            thumbnail(server.image(outputs[graphs.PICTURES]["images"][0]), FOLDER / f"{name}.jpg")
            say(f"workflows/{name}.json")


def renumbered(prompt: dict) -> dict:
    """The prompt with numbers for ids, which UI workflows have."""
    number = {id: str(i) for i, id in enumerate(prompt, 1)}
    return {
        number[id]: {
            **node,
            "inputs": {
                key: [number[value[0]], value[1]] if isinstance(value, list) else value
                for key, value in node["inputs"].items()
            },
        }
        for id, node in prompt.items()
    }


if __name__ == "__main__":
    sys.exit(stopping_politely(main))
