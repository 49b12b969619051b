"""What a solver costs per step beside the network, against core's ``dpmpp_2m``: ``make bench-overhead``.

The network is replaced by one that returns a stored tensor; what is left is the solver. Ratios in one run, the order
of the contestants alternating; core's and ours get the same latent, the same sigmas, the same loop around them.
"""

from __future__ import annotations

import time
from statistics import median
from types import SimpleNamespace

from _pack import import_comfy, import_pack

import_comfy()
import_pack()
import torch  # noqa: E402
from comfy.extra_samplers import uni_pc  # noqa: E402
from comfy.k_diffusion import sampling as core  # noqa: E402
from comfy.model_sampling import EPS, ModelSamplingDiscrete  # noqa: E402
from quickstep.nodes.bridge import sampler  # noqa: E402
from quickstep.solvers.deis import DEIS  # noqa: E402
from quickstep.solvers.dpm_solver_v3 import DPMSolverV3  # noqa: E402
from quickstep.solvers.er_sde import ERSDE  # noqa: E402
from quickstep.solvers.exponential import DDIM, DPMSolverPP, SDEDPMSolverPP  # noqa: E402
from quickstep.solvers.momentum import GHVB  # noqa: E402
from quickstep.solvers.pndm import IPNDM  # noqa: E402
from quickstep.solvers.rho_rk import RhoRK  # noqa: E402
from quickstep.solvers.sa import SASolver  # noqa: E402
from quickstep.solvers.unipc import UniPC  # noqa: E402
from quickstep.solvers.usf import USF  # noqa: E402

SHAPES = {"4x64x64 (SD 1.5, 512 px)": (1, 4, 64, 64), "16x21x60x104 (Wan, 81 frames 480p)": (1, 16, 21, 60, 104)}
STEPS, REPEATS = 20, 15


class Sampling(ModelSamplingDiscrete, EPS):
    pass


class Stored:
    """A denoiser that costs nothing."""

    def __init__(self, shape):
        self.answer = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        sampling = Sampling()
        patcher = SimpleNamespace(get_model_object=lambda name: sampling)
        self.inner_model = SimpleNamespace(model_patcher=patcher)

    def __call__(self, x, sigma, **unused):
        return self.answer


def main() -> None:
    contestants = {
        "core dpmpp_2m": core.sample_dpmpp_2m,
        "core uni_pc_bh2": uni_pc.sample_unipc_bh2,
        "core deis": core.sample_deis,
        "core ipndm": core.sample_ipndm,
        "core sa_solver (eta 0)": lambda *a, **k: core.sample_sa_solver(*a, tau_func=lambda sigma: 0.0, **k),
        "core heun": core.sample_heun,
        "UniPC 3": sampler(UniPC(order=3)).sampler_function,
        "DEIS 3, t": sampler(DEIS()).sampler_function,
        "iPNDM 4": sampler(IPNDM()).sampler_function,
        "GHVB 1.8": sampler(GHVB()).sampler_function,
        "SA-Solver (eta 0)": sampler(SASolver(eta=0.0)).sampler_function,
        "rhoRK-DEIS 2heun": sampler(RhoRK()).sampler_function,
        "ER-SDE 3 (ode)": sampler(ERSDE(phi="ode")).sampler_function,
        "DPM-Solver-v3": sampler(DPMSolverV3()).sampler_function,
        "USF": sampler(USF()).sampler_function,
        "DDIM": sampler(DDIM()).sampler_function,
        "DPM-Solver++ 2M": sampler(DPMSolverPP(order=2)).sampler_function,
        "DPM-Solver++ 3M": sampler(DPMSolverPP(order=3)).sampler_function,
        "core dpmpp_2m_sde": core.sample_dpmpp_2m_sde,
        "SDE-DPM-Solver++ 2M, brownian": sampler(SDEDPMSolverPP()).sampler_function,
        "SDE-DPM-Solver++ 2M, gaussian": sampler(SDEDPMSolverPP(noise="gaussian")).sampler_function,
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{STEPS} steps, median of {REPEATS}, {device}, {torch.get_num_threads()} threads\n")
    print("| latent | sampler | ms per step | ratio to core dpmpp_2m |\n|---|---|---:|---:|")
    for name, shape in SHAPES.items():
        model = Stored(shape)
        model.answer = model.answer.to(device)
        x = torch.randn(shape, device=device)
        sigmas = torch.linspace(14.6, 0, STEPS + 1, device=device)
        times: dict[str, list[float]] = {key: [] for key in contestants}
        with torch.inference_mode():
            for i in range(REPEATS + 1):
                order = list(contestants.items())
                if x.numel() > 1e6:  # core's torchsde needs seconds per step here: it would be all that is measured
                    order = [(key, run) for key, run in order if "core dpmpp_2m_sde" not in key]
                for key, run in order if i % 2 else reversed(order):
                    began = time.perf_counter()
                    run(model, x, sigmas, extra_args={"seed": 1}, disable=True)
                    if device == "cuda":
                        torch.cuda.synchronize()
                    if i:  # the first round warms up
                        times[key].append((time.perf_counter() - began) / STEPS * 1e3)
        base = median(times["core dpmpp_2m"])
        for key, values in times.items():
            if values:
                print(f"| {name} | {key} | {median(values):.3f} | {median(values) / base:.2f} |", flush=True)


if __name__ == "__main__":
    main()
