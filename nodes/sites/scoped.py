"""Another ``forward`` for some modules of a network, while a block of code runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn


@contextmanager
def scoped(overrides: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Inside, calling a module of ``overrides`` calls the function given for it, with the same arguments.

    ``nn.Module.__call__`` looks ``forward`` up on the instance, so only an attribute of the instance is set and taken away
    again: the class, the weights and the lists of modules stay what they are, forward hooks run, and what ComfyUI does
    inside a layer (LoRA, streaming weights from memory) happens if the layer is called and not otherwise.

    An override that wants to call what it replaces takes ``module.forward`` before entering; scopes may be nested that way,
    the inner one then calling the outer one. With several GPUs every thread has modules of its own, so threads never meet.
    """
    before = {module: vars(module).get("forward") for module in overrides}
    try:
        for module, forward in overrides.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward
