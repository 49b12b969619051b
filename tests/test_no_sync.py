"""A step reads nothing back from the device and changes nothing in place."""

from __future__ import annotations

import pytest
import torch
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP, SDEDPMSolverPP
from quickstep_under_test.solvers.noise import gaussian
from quickstep_under_test.solvers.process import RectifiedFlow, VarianceExploding
from quickstep_under_test.solvers.solver import Problem, sample
from torch.utils._python_dispatch import TorchDispatchMode


class Spy(TorchDispatchMode):
    """Records operators that make the host wait for the device: reading a scalar, or copying to another device."""

    def __init__(self):
        super().__init__()
        self.waits, self.operators = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        if "_local_scalar_dense" in str(func) or "nonzero" in str(func) or (kwargs or {}).get("device") is not None:
            self.waits.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("process", [VarianceExploding(), RectifiedFlow()], ids=["ve", "flow"])
@pytest.mark.parametrize(
    "solver", [DDIM(), DPMSolverPP(), DPMSolverPP(order=3), SDEDPMSolverPP(eta=0.0, order=3)], ids=lambda s: s.id
)
def test_no_wait_for_the_device(solver, process):
    x = torch.randn(2, 4, 8, 8)
    times = [0.9, 0.7, 0.5, 0.3, 0.1, 0.0]
    problem = Problem(lambda x, t: x * 0.5, process)
    with Spy() as spy:
        sample(problem, solver, x, times)
    assert spy.waits == []
    assert spy.operators <= 5 * (1 + 1 + 3)  # the stand-in network, the scaling, at most three predictions


def test_the_spy_sees_a_wait():
    with Spy() as spy:
        torch.ones(2).sum().item()
    assert spy.waits


def test_stochastic_step_draws_on_the_device_of_x():
    x = torch.randn(2, 4, 8, 8)
    problem = Problem(lambda x, t: x * 0.5, VarianceExploding(), gaussian(x, 0))
    with Spy() as spy:
        sample(problem, SDEDPMSolverPP(noise="gaussian"), x, [0.9, 0.7, 0.5, 0.0])
    assert [w for w in spy.waits if "randn" not in w] == []
