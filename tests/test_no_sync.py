"""A step reads nothing back from the device: it runs on the meta device, whose tensors have no values to read."""

from __future__ import annotations

import pytest
import torch
from quickstep_under_test.solvers.exponential import DDIM, DPMSolverPP, SDEDPMSolverPP
from quickstep_under_test.solvers.process import RectifiedFlow, VarianceExploding
from quickstep_under_test.solvers.solver import Problem, sample
from torch.utils._python_dispatch import TorchDispatchMode

SOLVERS = [DDIM(), DDIM(eta=1.0), DPMSolverPP(), DPMSolverPP(order=3), SDEDPMSolverPP(order=3)]
TIMES = [0.9, 0.7, 0.5, 0.3, 0.1, 0.0]


@pytest.mark.parametrize("process", [VarianceExploding(), RectifiedFlow()], ids=["ve", "flow"])
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{s.id}-{s.stochastic}")
def test_no_value_is_read_back(solver, process):
    x = torch.empty(2, 4, 8, 8, device="meta")
    problem = Problem(lambda x, t: x * 0.5, process, lambda s, t: torch.empty_like(x))
    assert sample(problem, solver, x, TIMES).device.type == "meta"


@pytest.mark.parametrize(
    "read", [lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: x[x > 0], lambda x: bool(x.any())]
)
def test_reading_back_would_be_seen(read):
    problem = Problem(lambda x, t: read(x) or x, VarianceExploding())
    with pytest.raises((RuntimeError, NotImplementedError)):
        sample(problem, DDIM(), torch.empty(2, 4, device="meta"), TIMES)


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", [s for s in SOLVERS if not s.stochastic], ids=lambda s: s.id)
def test_a_step_is_a_handful_of_operators(solver):
    with Count() as count:
        sample(Problem(lambda x, t: x * 0.5, VarianceExploding()), solver, torch.randn(2, 4, 8, 8), TIMES)
    assert count.operators <= 5 * (1 + 1 + solver.span)  # the stand-in network, the scaling, one per prediction
