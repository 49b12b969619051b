"""Measure the demo networks in the real ComfyUI: ``python demo/evaluate.py [--pictures 256] [--write]``.

256 captions from a generator that training did not use, one picture each, sampled to convergence at the recommended CFG;
the judge says how many show what was asked. (There are only 900 full captions, and training saw them all; noise and
pictures are new.) ``--write`` stores the scores in the weights' metadata, ``--sheet FILE`` draws the first twenty.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CFG = 3.0
CALLS = 40
SEED = 20_000  # training draws its pictures from the generator with seed 1


def import_pack(name: str = "quickstep"):
    """Import the repository as ComfyUI does: under a name of the caller's choice, submodules relative to it."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def import_comfy() -> None:
    """Make the ComfyUI of ``COMFYUI_PATH`` importable, on the CPU unless there is a GPU."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    argv, sys.argv = sys.argv, sys.argv[:1]
    import torch
    from comfy.cli_args import args

    sys.argv = argv
    args.cpu = not torch.cuda.is_available()


def prompts(clip, captions: list[str]):
    """A conditioning with one prompt per picture."""
    import torch

    encoded = [clip.encode_from_tokens(clip.tokenize(caption), return_pooled=True) for caption in captions]
    return [[torch.cat([cond for cond, _ in encoded]), {"pooled_output": torch.cat([pooled for _, pooled in encoded])}]]


def sample(model, positive, negative, sampler, sigmas, count: int, seed: int, cfg: float = CFG):
    """Pictures (count, 3, 32, 32) in [0, 1]."""
    import comfy.sample
    import torch

    latent = torch.zeros(count, 3, 32, 32)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    samples = comfy.sample.sample_custom(
        model, noise, cfg, sampler, sigmas, positive, negative, latent, disable_pbar=True, seed=seed
    )
    return ((samples + 1) / 2).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", default=["unet", "unet_small", "dit"])
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--cfg", type=float, default=CFG)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--sheet", type=Path, help="file for a sheet of sample pictures")
    options = parser.parse_args()

    import_comfy()
    import_pack()
    import torch
    from quickstep.demo import judge as judging
    from quickstep.demo import world
    from quickstep.nodes import demo
    from quickstep.nodes.bridge import process_of, sampler
    from quickstep.nodes.plot import picture_grid, to_pictures
    from quickstep.solvers.exponential import DPMSolverPP
    from quickstep.solvers.schedules import ExponentialSchedule
    from safetensors import safe_open
    from safetensors.torch import save_file

    with torch.inference_mode():
        judge = judging.load_judge()
        clip = demo.load_clip()
        generator = torch.Generator().manual_seed(SEED)
        _, attributes, captions = world.sample(options.pictures, generator)
        # Only what the sentence says can be asked of the picture; colour and shape are always said.
        asked = {name: attributes[name] for name in ("colour", "shape")}
        rows = []
        for network in options.networks:
            model = demo.load_model(network)
            process = process_of(model)
            sigmas = torch.from_numpy(
                ExponentialSchedule()(process, process.t_max, process.t_min, options.calls)
            ).float()
            pictures = []
            for i in range(0, options.pictures, 64):
                part = captions[i : i + 64]
                pictures.append(
                    sample(
                        model,
                        prompts(clip, part),
                        prompts(clip, [""]),
                        sampler(DPMSolverPP()),
                        sigmas,
                        len(part),
                        i,
                        options.cfg,
                    )
                )
            pictures = torch.cat(pictures)
            scores = judging.agreement(judge, pictures, asked)
            for name in ("size", "place", "background"):
                said = [i for i, c in enumerate(captions) if world.ATTRIBUTES[name][int(attributes[name][i])] in c]
                scores |= judging.agreement(judge, pictures[said], {name: attributes[name][said]})
            line = ", ".join(f"{name} {share:.1%}" for name, share in scores.items())
            print(
                f"{network}: CFG {options.cfg:g}, {options.calls} calls, {options.pictures} pictures: {line}",
                flush=True,
            )
            shown = to_pictures(pictures[:20].movedim(1, -1))
            rows += [(demo.NETWORKS[network], shown[:10]), ("", shown[10:])]
            if options.write:
                path = ROOT / "demo" / f"{network}.safetensors"
                with safe_open(path, "pt") as file:
                    metadata = file.metadata()
                    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no iterator
                metadata["scores"] = json.dumps({name: round(share, 4) for name, share in scores.items()})
                partial = path.with_suffix(".tmp")
                save_file(tensors, partial, metadata=metadata)
                os.replace(partial, path)
        if options.sheet:
            picture_grid(rows, cell=64).save(options.sheet)


if __name__ == "__main__":
    main()
