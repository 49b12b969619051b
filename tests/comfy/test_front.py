"""The Quickstep Sampler node: every choice gives the solver of that name with the settings of its options."""

import pytest
import torch
from quickstep_under_test.nodes.bridge import process_of, sampler
from quickstep_under_test.nodes.front import CHOICES, QuickstepSampler
from quickstep_under_test.solvers.auto import Auto, choose
from quickstep_under_test.solvers.method import params
from quickstep_under_test.solvers.solver import Problem, sample

from . import models


def made(title, **options):
    return QuickstepSampler.execute(solver={"solver": title, **options}).args[0].solver


@pytest.mark.parametrize("title", CHOICES)
def test_every_choice_with_its_defaults(title):
    defaults = {declared.name: declared.default for declared in params(CHOICES[title])}
    assert made(title) == made(title, **defaults) == CHOICES[title]()


def test_options_reach_the_solver():
    assert made("DPM-Solver++", order=3).order == 3
    assert made("DDIM", eta=0.5).eta == 0.5
    assert made("DDIM", eta=0.5, order=7).eta == 0.5  # a leftover of another choice is not ours


def test_options_of_the_schema_are_those_of_the_solver():
    (dropdown,) = QuickstepSampler.GET_SCHEMA().inputs
    for option in dropdown.options:
        assert [item.id for item in option.inputs] == [p.name for p in params(CHOICES[option.key])]
        assert all(item.tooltip for item in option.inputs)


@pytest.mark.parametrize("given", [None, {}, {"solver": "euler"}])
def test_an_unknown_choice_is_one_sentence(given):
    with pytest.raises(ValueError, match=r"Quickstep Sampler: solver = .* is not one of auto, DDIM"):
        QuickstepSampler.execute(solver=given)


@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize("cfg", [1.0, 4.0, None])
def test_auto_is_the_solver_it_chooses(kind, cfg):
    process = process_of(models.gaussian(kind))
    problem = Problem(lambda x, t: x.tanh(), process, cfg=cfg)
    times = [process.t_max * f for f in (1.0, 0.7, 0.4, 0.2, 0.05, 0.0)]
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    chosen = choose(process, 5, cfg)
    assert torch.equal(sample(problem, Auto(), x, times), sample(problem, chosen, x, times))


def test_auto_is_told_the_guidance_scale():
    seen = []

    class Spy(Auto):
        def step(self, problem, x, s, t, state):
            seen.append(problem.cfg)
            return super().step(problem, x, s, t, state)

    model = models.gaussian("eps")
    condition = models.conditioning(1)
    import comfy.sample

    comfy.sample.sample_custom(
        model, torch.randn(1, 4, 6, 6), 3.5, sampler(Spy()), torch.tensor([5.0, 1.0, 0.0]), condition, condition,
        torch.zeros(1, 4, 6, 6), disable_pbar=True, seed=0,
    )  # fmt: skip
    assert seen == [3.5, 3.5]
