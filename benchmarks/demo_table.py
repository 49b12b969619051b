"""The demo networks: error, attribute accuracy and seconds of the usual candidates; ``make bench-demo``.

256 captions (``--pictures``) from a generator no training or tuning used; errors are RMS distances of the pictures, pixels in
[-1, 1], to the converged reference from the same noise, mean and median over pictures. "work" counts network calls
weighted with the share that was computed; the row with the nearest plain step count shows what the same work buys
without an accelerator.
"""

from __future__ import annotations

import argparse

from _pack import CFG, import_comfy, import_pack, prompts

import_comfy()
import_pack()
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import torch  # noqa: E402
from quickstep.demo import judge as judging  # noqa: E402
from quickstep.demo import world  # noqa: E402
from quickstep.nodes import demo  # noqa: E402
from quickstep.nodes.attach import attach, ledger_of, measure  # noqa: E402
from quickstep.nodes.bridge import process_of, sampler  # noqa: E402
from quickstep.solvers import schedules  # noqa: E402
from quickstep.solvers.caching.deepcache import DeepCache  # noqa: E402
from quickstep.solvers.compare import rms_per_sample  # noqa: E402
from quickstep.solvers.exponential import DPMSolverPP  # noqa: E402

SEED = 31_000  # captions and noise of the report
TUNING = 32_000  # captions and noise of ``--sweep``, which the choices were made on
STEPS = 8
CHOSEN = {  # the best of ``--sweep`` on other captions and noise
    "unet": (DPMSolverPP(order=2), schedules.KarrasSchedule(rho=5.0, shift=0.7)),
    "unet_small": (DPMSolverPP(order=2), schedules.KarrasSchedule()),
    "dit": (DPMSolverPP(order=2), schedules.BetaSchedule()),
}


def core(name: str, steps: int, scheduler: str):
    def made(model):
        sampling = model.get_model_object("model_sampling")
        return comfy.samplers.sampler_object(name), comfy.samplers.calculate_sigmas(sampling, scheduler, steps)

    return made


def ours(solver, schedule, steps: int):
    def made(model):
        process = process_of(model)
        return sampler(solver), torch.from_numpy(schedule(process, process.t_max, process.t_min, steps)).float()

    return made


def candidates(network: str, steps: int = STEPS):
    """``(label, how to sample, accelerator or None)``."""
    stock = "simple" if network == "dit" else "karras"
    solver, schedule = CHOSEN[network]
    rows = [
        (f"ComfyUI dpmpp_2m, {stock}", core("dpmpp_2m", steps, stock), None),
        ("ComfyUI euler, normal", core("euler", steps, "normal"), None),
        (f"Quickstep, {name(solver, schedule)}", ours(solver, schedule, steps), None),
    ]
    if network != "dit":
        for interval in (2, 3):
            label = f"the same + DeepCache, interval {interval}"
            rows.append((label, ours(solver, schedule, steps), DeepCache(interval=interval)))
        rows.append(("the same, fewer steps instead", ours(solver, schedule, steps - 2), None))
    return rows


def name(solver: DPMSolverPP, schedule: schedules.Schedule) -> str:
    kind = {2: solver.correction, 3: solver.third_order}.get(solver.order, "")
    return f"{solver.title} {solver.order}M {kind}, {type(schedule).__name__.removesuffix('Schedule')}"


def sweep(network: str):
    """Every schedule and order at 8 calls: what ``CHOSEN`` was chosen from."""
    samplers = ("dpmpp_2m", "uni_pc", "deis", "euler")
    schedulers = ("normal", "simple", "karras", "exponential", "beta", "kl_optimal", "sgm_uniform")
    rows = [(f"core {s}, {k}", core(s, STEPS, k), None) for s in samplers for k in schedulers]
    solvers = [
        DPMSolverPP(order=2),
        DPMSolverPP(order=2, correction="taylor"),
        DPMSolverPP(order=3),
        DPMSolverPP(order=3, third_order="reference"),
    ]
    for schedule in (closed() for closed in schedules.CLOSED_FORMS):
        rows += [(name(solver, schedule), ours(solver, schedule, STEPS), None) for solver in solvers]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=["unet", "unet_small", "dit"])
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--reference", type=int, default=100, help="calls of the reference")
    parser.add_argument("--cfg", type=float, default=CFG)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    judge, clip = judging.load_judge(), demo.load_clip()
    seed = TUNING if options.sweep else SEED
    _, attributes, captions = world.sample(options.pictures, torch.Generator().manual_seed(seed))
    asked = {name: attributes[name] for name in ("colour", "shape")}
    noise = torch.randn(options.pictures, 3, 32, 32, generator=torch.Generator().manual_seed(seed + 1))

    def sample(model, how):
        model = measure(model)
        solver, sigmas = how(model)
        made, seconds, reports = [], 0.0, []
        for i in range(0, options.pictures, 64):
            part = slice(i, i + 64)
            z = noise[part]
            made.append(
                comfy.sample.sample_custom(
                    model, z, options.cfg, solver, sigmas, prompts(clip, captions[part]), prompts(clip, [""]),
                    torch.zeros_like(z), disable_pbar=True, seed=i,
                )
            )  # fmt: skip
            reports.append(ledger_of(model).runs[-1])
            seconds += reports[-1].seconds
        return torch.cat(made), reports[-1], seconds

    with torch.inference_mode():
        for network in options.networks:
            model = demo.load_model(network)
            converged = DPMSolverPP(order=3, lower_order_final="never")
            grid = schedules.ExponentialSchedule()
            half, *half_cost = sample(model, ours(converged, grid, options.reference // 2))
            truth, *cost = sample(model, ours(converged, grid, options.reference))
            print(f"\n{network}, CFG {options.cfg:g}, {options.pictures} pictures\n")
            print("| candidate | calls | work | seconds | error (mean) | error (median) | colour + shape right |")
            print("|---|---:|---:|---:|---:|---:|---:|")

            def row(label, report, seconds, pictures, truth=truth):
                errors = torch.tensor(rms_per_sample(pictures, truth))
                right = judging.agreement(judge, (pictures + 1) / 2, asked)["colour+shape"]
                work = report.calls * (report.work or 1.0)
                cells = (
                    f"{work:.1f}",
                    f"{seconds:.1f}",
                    f"{errors.mean():.4f}",
                    f"{errors.median():.4f}",
                    f"{right:.1%}",
                )
                print(f"| {label} | {report.calls} | " + " | ".join(cells) + " |", flush=True)

            row("reference", *cost, truth)
            row("reference, half the calls", *half_cost, half)
            for label, how, accelerator in sweep(network) if options.sweep else candidates(network, options.steps):
                try:
                    accelerated = attach(model, accelerator) if accelerator else model
                    pictures, report, seconds = sample(accelerated, how)
                except ValueError as error:  # a schedule that does not fit this model
                    print(f"| {label} | - | - | - | {error} | | |", flush=True)
                    continue
                row(label, report, seconds, pictures)


if __name__ == "__main__":
    main()
