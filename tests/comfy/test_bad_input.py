"""Bad input, over forty kinds: each must be refused in one clear sentence, before the network is called.

``python tests/comfy/test_bad_input.py`` (in the test bed) prints what each of them says.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

if __name__ == "__main__":  # the table, outside pytest
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from _pack import import_comfy, import_pack

    import_comfy()
    sys.modules["quickstep_under_test"] = import_pack("quickstep_under_test")

import comfy.samplers
import torch
from quickstep_under_test.nodes import demo, schedules
from quickstep_under_test.nodes.accelerators import Report
from quickstep_under_test.nodes.attach import attach
from quickstep_under_test.nodes.bridge import process_of, sampler
from quickstep_under_test.nodes.compare import Candidate, Compare
from quickstep_under_test.solvers import exponential as ex
from quickstep_under_test.solvers import schedules as sc
from quickstep_under_test.solvers.caching.deepcache import DeepCache

NAN, INF = float("nan"), float("inf")
_models: dict[str, object] = {}


def model(name: str):
    if name not in _models:
        _models[name] = demo.load_model(name)
    return _models[name]


def sealed(name: str):
    """A model whose network must not be reached."""
    made = model(name).clone()

    def network(*unused):
        raise AssertionError("the network was called")

    made.set_model_unet_function_wrapper(network)
    return made


def run(sigmas, solver=None, name="unet_small", shape=(1, 3, 32, 32)):
    guider = comfy.samplers.CFGGuider(sealed(name))
    condition = [[torch.zeros(1, 16, 64), {"pooled_output": torch.zeros(1, 64)}]]
    guider.set_conds(condition, condition)
    x = torch.zeros(shape)
    guider.sample(torch.randn(shape), x, sampler(solver or ex.DPMSolverPP()), torch.tensor(sigmas), disable_pbar=True)


def schedule(made, steps=10, denoise=1.0, name="unet_small"):
    return lambda: schedules.sigmas(made, model(name), steps, denoise)


def called(made, *args, name="unet_small"):
    return lambda: made(process_of(model(name)), *args)


def compare(latent=None, candidates=None, reference_steps=8):
    condition = [[torch.zeros(1, 16, 64), {"pooled_output": torch.zeros(1, 64)}]]
    latent = {"samples": torch.zeros(1, 3, 32, 32)} if latent is None else latent
    return lambda: Compare.execute(
        sealed("unet_small"),
        condition,
        condition,
        latent,
        demo.load_vae(),
        0,
        3.0,
        reference_steps,
        1,
        candidates=candidates,
    )


def entered(sigmas, label="mine"):
    return Candidate.execute(sampler(ex.DDIM()), torch.tensor(sigmas), label).args[0]


CASES = {
    # solvers: settings
    "DDIM eta 1.5": (lambda: ex.DDIM(eta=1.5), "must lie between"),
    "DDIM eta NaN": (lambda: ex.DDIM(eta=NAN), "finite number"),
    "DDIM eta text": (lambda: ex.DDIM(eta="0.5"), "finite number"),
    "DDIM eta true": (lambda: ex.DDIM(eta=True), "finite number"),
    "DDIM s_noise -1": (lambda: ex.DDIM(s_noise=-1.0), "must lie between"),
    "DPM++ order 0": (lambda: ex.DPMSolverPP(order=0), "between 1 and 3"),
    "DPM++ order 4": (lambda: ex.DPMSolverPP(order=4), "between 1 and 3"),
    "DPM++ order 2.5": (lambda: ex.DPMSolverPP(order=2.5), "whole number"),
    "DPM++ correction unknown": (lambda: ex.DPMSolverPP(correction="heun3"), "not one of midpoint, taylor"),
    "DPM++ third_order number": (lambda: ex.DPMSolverPP(third_order=3), "must be a text"),
    "SDE eta infinite": (lambda: ex.SDEDPMSolverPP(eta=INF), "finite number"),
    "SDE noise unknown": (lambda: ex.SDEDPMSolverPP(noise="pink"), "not one of brownian, gaussian"),
    # sigmas
    "sigmas increasing": (lambda: run([0.1, 1.0, 14.0]), "sigmas must decrease"),
    "sigmas rising in the middle": (lambda: run([14.0, 3.0, 5.0, 0.0]), "sigmas must decrease"),
    "sigmas with NaN": (lambda: run([14.0, NAN, 0.0]), "finite number"),
    "sigmas infinite": (lambda: run([INF, 1.0, 0.0]), "finite number"),
    "sigmas negative": (lambda: run([14.0, 1.0, -1.0]), "cannot be negative"),
    "sigmas above 1 on a flow model": (lambda: run([14.0, 1.0, 0.0], name="dit"), "flow model"),
    "sigmas flipped, stochastic": (lambda: run([0.0, 1.0, 14.0], ex.SDEDPMSolverPP()), "sigmas must decrease"),
    # schedules
    "schedule of 0 steps": (called(sc.KarrasSchedule(), 14.6, 0.03, 0), "at least 1 step"),
    "schedule of -3 steps": (called(sc.KarrasSchedule(), 14.6, 0.03, -3), "at least 1 step"),
    "schedule range reversed": (called(sc.KarrasSchedule(), 0.03, 14.6, 5), "must be positive and below"),
    "schedule range empty": (called(sc.ExponentialSchedule(), 1.0, 1.0, 5), "must be positive and below"),
    "schedule range NaN": (called(sc.ExponentialSchedule(), NAN, 0.03, 5), "must be finite"),
    "schedule from sigma 0": (called(sc.UniformSchedule(), 14.6, 0.0, 5), "must be positive"),
    "schedule above 1 on a flow model": (called(sc.KarrasSchedule(), 14.6, 0.03, 5, name="dit"), "end at 1"),
    "Karras rho 0": (lambda: sc.KarrasSchedule(rho=0.0), "must lie between"),
    "Beta alpha -1": (lambda: sc.BetaSchedule(alpha=-1.0), "must lie between"),
    "shift 0": (lambda: sc.CosineSchedule(shift=0.0), "must lie between"),
    "shift NaN": (lambda: sc.CosineSchedule(shift=NAN), "finite number"),
    "more steps than the range has numbers": (called(sc.ExponentialSchedule(), 1.0, 0.9999, 5000), "use fewer steps"),
    "node with -1 steps": (schedule(sc.KarrasSchedule(), -1), "at least 1 step"),
    "AYS table unknown": (lambda: sc.AlignYourSteps(table="SD3"), "not one of"),
    # accelerators
    "DeepCache on a DiT": (lambda: attach(model("dit"), DeepCache()), "UNet"),
    "DeepCache depth 30": (lambda: attach(model("unet_small"), DeepCache(depth=30)), "must lie between 0 and"),
    "DeepCache interval 0": (lambda: DeepCache(interval=0), "between 1 and 20"),
    "DeepCache interval 1.5": (lambda: DeepCache(interval=1.5), "whole number"),
    "DeepCache window reversed": (
        lambda: attach(model("unet_small"), DeepCache(start_percent=0.8, end_percent=0.2)),
        "ends before it starts",
    ),
    "DeepCache schedule unknown": (lambda: DeepCache(schedule="random"), "not one of"),
    "Report of an unmeasured model": (
        lambda: Report.execute({"samples": torch.zeros(1)}, model("unet_small")),
        "not measured",
    ),
    # compare
    "Compare without candidates": (compare(), "no candidates"),
    "candidate with one sigma": (lambda: entered([1.0]), "at least two sigmas"),
    "candidate with no sigmas": (lambda: entered([]), "at least two sigmas"),
    "candidate with 2-D sigmas": (lambda: entered([[1.0, 0.0]]), "at least two sigmas"),
    "candidate that stops early": (lambda: entered([14.0, 1.0]), "must end in 0"),
    "candidate with NaN sigmas": (compare(candidates={"a": entered([14.6, NAN, 0.0])}), "finite number"),
    "candidate with rising sigmas": (compare(candidates={"a": entered([14.6, 20.0, 0.0])}), "must decrease"),
    "candidates from different noise": (
        compare(candidates={"a": entered([14.6, 0.0]), "b": entered([2.0, 0.0])}),
        "starts at sigma",
    ),
    # demo model, drawing
    "unknown demo network": (lambda: demo.DemoModel.execute("flux"), "not one of"),
    "draw no sigmas": (lambda: schedules.DrawSchedule.execute(torch.tensor([])), "holds no sigmas"),
    "draw lambda without a model": (
        lambda: schedules.DrawSchedule.execute(torch.tensor([1.0, 0.0]), "lambda"),
        "connect the model",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_is_refused_in_one_sentence(name):
    cause, words = CASES[name]
    with pytest.raises(ValueError) as raised:
        cause()
    said = str(raised.value)
    assert words in said
    assert "\n" not in said and said.endswith((".", "!")) and len(said) < 400


def test_there_are_enough():
    assert len(CASES) >= 40


if __name__ == "__main__":
    for case, (cause, _) in CASES.items():
        try:
            cause()
        except Exception as error:
            print(f"| {case} | {type(error).__name__}: {error} |")
        else:
            print(f"| {case} | NOT REFUSED |")
