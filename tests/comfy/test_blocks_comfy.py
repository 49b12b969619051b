"""Gates on transformer blocks inside a real ComfyUI, on small DiTs with random weights."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from quickstep_under_test.nodes import attach
from quickstep_under_test.nodes.sites import families
from quickstep_under_test.nodes.sites.blocks import blocks
from quickstep_under_test.nodes.sites.scoped import scoped
from quickstep_under_test.solvers.caching.accelerator import Plan, Run
from quickstep_under_test.solvers.caching.delta_dit import DeltaDiT
from quickstep_under_test.solvers.caching.first_block import DBCache, FirstBlockCache
from quickstep_under_test.solvers.caching.taylorseer import TaylorSeer


def _beside(name):
    """The module ``name`` next to this file (importlib mode has no sys.path for test folders)."""
    full = f"quickstep_tests_comfy_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, Path(__file__).with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]


M, D = _beside("models"), _beside("dits")
KEY = "quickstep.test"


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=D.DITS)
def dit(request):
    return D.DITS[request.param]()


def error(a, b):
    return float((a - b).norm() / b.norm())


class Bench:
    """One network pass at a time, with the plan of one's choice."""

    def __init__(self, dit, settings):
        self.dit = dit
        self.session = settings.start(Run([1.0, 0.6, 0.3, 0.0]))
        self.wrapper = blocks(dit.model, settings, KEY, attach.FORWARD)[WrappersMP.APPLY_MODEL]
        self.chain = families.chain(dit.network, "", "")
        self.ran = []

    def __call__(self, plan, x, t, context, control=None, **options):
        self.session.plan, self.session.t, self.session.verdict = plan, float(t[0]), None
        self.session._seen.clear()
        self.record = attach.Meter().forward(1)
        options = {
            KEY: self.session, attach.FORWARD: self.record,
            "wrappers": {WrappersMP.APPLY_MODEL: {KEY: [self.wrapper]}} if plan else {}, **options,
        }  # fmt: skip
        ran = []
        taps = {
            block: (lambda *args, i=i, inner=block.forward, **kwargs: (ran.append(i), inner(*args, **kwargs))[1])
            for i, block in enumerate(self.chain.blocks)
        }
        with scoped(taps):
            out = self.dit.call(x, t, context, options, control)
        self.ran = ran
        assert not any("forward" in vars(m) for m in self.dit.network.modules())
        return out


SPANS = {
    "front 1": FirstBlockCache(threshold=2.0),
    "front 2 back 1": DBCache(threshold=2.0, Fn=2, Bn=1),
    "all": TaylorSeer(interval=9),
    "all but the back half": DeltaDiT(interval=9, b=0.0),
    "back half": DeltaDiT(interval=9, b=1.0),
}


@pytest.mark.parametrize("settings", SPANS.values(), ids=SPANS)
def test_a_hit_with_the_same_input_is_the_full_pass(dit, settings):
    """Every row of the table of families, for every part of the chain that may be left out."""
    n = len(families.chain(dit.network, "", ""))
    try:
        bench = Bench(dit, settings)
    except ValueError as refused:
        assert "leave none" in str(refused) or "late blocks" in str(refused)
        pytest.skip(str(refused))
    first, end = settings.spans(n)[0]
    given, other = dit.inputs(), dit.inputs(1, sigma=0.3)
    plain = bench(None, *given)
    assert bench.ran == list(range(n))
    full = bench(Plan.FULL, *given)
    assert torch.equal(plain, full) and bench.ran == list(range(n))
    hit = bench(Plan.PARTIAL, *given)
    assert bench.ran == [i for i in range(n) if not first <= i < end]
    assert error(hit, full) <= 1e-6
    assert 0.0 < bench.record.share < 1.0
    # With another input the blocks that stay see it, and the answer is another one.
    moved = bench(Plan.PARTIAL, *other)
    assert len(bench.ran) == n - (end - first)
    assert not torch.equal(moved, hit) and not torch.equal(moved, bench(None, *other))


def test_a_scope_leaves_no_trace_and_nests():
    layer = torch.nn.Linear(2, 2)
    heard = []
    layer.register_forward_hook(lambda *args: heard.append(1))
    x = torch.ones(1, 2)
    plain = layer(x)
    with scoped({layer: (lambda x, inner=layer.forward: inner(x) + 1)}):
        assert torch.equal(layer(x), plain + 1)
        with scoped({layer: (lambda x, inner=layer.forward: inner(x) * 2)}):
            assert torch.equal(layer(x), (plain + 1) * 2)
        assert torch.equal(layer(x), plain + 1)
        with pytest.raises(KeyError), scoped({layer: lambda x: x}):
            raise KeyError
        assert torch.equal(layer(x), plain + 1)
    assert torch.equal(layer(x), plain) and "forward" not in vars(layer) and len(heard) == 6
