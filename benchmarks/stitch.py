"""T-Stitch on the demo networks: what share of the calls another network may make, and what it costs in error and attributes.

CFG 4, 20 steps, dpmpp_2m; the schedule is Karras on the UNets and Beta on the DiT. Error: mean RMS distance of the pictures,
pixels in [-1, 1], to those of the last network alone from the same noise. Early steps decide about the layout, so an error
of the size of "100 %" (the other network alone) need not be a worse picture: "right" is the share of pictures whose
colour and shape the judge reads as asked. Seconds are CPU time of all calls together. A call of the small UNet costs
0.45 of the UNet's here (1.2 M and 4.6 M parameters); the pairs with the DiT are about conversion, not about speed.

    python benchmarks/stitch.py [unet_small-unet unet-dit dit-unet] [--pictures 32] [--steps 20]
"""

from __future__ import annotations

import argparse
import time

from _pack import import_comfy, import_pack, prompts

import_comfy()
import_pack()
import comfy.samplers  # noqa: E402
import torch  # noqa: E402
from quickstep.demo import judge as judging  # noqa: E402
from quickstep.demo import world  # noqa: E402
from quickstep.nodes import demo  # noqa: E402
from quickstep.nodes.stitch import stitched  # noqa: E402
from quickstep.solvers.compare import rms_per_sample  # noqa: E402
from quickstep.solvers.stitch import Alternate, TStitch  # noqa: E402

SEED = 51_000  # captions and noise that no tuning saw
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
PAIRS = {  # (first, last): how sampling is shared
    ("unet_small", "unet"): [*map(TStitch, SHARES), *map(Alternate, ("AAB", "AB"))],
    ("unet", "dit"): [*map(TStitch, SHARES[:4]), TStitch(1.0)],
    ("dit", "unet"): [*map(TStitch, SHARES[:4]), TStitch(1.0)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="*", default=["-".join(pair) for pair in PAIRS], help="such as unet_small-unet")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    clip, judge = demo.load_clip(), judging.load_judge()
    _, attributes, captions = world.sample(options.pictures, torch.Generator().manual_seed(SEED))
    asked = {name: attributes[name] for name in ("colour", "shape")}
    noise = torch.randn(options.pictures, 3, 32, 32, generator=torch.Generator().manual_seed(SEED + 1))
    positive, negative = prompts(clip, captions), prompts(clip, [""])

    def guider(network: str):
        made = comfy.samplers.CFGGuider(demo.load_model(network))
        made.set_conds(positive, negative)
        made.set_cfg(4.0)
        return made

    print(f"{options.pictures} pictures, {options.steps} steps")
    with torch.inference_mode():
        for (first, last), ways in PAIRS.items():
            if f"{first}-{last}" not in options.pairs:
                continue
            pair = [guider(first), guider(last)]
            sampling = pair[1].model_patcher.get_model_object("model_sampling")
            sigmas = comfy.samplers.calculate_sigmas(sampling, "beta" if last == "dit" else "karras", options.steps)
            print(f"\n## {first}, then {last}\n\n| by {first} | error | right | CPU seconds |\n|---|---:|---:|---:|")
            alone = None
            for how in ways:
                began = time.process_time()
                made = stitched(pair, how)[0].sample(
                    noise, torch.zeros_like(noise), comfy.samplers.sampler_object("dpmpp_2m"), sigmas,
                    disable_pbar=True, seed=0,
                )  # fmt: skip
                seconds = time.process_time() - began
                alone = made if alone is None else alone
                error = sum(rms_per_sample(made, alone)) / len(made)
                right = judging.agreement(judge, (made + 1) / 2, asked)["colour+shape"]
                name = f"{how.fraction:.0%} first" if isinstance(how, TStitch) else f"steps {how.pattern}"
                print(f"| {name} | {error:.3f} | {right:.1%} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
