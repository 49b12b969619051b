"""The authors' DeepCache (their PyPI package, on diffusers' UNet) beside ours (on ComfyUI's), with the same weights.

    pip install --no-deps --target DIR DeepCache==0.1.1
    COMFYUI_PATH=... python benchmarks/original_deepcache.py --package DIR [--size 16] [--steps 10] [--channels 320] [--repeats 1]

Stable Diffusion 1.5's UNet with random weights, once in ComfyUI's and once in diffusers' code (the tensors are the same
memory, named by ComfyUI's own table). Either is sampled with Euler on the same sigmas from the same noise, without guidance,
plain and cached. Their ``cache_branch_id`` counts as our ``depth``; both compute every ``interval``-th call in full,
and ours does not forecast here.
The package patches ``forward`` of the pipeline's blocks, so a stand-in of a pipeline is all it needs; it is no requirement of
this project. Writes ``results/accelerators_original.md``, and says there why if the comparison could not be made.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from statistics import median
from types import SimpleNamespace

from _pack import import_comfy, import_pack

import_comfy()
import_pack()
import _accelerators_models as models  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from _accelerators_clock import Clock  # noqa: E402
from quickstep.nodes.attach import FORWARD, attach, measure  # noqa: E402
from quickstep.solvers.caching.deepcache import DeepCache  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
PAIRS = ((2, 0), (3, 0), (3, 1), (3, 2), (5, 1), (5, 4))
"""Interval, branch."""


def diffusers_twin(network, config: dict, channels: int):
    """diffusers' UNet over the tensors of ComfyUI's."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        twin = UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=config["context_dim"],
            block_out_channels=tuple(channels * m for m in config["channel_mult"]),
            attention_head_dim=8,  # which means the number of heads, in this class
        )
    names = comfy.utils.unet_to_diffusers(config)
    ours = network.state_dict()
    state = {theirs: ours[names[theirs]] for theirs in twin.state_dict()}
    twin.load_state_dict(state, assign=True)
    return twin.eval().requires_grad_(False)


class Theirs:
    """Euler on diffusers' UNet, with the package's helper around it or not."""

    def __init__(self, twin, helper, sampling, prompt, noise, sigmas):
        self.unet, self.helper, self.sampling, self.sigmas = twin, helper, sampling, sigmas
        self.prompt, self.noise, self.clock = prompt, noise, Clock(twin, FORWARD)
        self.pipe = SimpleNamespace(unet=twin, scheduler=SimpleNamespace(timesteps=sampling.timestep(sigmas[:-1])))

    def __call__(self, interval: int = 1, branch: int = 0) -> tuple[torch.Tensor, float]:
        helper = self.helper(pipe=self.pipe)
        if interval > 1:
            helper.set_params(cache_interval=interval, cache_branch_id=branch)
            helper.enable()
        x = self.sampling.noise_scaling(self.sigmas[0], self.noise, torch.zeros_like(self.noise), True)
        self.clock.read()
        try:
            for s, t in zip(self.sigmas, self.sigmas[1:], strict=False):
                inside = self.sampling.calculate_input(s.view(1), x)
                eps = self.unet(inside, self.sampling.timestep(s), encoder_hidden_states=self.prompt).sample
                x = x + (t - s) * eps
        finally:
            if interval > 1:
                helper.disable()
        return x.cpu(), sum(seconds for seconds, _ in self.clock.read())


class Ours:
    def __init__(self, model, prompt, noise, sigmas):
        self.model, self.prompt, self.noise, self.sigmas = model, prompt, noise, sigmas
        self.clock = Clock(model.model.diffusion_model, FORWARD)

    def __call__(self, interval: int = 1, branch: int = 0) -> tuple[torch.Tensor, float]:
        settings = DeepCache(interval=interval, depth=branch, warmup=1, forecast_order="0")
        model = attach(self.model, settings) if interval > 1 else measure(self.model)
        self.clock.read()
        made = comfy.sample.sample_custom(
            model, self.noise, 1.0, comfy.samplers.sampler_object("euler"), self.sigmas, self.prompt, self.prompt,
            torch.zeros_like(self.noise), disable_pbar=True, seed=0,
        )  # fmt: skip
        return model.model.process_latent_in(made).cpu(), sum(seconds for seconds, _ in self.clock.read())


def compare(given) -> list[str]:
    if given.package:
        sys.path.insert(0, given.package)
    try:
        helper = importlib.import_module("DeepCache").DeepCacheSDHelper
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        return [f"Not compared: {error}. `pip install --no-deps --target DIR DeepCache==0.1.1`, then `--package DIR`."]
    torch.manual_seed(0)
    model = models.build("sd15", torch.float32, given.channels)
    config = {**model.model.model_config.unet_config, "num_res_blocks": [2, 2, 2, 2]}
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", given.steps)
    prompt = models.prompt("sd15", 1)
    noise = torch.randn(1, 4, given.size, given.size)
    ours = Ours(model, prompt, noise, sigmas)
    plain = ours()[0]  # also loads the model to where it computes
    device = model.load_device
    twin = diffusers_twin(model.model.diffusion_model, config, given.channels).to(device)
    on_device = (prompt[0][0].to(device), noise.to(device), sigmas.to(device))
    theirs = Theirs(twin, helper, sampling.to(device), *on_device)
    weights = sum(p.numel() for p in twin.parameters())
    lines = [
        f"SD 1.5's UNet, {weights / 1e6:.0f} M random weights, fp32, latent {given.size} x "
        f"{given.size}, Euler, {given.steps} steps, CFG 1, {given.threads} threads, DeepCache 0.1.1 on diffusers "
        f"{diffusers.__version__}. Interval 1 is the plain model: what remains there is ComfyUI's against diffusers' arithmetic.",
        "",
        "*Apart*: relative RMS between the two results; *off*: what the cache changes, of our plain result. Seconds of all "
        f"network passes of a run, median of {given.repeats}.",
        "",
        "| interval | branch = depth | apart | off | theirs: s | speed-up | ours: s | speed-up |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    runs = {pair: [] for pair in [(1, 0), *PAIRS]}
    for _ in range(given.repeats):
        for pair, made in runs.items():
            made.append((theirs(*pair), ours(*pair)))
            print(pair, distance(made[-1][0][0], made[-1][1][0]), flush=True)
    seconds = {pair: [median(both[i][1] for both in made) for i in (0, 1)] for pair, made in runs.items()}
    for (interval, branch), made in runs.items():
        (a, _), (b, _) = made[-1]
        cells = [f"{interval}", f"{branch}", f"{distance(a, b):.1e}", f"{distance(b, plain):.1e}"]
        for i in (0, 1):
            spent = seconds[interval, branch][i]
            cells += [f"{spent:.2f}", f"{seconds[1, 0][i] / spent:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--package", help="folder that the package was installed into")
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--channels", type=int, default=320, help="320 is the real size; 32 only tries this program")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with torch.inference_mode():
        lines = compare(given)
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # demo/ is before it, and has a run.py as well
    from _hardware import hardware

    text = "\n".join(["# DeepCache: the authors' program and ours", "", hardware(), "", *lines])
    (RESULTS / "accelerators_original.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
