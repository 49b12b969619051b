"""DeepCache and encoder propagation on a UNet of Stable Diffusion 1.5's real size: seconds, arithmetic and memory.

    COMFYUI_PATH=... python benchmarks/deepcache_sd15.py [--size 64] [--steps 6] [--batch 1] [--cfg 1] [--repeats 1]
        [--parallel 4]

Encoder propagation has the paper's key steps, its decoder passes one by one and ``--parallel`` at a time.

The weights are random (speed does not depend on them), fp32, on the CPU unless ``--device cuda``. In every repeat the
uncached run comes first and last and the cached ones between, so that a machine that gets slower or faster does so for
both; a speedup is a ratio within one repeat, the table has the median. The arithmetic is counted by torch in one full
and one partial network pass; ``expected`` is the speedup that follows from it alone, for the calls that were made.
"Skipped" answers of a parallel pass count in its arithmetic, which is therefore the same.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=64, help="latent height and width (64 is a 512 x 512 picture)")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--cfg", type=float, default=1.0, help="1 makes one network row per picture, more makes two")
    parser.add_argument("--channels", type=int, default=320, help="320 is the real size; 32 only tries this program")
    parser.add_argument("--depth", type=int, default=-1)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--intervals", type=int, nargs="+", default=[2, 3, 5])
    parser.add_argument("--parallel", type=int, default=4, help="decoder passes in one call, for encoder propagation")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args()


def imports(device: str):
    """ComfyUI and this pack, the latter as a package without running its ``__init__``."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfy.cli_args import args

    args.cpu = device == "cpu"
    package = types.ModuleType("quickstep_benchmark")
    package.__path__ = [str(ROOT)]
    sys.modules[package.__name__] = package


def main() -> None:
    given = arguments()
    imports(given.device)
    import comfy.model_management
    import comfy.model_patcher
    import comfy.samplers
    import comfy.supported_models
    import torch
    from quickstep_benchmark.nodes import attach
    from quickstep_benchmark.solvers.caching.deepcache import DeepCache
    from quickstep_benchmark.solvers.caching.faster_diffusion import FasterDiffusion
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    family = comfy.supported_models.SD15(
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": given.channels,
            "channel_mult": [1, 2, 4, 4],
            "num_res_blocks": [2, 2, 2, 2],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
            "transformer_depth_middle": 1,
            "use_spatial_transformer": True,
            "context_dim": 768,
            "legacy": False,
            "use_linear_in_transformer": False,
            "adm_in_channels": None,
            "use_temporal_resblock": False,
            "use_temporal_attention": False,
        }
    )
    family.unet_config.update(num_heads=8, num_head_channels=-1)
    family.set_inference_dtype(torch.float32, None)
    network = family.get_model({}, "", device="cpu")
    pattern = torch.randn(2**20)  # drawing 860 million numbers takes longer than a run
    with torch.no_grad():
        for name, p in network.diffusion_model.named_parameters():
            if p.ndim >= 2:
                tiled = pattern.repeat(-(-p.numel() // len(pattern)))[: p.numel()]
                p.copy_(tiled.view_as(p) * 0.7 / p[0].numel() ** 0.5)
            else:
                p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    device = comfy.model_management.get_torch_device()
    model = comfy.model_patcher.CoreModelPatcher(network, load_device=device, offload_device=torch.device("cpu"))
    positive, negative = ([[torch.randn(1, 77, 768), {}]] for _ in range(2))
    latent = torch.zeros(given.batch, 4, given.size, given.size)
    noise = torch.randn(latent.shape)

    def run(model, steps=given.steps):
        """The report of one run."""
        with torch.inference_mode():
            ks = comfy.samplers.KSampler(model, steps, device, "euler", "normal", None, model.model_options)
            ks.sample(noise, positive, negative, given.cfg, latent_image=latent, disable_pbar=True, seed=0)
        return attach.ledger_of(model).runs[-1]

    def flops(model, steps):
        with FlopCounterMode(display=False) as counter:
            run(model, steps)
        return counter.get_total_flops()

    print(
        f"SD 1.5 UNet, {given.channels} channels, {sum(p.numel() for p in network.parameters()) / 1e6:.0f} M weights, "
        f"fp32, {torch.cuda.get_device_name() if given.device == 'cuda' else f'{given.threads} CPU threads'}, latent "
        f"{given.size} x {given.size}, batch {given.batch}, CFG {given.cfg:g}, Euler, {given.steps} steps, warm-up "
        f"{given.warmup}, torch {torch.__version__}\n",
        flush=True,
    )
    plain = attach.measure(model)
    one = flops(plain, 1)
    ring, decoder = (  # what a partial call costs: a full and a partial one, less the full one
        flops(attach.attach(model, settings), 2) / one - 1
        for settings in (
            DeepCache(interval=2, depth=given.depth, warmup=1),
            FasterDiffusion(key_steps="list", steps="0"),
        )
    )
    print(
        f"One call: {one / 1e9:.0f} GFLOP; a partial call of DeepCache is {100 * ring:.1f}% of it, the decoder alone "
        f"{100 * decoder:.1f}%.\n",
        flush=True,
    )
    fractions, models = {}, {}
    for n in given.intervals:
        models[f"DeepCache, interval {n}"] = DeepCache(interval=n, depth=given.depth, warmup=given.warmup)
        fractions[f"DeepCache, interval {n}"] = ring
    keys = ", ".join(map(str, sorted(FasterDiffusion().keys(given.steps))))
    for many in (1, given.parallel):
        label = f"encoder propagation, key steps {keys}, {many} at a time"
        models[label] = FasterDiffusion(key_steps="list", steps=keys, parallel_batch=many)
        fractions[label] = decoder
    models = {n: attach.attach(model, settings) for n, settings in models.items()}
    ratios = {n: [] for n in models}
    for repeat in range(given.repeats):
        order = list(models) if repeat % 2 == 0 else list(models)[::-1]
        before = run(plain)
        reports = {n: run(models[n]) for n in order}
        seconds = (before.seconds + run(plain).seconds) / 2
        for n, report in reports.items():
            ratios[n].append(seconds / report.seconds)
    print(f"Uncached: {seconds:.2f} s.\n")
    print("| method | full + partial calls | seconds | speedup | expected | work, counted | work, reported | cache |")
    print("|---|---|---|---|---|---|---|---|")
    for n, report in reports.items():
        done = (report.full + report.partial * fractions[n]) / report.calls
        print(
            f"| {n} | {report.full} + {report.partial} | {report.seconds:.2f} | {statistics.median(ratios[n]):.2f} "
            f"| {1 / done:.2f} | {100 * done:.1f}% | {100 * report.work:.1f}% | {report.cache_bytes / 2**20:.1f} MB |"
        )


if __name__ == "__main__":
    main()
