"""Train the demo model: ``make train-demo``, or ``python demo/train.py <part> [--steps N] [--device cuda]``.

Parts, in order: ``judge``, ``text`` (the text encoder, then frozen and shared), ``unet``, ``unet_small``, ``dit``.
Every part writes a checkpoint to ``demo/checkpoints`` and resumes from it; finished weights go to ``demo/*.safetensors`` in
fp16. ``COMFYUI_PATH`` names the ComfyUI whose network classes are trained (the Makefile sets it).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
CHECKPOINTS = HERE / "checkpoints"


def _import_demo():
    """Import this folder as the package ``quickstep_demo``, whatever the repository is called."""
    if "quickstep_demo" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "quickstep_demo", HERE / "__init__.py", submodule_search_locations=[str(HERE)]
        )
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["quickstep_demo"] = module
        spec.loader.exec_module(module)


_import_demo()
from quickstep_demo import judge as judge_module  # noqa: E402
from quickstep_demo import text, world  # noqa: E402
from quickstep_demo.train_recipes import RECIPES  # noqa: E402


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz iterations (Jordan et al., 2024), for matrices and kernels.

    ``torch.optim.Muon`` takes matrices only; a UNet's weights are mostly convolution kernels, flattened here.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                rows, columns = update.shape
                x = update.T if rows > columns else update
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = x.T if rows > columns else x
                scale = 0.2 * math.sqrt(max(rows, columns))
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(x.reshape(p.shape), alpha=-group["lr"] * scale)


def optimizers(net: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the inner matrices, AdamW for embeddings, first and last layers, norms and biases."""
    inner = ("input_blocks", "middle_block", "output_blocks", "joint_blocks")
    outer = ("emb_layers", "input_blocks.0.", "adaLN")
    muon, adam = [], []
    for name, p in net.named_parameters():
        matrix = p.ndim >= 2 and any(part in name for part in inner) and not any(part in name for part in outer)
        (muon if matrix else adam).append(p)
    made = [torch.optim.AdamW(adam, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)]
    if muon:
        made.append(Muon(muon, lr=lr))
    return made


def save_whole(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a file completely or not at all."""
    partial = path.with_suffix(".tmp")
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, path)


def save_checkpoint(path: Path, step: int, net, ema, opts, generator) -> None:
    tensors = {f"net.{k}": v for k, v in net.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.items()}
    for i, opt in enumerate(opts):
        for j, state in opt.state_dict()["state"].items():
            tensors |= {f"opt.{i}.{j}.{k}": v for k, v in state.items()}
    tensors["generator"] = generator.get_state()
    tensors = {k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()}
    save_whole(tensors, path, {"step": str(step)})


def load_checkpoint(path: Path, net, opts, generator, device) -> tuple[int, dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    tensors = load_file(path)
    net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
    ema = {k[4:]: v.to(device) for k, v in tensors.items() if k.startswith("ema.")}
    for i, opt in enumerate(opts):
        whole = opt.state_dict()
        for key, value in tensors.items():
            if key.startswith(f"opt.{i}."):
                _, _, j, name = key.split(".", 3)
                whole["state"].setdefault(int(j), {})[name] = value
        opt.load_state_dict(whole)
    generator.set_state(tensors["generator"])
    return step, ema


def reset(net: nn.Module) -> nn.Module:
    """Torch's own initial weights for every layer (ComfyUI's classes leave memory as it was)."""
    for module in net.modules():
        for kind in (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm, nn.Embedding):
            if isinstance(module, kind):
                kind.reset_parameters(module)
                break
    for name, p in net.named_parameters():
        # Residual branches and the output start at zero: the network begins as the identity.
        zero = ("out_layers.3.", "proj_out.", "out.2.", "adaLN_modulation.", "final_layer.linear.")
        if any(part in name for part in zero):
            nn.init.zeros_(p)
        elif "ln_q" in name or "ln_k" in name:
            nn.init.ones_(p)
    return net


def comfy_network(name: str) -> nn.Module:
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    argv, sys.argv = sys.argv, sys.argv[:1]
    from comfy.cli_args import args

    sys.argv = argv
    args.cpu, args.use_pytorch_cross_attention = True, True  # we move the module ourselves
    import comfy.ops
    from quickstep_demo import networks

    return reset(networks.build(name, comfy.ops.disable_weight_init))


class Ids:
    """Captions to a tensor of token ids."""

    def __init__(self, device):
        self.device = device

    def __call__(self, captions: list[str]) -> torch.Tensor:
        return torch.tensor([world.tokenize(c) for c in captions], device=self.device)


def picture_loss(name: str, net, encoder, ids, device):
    """The training objective of a picture network: v-prediction for the UNets, velocity (flow matching) for the DiT."""
    # ComfyUI's default discrete schedule, "scaled linear" betas of Stable Diffusion, 1000 steps.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0).float().to(device)

    def loss(pictures, _attributes, captions, generator):
        x0 = (pictures * 2 - 1).to(device)
        n = len(x0)
        with torch.no_grad():
            context = encoder(ids(captions))
        noise = torch.randn(x0.shape, generator=generator).to(device)
        stratified = ((torch.arange(n) + torch.rand(n, generator=generator)) / n).to(device)
        if name == "dit":
            t = torch.sigmoid(torch.special.ndtri(stratified.clamp(1e-4, 1 - 1e-4)))  # logit-normal
            s = t[:, None, None, None]
            out = net((1 - s) * x0 + s * noise, t * 1000, context=context)
            return (out - (noise - x0)).square().mean()
        t = (stratified * 1000).long().clamp(max=999)
        a = alpha_bar[t][:, None, None, None]
        out = net(a.sqrt() * x0 + (1 - a).sqrt() * noise, t.float(), context=context)
        return (out - (a.sqrt() * noise - (1 - a).sqrt() * x0)).square().mean()

    return loss


def parts(name: str, device):
    """``(module to train, loss(pictures, attributes, captions, generator), share of empty captions)``."""
    ids = Ids(device)
    if name == "judge":
        net = judge_module.Judge()

        def judge_loss(pictures, attributes, _captions, generator):
            noise = torch.randn(pictures.shape, generator=generator) * torch.rand(len(pictures), 1, 1, 1) * 0.05
            _, logits = net((pictures + noise).to(device))
            return torch.stack([F.cross_entropy(logits[k], v.to(device)) for k, v in attributes.items()]).sum()

        return net, judge_loss, 0.0
    if name == "text":
        net = nn.ModuleDict({"encoder": text.TextEncoder(), "reader": text.AttributeReader()})
        nn.init.normal_(net["encoder"].text_model.embeddings.token_embedding.weight, std=0.5)
        nn.init.normal_(net["encoder"].text_model.embeddings.position_embedding.weight, std=0.1)

        def text_loss(_pictures, attributes, captions, _generator):
            tokens = ids(captions)
            out = net["encoder"](tokens)
            end = out[torch.arange(len(tokens)), (tokens == world.END).int().argmax(1)]
            wanted = {k: v.clone() for k, v in attributes.items()}
            for k, words in world.ATTRIBUTES.items():
                said = torch.tensor([words[int(i)] in c for i, c in zip(attributes[k], captions, strict=True)])
                wanted[k][~said] = len(words)
            logits = net["reader"](end)
            return torch.stack([F.cross_entropy(logits[k], v.to(device)) for k, v in wanted.items()]).sum()

        return net, text_loss, 0.1
    encoder = text.TextEncoder()
    encoder.load_state_dict({k: v.float() for k, v in load_file(HERE / "text_encoder.safetensors").items()})
    encoder.to(device).requires_grad_(False)
    net = comfy_network(name)
    return net, picture_loss(name, net, encoder, ids, device), 0.1


def export(name: str, step: int, ema: dict[str, torch.Tensor]) -> Path:
    """Write the averaged weights as fp16, in the layout ComfyUI's loaders know."""
    file = {"text": "text_encoder"}.get(name, name)
    prefix = {"judge": "", "text": ""}.get(name, "model.diffusion_model.")
    if name == "text":
        ema = {k.removeprefix("encoder."): v for k, v in ema.items() if k.startswith("encoder.")}
    tensors = {prefix + k: v.half() if v.is_floating_point() else v for k, v in ema.items()}
    path = HERE / f"{file}.safetensors"
    metadata = {
        "format": "quickstep-demo",
        "part": name,
        "world": world.WORLD_VERSION,
        "training_steps": str(step),
        "licence": "Apache-2.0",
        "scores": "{}",  # measured and written by demo/evaluate.py
    }
    save_whole({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata)
    return path


def train(name: str, steps: int, batch: int, lr: float, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    CHECKPOINTS.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    net, loss_of, drop = parts(name, device)
    net.to(device).train()
    opts = optimizers(net, lr)
    ema = {k: v.detach().clone() for k, v in net.state_dict().items()}
    checkpoint, step = CHECKPOINTS / f"{name}.safetensors", 0
    if checkpoint.exists():
        step, ema = load_checkpoint(checkpoint, net, opts, generator, device)
        print(f"{name}: resumed at step {step} of {steps}", flush=True)
    size = sum(p.numel() for p in net.parameters()) / 1e6
    print(f"{name}: {size:.2f} M parameters, {steps} steps of {batch} pictures on {device}", flush=True)
    start, mean = time.time(), None
    first = step
    while step < steps:
        fraction = step / steps
        factor = min(1.0, (step + 1) / 100) * (
            1.0 if fraction < 0.4 else 0.5 * (1 + math.cos(math.pi * (fraction - 0.4) / 0.6))
        )
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = lr * factor
        pictures, attributes, captions = world.sample(batch, generator, drop)
        loss = loss_of(pictures, attributes, captions, generator)
        for opt in opts:
            opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for opt in opts:
            opt.step()
        step += 1
        decay = min(0.998, (1 + step) / (10 + step))
        for k, v in net.state_dict().items():
            if v.is_floating_point():
                ema[k].lerp_(v, 1 - decay)
            else:
                ema[k].copy_(v)
        if step % 50 == 0 or step == steps:
            value = loss.item()
            mean = value if mean is None else 0.7 * mean + 0.3 * value
            rate = (step - first) * batch / (time.time() - start)
            left = (steps - step) * batch / rate / 60
            print(f"{name} {step}/{steps} loss {mean:.4f} {rate:.0f} pictures/s, {left:.0f} min left", flush=True)
        if step % 250 == 0 or step == steps:
            save_checkpoint(checkpoint, step, net, ema, opts, generator)
    print(f"{name}: wrote {export(name, step, ema)} after {(time.time() - start) / 60:.1f} min", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=[*RECIPES, "all"])
    parser.add_argument("--steps", type=int, help="total steps, instead of the recipe's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    for name in RECIPES if options.part == "all" else [options.part]:
        recipe = dict(RECIPES[name])
        if options.steps:
            recipe["steps"] = options.steps
        train(name, **recipe, device=options.device, threads=options.threads)


if __name__ == "__main__":
    main()
