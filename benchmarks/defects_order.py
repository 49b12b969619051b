"""Defects of ComfyUI's samplers that cost accuracy: their order, their weights."""

from __future__ import annotations

import logging
import math

import comfy.samplers
import torch
from _defect import CORE, defect
from _exact import VE, constant, errors, mixture, model_sampling, orders
from comfy.extra_samplers import uni_pc
from comfy.k_diffusion import sampling as core

ORDERS = "order {ve:.2f} (VE), {flow:.2f} (flow)"


@defect(
    "`dpmpp_3m_sde`, eta 0", CORE, ORDERS, "3", "`DPMSolverPP`, third_order exact: order 3",
    lambda n: n["ve"] < 2.5 and n["flow"] < 2.5,
)  # fmt: skip
def dpmpp_3m():
    """The third-order term of DPM-Solver++(3M) has half the moment the Taylor expansion gives, as in the authors' code
    and every copy of it; it converges at order 2."""
    return orders(core.sample_dpmpp_3m_sde, eta=0.0)


@defect(
    "`ipndm_v`", CORE, ORDERS + "; a constant picture comes out wrong by {constant:.1e}", "4; 0",
    "`IPNDM`, coefficients exact: Lagrange weights of the real nodes", lambda n: n["ve"] < 3.0 and n["constant"] > 1e-4,
)  # fmt: skip
def ipndm_v():
    """Its variable-step weights of order 4, the default, are wrong: they do not even add up to the step."""
    times = [0.95, 0.8, 0.65, 0.5, 0.35, 0.2, 0.1, 0.05]
    x = torch.full((1, 1, 1, 1), 5.0, dtype=torch.float64)
    expected = 0.95 * 2.0 + 0.05 / 0.95 * (5.0 - 0.05 * 2.0)
    got = constant(flow=True).run(core.sample_ipndm_v, x, times)
    return {**orders(core.sample_ipndm_v), "constant": (got - expected).abs().item()}


@defect(
    "`ipndm`", CORE, ORDERS, "4", "`IPNDM`, coefficients exact: order 4 on any grid",
    lambda n: n["ve"] < 2.5 and n["flow"] < 2.5,
)  # fmt: skip
def ipndm():
    """It uses the weights of equal steps in sigma on every schedule; on any other grid its four points give order 2."""
    return orders(core.sample_ipndm)


@defect(
    "`heunpp2`", CORE, ORDERS, "2", "`RhoRK`, method 2heun: order 2 with two calls a step",
    lambda n: n["ve"] < 1.5 and n["flow"] < 1.5,
)  # fmt: skip
def heunpp2():
    """Its slopes are weighted by sigma instead of by the step, so three calls a step buy order 1."""
    return orders(core.sample_heunpp2)


@defect(
    "`er_sde` with solver_type ODE", CORE, ORDERS, "3", "`ERSDE`, third_order exact: order 3",
    lambda n: n["ve"] < 2.5 and n["flow"] < 2.5,
)  # fmt: skip
def er_sde():
    """Stage 3 takes a backward difference for the derivative (order 2 at best), and its integrals are Riemann sums of 200
    points, whose error does not shrink with the step: the order falls further the more steps are taken."""
    return orders(core.sample_er_sde, s_noise=0.0, noise_scaler=lambda x: x)


@defect(
    "`gradient_estimation`", CORE, ORDERS, "1 is all the paper says; 2 costs nothing more",
    "`GradientEstimation`, second_order: order 2 on any grid", lambda n: n["ve"] < 1.5 and n["flow"] < 1.5,
)  # fmt: skip
def gradient_estimation():
    """With its default gamma 2 it extrapolates twice as far as Adams-Bashforth and stays at order 1 (gamma 1.5 has
    order 2 on equal steps)."""
    return orders(core.sample_gradient_estimation)


@defect(
    "`deis` with deis_mode rhoab", CORE, "max_order 3: {crash:.0f} of 1 runs fails; max_order 4: error {error:.0f} at 160 steps",
    "0; below 1e-4", "`DEIS`, variable rho: any order",
    lambda n: n["crash"] == 1 and n["error"] > 1,
)  # fmt: skip
def deis_rhoab():
    """The mode looks for one prediction more than was asked for: it crashes at max_order 2 and 3, and at 4 goes on with
    the weights of an earlier step. (No node of ComfyUI's own offers it.)"""
    model, x = mixture()
    try:
        model.run(core.sample_deis, x, [10.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1], max_order=3, deis_mode="rhoab")
        crash = 0
    except ValueError:
        crash = 1
    return {"crash": crash, "error": errors(core.sample_deis, VE, (160,), max_order=4, deis_mode="rhoab")[0]}


@defect(
    "`deis`", CORE, "a constant picture comes out wrong by {constant:.1e}, in float64; max_order 4: order {order:.2f} from 80 "
    "to 160 steps (VE)", "0; 4", "`DEIS`: Gauss-Legendre, exact to 1e-14", lambda n: n["constant"] > 1e-8 and n["order"] < 3.0,
)  # fmt: skip
def deis_quadrature():
    """Its weights are left Riemann sums of 10 000 points in single precision, so they do not add up to the step and the
    error stops falling at about 1e-6. (Too small to be seen in a picture.)"""
    x = torch.full((1, 1, 1, 1), 5.0, dtype=torch.float64)
    times = [14.6, 8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.1]
    got = constant().run(core.sample_deis, x, times)
    constant_error = (got - (2.0 + 0.1 / 14.6 * 3.0)).abs().item()
    return {"constant": constant_error, "order": orders(core.sample_deis, max_order=4)["ve"]}


@defect(
    "`sa_solver` with very many steps", CORE, "largest value of the result 10^{magnitude:.0f} (`karras`, 1000 steps, eta 0, "
    "float32; 10^{hundred:.0f} with 100 steps)", "10^0",
    "`SASolver`: weights relative to the step, in float64", lambda n: n["magnitude"] > 3,
)  # fmt: skip
def sa_solver_many_steps():
    """Its weights come from powers of lambda itself in single precision, which short steps far from lambda 0 make
    singular."""
    found = {}
    for key, n in (("magnitude", 1000), ("hundred", 100)):
        model, x = mixture()
        sigmas = comfy.samplers.calculate_sigmas(model_sampling(False), "karras", n)
        made = model.run(core.sample_sa_solver, x.float(), sigmas, tau_func=lambda sigma: 0.0)
        found[key] = math.log10(made.abs().max().item())
    return found


@defect(
    "UniPC's `vary_coeff` corrector", CORE, ORDERS, "4", "`UniPC`, variant exact: order p + 1",
    lambda n: n["ve"] < 1.5 and n["flow"] < 1.5,
)  # fmt: skip
def uni_pc_vary():
    """It keeps one entry of the column that belongs to the new point and drops the last row, as the authors' code does;
    a batch of more than one fails. (No node of ComfyUI's own offers it.)"""

    def one_by_one(model, x, sigmas, extra_args, callback, disable):
        rows = (
            uni_pc.sample_unipc(model, row[None], sigmas.clone(), extra_args, callback, disable, "vary_coeff")
            for row in x
        )
        return torch.cat(list(rows))

    logging.getLogger().setLevel(logging.ERROR)  # it writes a line per step
    torch.set_default_dtype(torch.float64)  # it mixes in tensors of the default dtype
    try:
        return orders(one_by_one)
    finally:
        torch.set_default_dtype(torch.float32)
