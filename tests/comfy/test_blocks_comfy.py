"""Gates on transformer blocks inside a real ComfyUI, on small DiTs with random weights."""

import pytest
import torch
from quickstep_under_test.nodes.sites.scoped import scoped


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
